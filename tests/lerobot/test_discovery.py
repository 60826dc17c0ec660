"""LeRobot finds the plugin by its distribution's name, from a wheel and from an editable install."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins

from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from tests import small

ROOT = Path(__file__).parents[2]
NAME = "lerobot_policy_ofp"
HEAVY = ["ofp_lerobot.policies.ofp.modeling_ofp", "ofp_lerobot.policies.paligemma.network"]

PROBE = """
import json, sys
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
heavy = [name for name in sys.argv[1].split(",") if name in sys.modules]
from lerobot.processor import ProcessorStepRegistry
steps_known = "ofp_text_extent" in ProcessorStepRegistry.list()
import ofp_lerobot
config = PreTrainedConfig.get_choice_class("ofp")(tokenizer_name=sys.argv[2], device="cpu")
pipelines = make_pre_post_processors(config)
print(json.dumps({
    "heavy": heavy,
    "steps_known": steps_known,
    "file": ofp_lerobot.__file__,
    "policy": get_policy_class("ofp").__module__,
    "steps": [[type(step).__name__ for step in pipeline.steps] for pipeline in pipelines],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """PYTHONPATH of an environment with the wheel and everything that is installed here but this project."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    others = tmp_path_factory.mktemp("others")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if NAME not in entry.name and entry.suffix != ".pth":
            (others / entry.name).symlink_to(entry)
    return f"{unpacked}{os.pathsep}{others}"


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"ofp_lerobot", "robotwin_eval", NAME, metadata.split("/")[0]}
    assert f"Name: {NAME}" in lines  # a hyphen, and LeRobot passes it over without a word
    assert f"{NAME}/__init__.py" in names and "ofp_lerobot/policies/ofp/configuration_ofp.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_discovery_from_the_wheel(installed, tokenizer):
    # Without `site`, no .pth file leads back to the editable install.
    command = [sys.executable, "-S", "-c", PROBE, ",".join(HEAVY), str(tokenizer)]
    environment = {**os.environ, "PYTHONPATH": installed, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert Path(facts["file"]).is_relative_to(installed.split(os.pathsep)[0])
    assert facts["heavy"] == []  # importing the entry loads no model code of ours
    assert facts["steps_known"]  # saved processors can be loaded before any policy
    assert facts["policy"] == "ofp_lerobot.policies.ofp.modeling_ofp"
    assert "TokenizerProcessorStep" in facts["steps"][0] and "UnnormalizerProcessorStep" in facts["steps"][1]


def test_discovery_from_this_install(monkeypatch):
    imported, load = [], importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: (imported.append(name), load(name, *rest))[1])
    register_third_party_plugins()
    assert NAME in imported
    assert importlib.metadata.distribution(NAME).metadata["Name"] == NAME


def test_policy_class_and_processors_by_lerobots_naming_convention(tokenizer):
    assert get_policy_class("ofp") is OFPPolicy
    config = small.ofp_config(tokenizer_name=str(tokenizer), tokenizer_max_length=32)
    preprocessor, postprocessor = make_pre_post_processors(config)
    assert (preprocessor.name, postprocessor.name) == ("policy_preprocessor", "policy_postprocessor")


COMMANDS = """
import sys
from importlib.metadata import distribution, entry_points
scripts = distribution("lerobot_policy_ofp").entry_points.select(group="console_scripts")
for script in scripts:
    sys.argv = [script.name, "--help"]
    try:
        code = script.load()()
    except SystemExit as end:
        code = end.code
    print("ran", script.name, code or 0)
for entry in entry_points(group="ofp_lerobot.environments"):
    print("ran", entry.load().__name__, 0)
from ofp_lerobot.recipes import recipes
import ofp_lerobot
print("recipes", len(recipes()), all("_recipes" in str(path) for path in recipes().values()))
print("from", ofp_lerobot.__file__)
"""


def test_every_command_runs_from_the_wheel(installed):
    command = [sys.executable, "-S", "-c", COMMANDS]
    environment = {**os.environ, "PYTHONPATH": installed, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    ran = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert {name for name, _ in ran} >= {"ofp-check", "ofp-compare", "ofp-convert", "ofp-export", "ofp-recipe"}
    assert {name for name, _ in ran} >= {"ofp-serve", "ofp-async-server", "ofp-policy-server", "RoboTwinHarness"}
    assert all(code == "0" for _, code in ran), ran
    assert f"recipes {len(list((ROOT / 'recipes').glob('*.yaml')))} True" in done.stdout
    assert f"from {installed.split(os.pathsep)[0]}" in done.stdout
