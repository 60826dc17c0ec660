import logging
import os
import sys
import threading
import traceback
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of commands that tests start, and their other threads
# Without a word about GPUs the tests run as on a machine without one: `-m gpu` or CUDA_VISIBLE_DEVICES is one. Here and
# not in a hook: other conftest files import what reads it before any hook runs.
if any("gpu" in argument for argument in sys.argv):
    os.environ["OFP_TEST_GPU"] = "1"  # for the processes of `-n`, which have other arguments
if "OFP_TEST_GPU" not in os.environ:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from tqdm import tqdm

# Tests fork processes and kill them. These share tqdm's lock, which stays taken where one of them held it.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def pytest_ignore_collect(collection_path, config):
    """A GPU machine need not have what the other tests import."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py" and collection_path.name != "conftest.py":
        return "mark.gpu" not in collection_path.read_text() or None
    return None


# Whole commands, LeRobot's scripts, simulators and processes. `make test-fast` leaves them out.
SLOW = (
    "benchmarks",
    "evaluation/test_check.py",
    "evaluation/test_check_faults.py",
    "evaluation/test_compare.py",
    "examples",
    "inference/test_faults.py",
    "interop/test_convert.py",
    "interop/test_export.py",
    "interop/test_golden.py",
    "lerobot",
    "policies/engine",
    "policies/test_sharding.py",
    "recipes",
    "robotwin_eval",
    "serving/test_lerobot_async.py",
    "test_environment.py",
    "test_paths.py",
    "test_policies_and_commands.py",
    "test_versions.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        if any(place == slow or place.startswith(f"{slow}/") for slow in SLOW):
            item.add_marker(pytest.mark.slow)


# What LeRobot's main of 2026-08-23 asks of transformers 5.6 and later in vain: part of the error, and whose code asks.
STOCK_FAULTS = (
    ("cache_position", "lerobot/policies/pi_gemma"),
    ("Calling `crop` with a positive value", "lerobot/policies/smolvla"),
)


def _skip_where_stock_does_not_run(error):
    """There is nothing to compare with, where LeRobot's own policy raised just that."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    for message, code in STOCK_FAULTS:
        if message in str(error) and any(code in name for name in frames):
            transformers = f"transformers {version('transformers')}"
            pytest.skip(f"LeRobot {version('lerobot')}'s {code} does not run with {transformers}: {error}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    try:
        return (yield)
    except (TypeError, ValueError) as error:
        _skip_where_stock_does_not_run(error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except (TypeError, ValueError) as error:
        _skip_where_stock_does_not_run(error)
        raise


torch.set_num_threads(1)  # module-scoped fixtures train before the one below runs


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logging_as_before():
    """LeRobot's `init_logging` replaces the handlers of the whole process; a later test's `capsys` would read them."""
    root, websockets = logging.getLogger(), logging.getLogger("websockets")
    before = root.handlers[:], root.level, websockets.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    websockets.setLevel(before[2])


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    from tests import runs

    return runs.make_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from tests import runs

    return runs.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
