"""The stages of the RoboTwin example, whose training and commands are stood in for."""

import json
from dataclasses import replace

import pytest

from examples.robotwin import pipeline
from examples.robotwin.pipeline import INSTRUCTIONS, Job, Settings


@pytest.fixture
def commands(monkeypatch):
    """The commands that would have run."""
    found = []

    def lerobot_train(flags, dataset, run, log, bar):
        pipeline.checkpoint(run).mkdir(parents=True)

    monkeypatch.setattr(pipeline, "lerobot_train", lerobot_train)
    monkeypatch.setattr(pipeline, "_watch", lambda command, *_: found.append(command))
    return found


def job(tmp_path, settings):
    made = Job("stack", settings, tmp_path / "out", 0)
    (made.dataset / "meta").mkdir(parents=True, exist_ok=True)
    (made.dataset / "meta" / INSTRUCTIONS).write_text(json.dumps({"seen": ["stack them"], "unseen": []}) + "\n")
    return made


def test_another_training_is_another_comparison(tmp_path, commands):
    """`ofp-compare` refuses a directory whose policies were others."""
    settings = Settings()
    longer = replace(settings, training=replace(settings.training, steps=3000))
    for each in (settings, settings, longer):
        pipeline.train(job(tmp_path, each))
        pipeline.compare(job(tmp_path, each))
    first, again, other = ([x for x in command if x.startswith("--output=")] for command in commands)
    assert first == again != other
