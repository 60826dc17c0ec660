import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


def pytest_configure(config):
    """Without a word about GPUs the tests run as on a machine without one: `-m gpu` or CUDA_VISIBLE_DEVICES is one."""
    if not _gpu_only(config):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read where kernels are first imported


def pytest_ignore_collect(collection_path, config):
    """A GPU machine need not have what the other tests import."""
    if _gpu_only(config) and collection_path.suffix == ".py" and collection_path.name != "conftest.py":
        return "mark.gpu" not in collection_path.read_text() or None
    return None


def _gpu_only(config):
    return config.option.markexpr == "gpu"


torch.set_num_threads(1)  # module-scoped fixtures train before the one below runs


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    from tests import runs

    return runs.make_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from tests import runs

    return runs.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
