import os
import signal
import subprocess
import sys
import time

from ofp_lerobot.evaluation.pools import process_pool
from tests.processes import wait_until

PARENT = """
import os, pathlib, sys, time
from tests.evaluation.test_pools import work
from ofp_lerobot.evaluation.pools import process_pool
if __name__ == "__main__":
    with process_pool(2) as pool:
        list(pool.map(work, [sys.argv[1]] * 4))
"""


def work(directory):
    open(os.path.join(directory, f"{os.getpid()}"), "w").close()
    time.sleep(60)


def test_a_pool_ends_with_the_process_that_began_it(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    (tmp_path / "pids").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pids")], env=environment)

    def workers():
        return [int(path.name) for path in (tmp_path / "pids").iterdir()]

    wait_until(lambda: len(workers()) == 2)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(map(runs, workers())))
    assert len(workers()) == 2  # nothing that waited was begun


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def name_of(suffix):
    return f"{NAMES[0]}{suffix}"


NAMES = []


def begin(name):
    NAMES.append(name)


def test_a_pool_runs_its_initializer():
    with process_pool(1, begin, "work") as pool:
        assert list(pool.map(name_of, "ab")) == ["worka", "workb"]
