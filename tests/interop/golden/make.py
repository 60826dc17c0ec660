"""Writes openpi.json: answers of openpi's own code to `cases.py`. Run it in openpi's environment, never in the tests.

    git clone https://github.com/Physical-Intelligence/openpi && cd openpi && GIT_LFS_SKIP_SMUDGE=1 uv sync
    cp -r src/openpi/models_pytorch/transformers_replace/* .venv/lib/python3.11/site-packages/transformers/
    cd <this repository> && .venv/bin/python -m tests.interop.golden.exports DIRECTORY
    PYTHONPATH=src <openpi>/.venv/bin/python -m tests.interop.golden.make DIRECTORY

DIRECTORY holds folded exports of the golden policy for openpi, by their number of steps; openpi's answers with them
are written too. float32, one thread, on the CPU.
"""

import argparse
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import openpi.models.gemma as gemma
import safetensors.torch
import torch
import transformers
from openpi import transforms
from openpi.models import pi0_config
from openpi.models.tokenizer import PaligemmaTokenizer
from openpi.models_pytorch import gemma_pytorch, pi0_pytorch, preprocessing_pytorch
from openpi.shared import normalize
from openpi_client import image_tools
from safetensors import safe_open

from ofp_lerobot.interop import openpi_training
from tests.interop.golden import cases


def _vlm(config):
    config.vision_config.update(cases.VISION)
    config.text_config.vocab_size = cases.VOCABULARY
    return transformers.PaliGemmaForConditionalGeneration(config)


def _expert(config):
    config.vocab_size = cases.VOCABULARY
    return transformers.GemmaForCausalLM(config)


def build(dtype):
    """openpi's network, tiny."""
    config = pi0_config.Pi0Config(
        pi05=True,
        dtype=dtype,
        action_dim=cases.ACTIONS,
        action_horizon=cases.HORIZON,
        max_token_len=cases.TEXT,
        pytorch_compile_mode=None,
    )
    with (
        patch.object(gemma, "get_config", lambda _: gemma.Config(**cases.GEMMA)),
        patch.object(gemma_pytorch, "PaliGemmaForConditionalGeneration", _vlm),
        patch.object(gemma_pytorch, "GemmaForCausalLM", _expert),
    ):
        return pi0_pytorch.PI0Pytorch(config).eval()


def real_size():
    """Of the π₀.₅ that openpi builds by default."""
    with torch.device("meta"):
        model = pi0_pytorch.PI0Pytorch(pi0_config.Pi0Config(pi05=True, pytorch_compile_mode=None))
    return cases.digest({name: tuple(w.shape) for name, w in model.state_dict().items()})


def observed(batch):
    return SimpleNamespace(
        images={k: torch.tensor(v).permute(0, 3, 1, 2) * 2.0 - 1.0 for k, v in batch.images.items()},
        image_masks={k: torch.full((cases.BATCH,), v) for k, v in batch.present.items()},
        tokenized_prompt=torch.tensor(batch.tokens),
        tokenized_prompt_mask=torch.tensor(batch.token_mask),
        state=torch.zeros(cases.BATCH, cases.ACTIONS),
        token_ar_mask=None,
        token_loss_mask=None,
    )


def small_images():
    resolution = functools.partial(
        preprocessing_pytorch.preprocess_observation_pytorch, image_resolution=(cases.SIZE, cases.SIZE)
    )
    return patch.object(preprocessing_pytorch, "preprocess_observation_pytorch", resolution)


def actions(model, case, steps):
    batch = cases.OBSERVATIONS[case]
    with small_images():
        return model.sample_actions("cpu", observed(batch), noise=torch.tensor(batch.noise), num_steps=steps)


@torch.no_grad()
def velocities(model):
    """Of `openpi_training`'s network, by case."""
    found = {}
    for case, batch in cases.OBSERVATIONS.items():
        with small_images():
            *observation, state = model._preprocess_observation(observed(batch), train=False)
        prefix = model._encode(*observation)
        times = (torch.tensor(x) for x in (cases.states(batch.noise), cases.TIMES, cases.TARGETS, cases.KEEP))
        found[case] = in_hex(model.velocity(state, *prefix, *times))
    return found


def in_hex(chunk):
    """Its float32 bytes."""
    return chunk.numpy().astype("<f4").tobytes().hex()


def fill(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.copy_(torch.tensor(cases.weight(name, tuple(parameter.shape))))


def manifest(model, path):
    """Names, shapes and bfloat16 of what openpi writes, and the file's metadata."""
    safetensors.torch.save_model(model, path)
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in sorted(file.keys())}
        return {
            "tensors": {k: [list(v.shape), v.dtype == torch.bfloat16] for k, v in tensors.items()},
            "metadata": file.metadata(),
        }


def normalised():
    stats = {
        k: normalize.NormStats(**{n: np.array(x, np.float64) for n, x in v.items()})
        for k, v in cases.NORM_STATS.items()
    }
    state = cases.rows(cases.STATES, 1, 2.0)
    answers = cases.rows(cases.ACTIONS, 2)
    delta = transforms.AbsoluteActions(cases.DELTA_MASK)
    out = transforms.Unnormalize(stats, use_quantiles=True)({"state": answers[:, :6], "actions": answers.copy()})
    absolute = delta({"state": state, "actions": out["actions"][:, None, : cases.ROBOT_ACTIONS]})["actions"][:, 0]
    recorded = cases.rows(cases.ROBOT_ACTIONS, 3)[:, None]
    relative = transforms.DeltaActions(cases.DELTA_MASK)({"state": state, "actions": recorded.copy()})
    wanted = transforms.Normalize(stats, use_quantiles=True)(relative)
    return {
        "state": np.asarray(wanted["state"]).tolist(),
        "actions": np.asarray(wanted["actions"])[:, 0].tolist(),
        "absolute": absolute.tolist(),
        "serialised": normalize.serialize_json(stats),
    }


def prompts(state):
    """What the tokenizer is given: the pieces it encodes, and whether it adds the start token."""
    pieces = []
    recorder = SimpleNamespace(encode=lambda text, add_bos=False: pieces.append([text, add_bos]) or [1])
    tokenizer = object.__new__(PaligemmaTokenizer)
    tokenizer._max_len, tokenizer._tokenizer = 200, recorder
    found = {"state": [], "no_state": []}
    for prompt in cases.PROMPTS:
        for kind, value in (("state", np.asarray(state[0])), ("no_state", None)):
            pieces.clear()
            tokenizer.tokenize(prompt, value)
            found[kind].append([list(p) for p in pieces])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path)
    exports = parser.parse_args().exports
    torch.set_num_threads(1)
    real = real_size()
    model = build("float32")
    fill(model)
    rounded = build("bfloat16")
    numbers = normalised()
    file = exports / "golden.safetensors"
    plain = {case: {str(k): in_hex(actions(model, case, k)) for k in cases.STEPS} for case in cases.OBSERVATIONS}
    folded = {}
    for steps in cases.FOLDED:
        safetensors.torch.load_model(model, exports / str(steps) / "model.safetensors")  # strict, as openpi loads
        folded[str(steps)] = {case: in_hex(actions(model, case, steps)) for case in cases.OBSERVATIONS}
    openpi_training.install()
    one_step = build("float32")
    fill(one_step)
    answers = {
        "real_size": real,
        "actions": plain,
        "folded": folded,
        "velocities": velocities(one_step),
        "manifest": manifest(rounded, file),
        "bfloat16_inv_freq": rounded.paligemma_with_expert.gemma_expert.model.rotary_emb.inv_freq.float().tolist(),
        "normalised": numbers,
        "prompts": prompts(numbers["state"]),
        "pictures": {
            f"{h}x{w}": image_tools.resize_with_pad(cases.picture(h, w), cases.RESIZED, cases.RESIZED).tobytes().hex()
            for h, w in cases.PICTURES
        },
    }
    file.unlink()
    cases.ANSWERS.write_text(json.dumps(answers, separators=(",", ":")) + "\n")
    print(f"{cases.ANSWERS}: {cases.ANSWERS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
