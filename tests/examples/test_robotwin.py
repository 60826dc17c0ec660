"""The stages of the RoboTwin example, whose training and commands are stood in for."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from examples.robotwin import pipeline
from examples.robotwin.pipeline import INSTRUCTIONS, Job, Settings
from ofp_lerobot.errors import UserError

MAIN = """
import subprocess, sys
from pathlib import Path
from examples.robotwin import __main__, pipeline
unheeded = []  # as multiprocessing's resource tracker: it ends, and nobody waits for it
def collect(job):
    unheeded.append(subprocess.Popen(["true"]))
    command = [sys.executable, "-c", f"import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    pipeline._watch(command, job.output / "collect.txt", lambda: 0, job.bar("collect", 1))
pipeline.require = lambda root: None
pipeline.STAGES["collect"] = ((collect,),)
sys.exit(__main__.main())
"""


def test_what_it_started_ends_with_it(tmp_path):
    """Two tasks at once, a third one that waits for its turn."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "--tasks=a,b,c", f"--output={tmp_path}"],
        env={**os.environ, "ROBOTWIN_ROOT": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )

    def begun():
        return [int(log.read_text()) for log in tmp_path.glob("*/collect.txt") if log.read_text().strip()]

    while len(begun()) < 2 and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    assert len(begun()) >= 2 and not any(map(psutil.pid_exists, begun()))


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that would have run."""
    monkeypatch.setenv("ROBOTWIN_ROOT", str(tmp_path / "RoboTwin"))
    found = []

    def lerobot_train(flags, dataset, run, log, bar):
        pipeline.checkpoint(run).mkdir(parents=True)

    monkeypatch.setattr(pipeline, "lerobot_train", lerobot_train)
    monkeypatch.setattr(pipeline, "_watch", lambda command, *_: found.append(command))
    return found


def job(tmp_path, settings):
    made = Job("stack", settings, tmp_path / "out", 0, workers=2)
    (made.dataset / "meta").mkdir(parents=True, exist_ok=True)
    (made.dataset / "meta" / INSTRUCTIONS).write_text(json.dumps({"seen": ["stack them"], "unseen": []}) + "\n")
    for file in made.files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            file.write_bytes(b"HDF5")
    (made.recordings / "ofp_cpu.json").write_text('{"variation": 1, "shadows": false}')
    return made


def train(made):
    for together in pipeline.STAGES["train"]:
        for each in together:
            each(made)


def test_another_training_is_another_comparison(tmp_path, commands):
    """`ofp-compare` refuses a directory whose policies were others."""
    settings = Settings()
    longer = replace(settings, training=replace(settings.training, steps=3000))
    for each in (settings, settings, longer):
        train(job(tmp_path, each))
        pipeline.compare(job(tmp_path, each))
    first, again, other = ([x for x in command if x.startswith("--output=")] for command in commands)
    assert first == again != other


def test_recordings_of_another_expert_are_not_taken(tmp_path, commands):
    made = job(tmp_path, Settings(demonstrations=2))
    for i in range(2):
        (made.recordings / f"instructions/episode{i}.json").parent.mkdir(exist_ok=True)
        (made.recordings / f"instructions/episode{i}.json").touch()
    pipeline.collect(made)
    assert not commands  # all are there
    with pytest.raises(UserError, match="made with --variation 1 and no --shadows, not with --variation 2"):
        pipeline.collect(replace(made, settings=replace(made.settings, variation=2)))
    (made.recordings / "ofp_cpu.json").unlink()
    with pytest.raises(UserError, match="is not known"):
        pipeline.collect(made)


def test_recordings_made_anew_are_converted_and_trained_on_anew(tmp_path, commands, monkeypatch):
    converted = []

    def convert(sources, output, **_):
        converted.append(sources)
        (output / "meta").mkdir(parents=True)
        (output / "meta" / INSTRUCTIONS).write_text(json.dumps({"seen": ["stack them"], "unseen": []}) + "\n")

    monkeypatch.setattr(pipeline, "convert", convert)
    made, comparisons = job(tmp_path, Settings(demonstrations=2)), []
    for content in (None, None, b"another one"):
        if content:
            made.files[1].write_bytes(content)
        pipeline.convert_recordings(made)
        train(made)
        comparisons.append(made.comparison)
    assert len(converted) == 2 and comparisons[0] == comparisons[1] != comparisons[2]


def test_a_command_that_fails_is_heard(tmp_path):
    log = tmp_path / "collect.txt"
    log.write_text("of a run before, which may be writing still\n")
    says = r"import sys; print('1 of 50\r2 of 50\nit was refused\n'); sys.exit(3)"
    with pytest.raises(UserError, match=r"failed with exit code 3: 2 of 50 it was refused$"):
        pipeline._watch([sys.executable, "-c", says], log, lambda: 0, pipeline.tqdm(disable=True, total=1))
    assert log.read_text().startswith("of a run before")
