"""The README.md of an export: how to run it, what was measured, what does not carry over."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.families import FAMILIES
from ..compat import precision
from .configurations import steps_setting
from .proof import Difference

_HEAD = """\
---
library_name: {library}
pipeline_tag: robotics
tags: [robotics, {kind}, one-step]
---

# {network} in {steps} step{s}

A one-step policy (`{ours}`) folded into a plain {network}: its time MLP answers with what the average-velocity network
is conditioned on at {steps} step{s}. Run it with **exactly {steps} step{s}**: at any other number its actions are
useless.

| | |
| --- | --- |
| From | `{source}`, {weights} weights{adapter} |
| Made by | `lerobot_policy_ofp` {plugin}, `ofp-export --steps {steps}` |
"""

_PROOF = """
## Proof

The same noise through the `{ours}` policy at {steps} step{s} and through stock LeRobot {lerobot} (`{kind}`) with these
files, largest difference over the largest action, CPU:

| | difference | allowed |
| --- | --- | --- |
{rows}

"eager" and "sdpa" are the `{ours}` policy's two implementations of attention. "padded" leaves out the last camera and
half of the prompt, which stock code masks and so sums in another order.
"""

_LOST = """
## What does not carry over

- Other numbers of steps. Export again for 1, 2 or 4.
- Warm start, `sampler`, `test_time_samples`, `noise_temperature` and ten-step sampling: settings of `{ours}`.
- Training. This checkpoint is not a flow: fine-tune the `{ours}` checkpoint and export again.
- LeRobot's guided real-time chunking: it differentiates through a sampler of many steps.
- bfloat16 arithmetic rounds differently in every engine.
"""

_LEROBOT = """
## Run it

```bash
lerobot-eval --policy.path={path} --policy.{setting}={steps} {relative_flag}--policy.device=cuda --env.type=<env>
```

`config.json` says {steps} step{s} already; no flag is needed where none changes it. {dtype}{plugin}
{relative}"""

_DTYPE = {
    "float32": "It also says `dtype=float32`: with bfloat16 LeRobot would round the rotary frequencies, which these "
    "weights were not trained with, and the actions would be others.",
    "bfloat16": "It also says `dtype=bfloat16`: these weights were trained with rotary frequencies rounded to "
    "bfloat16, which LeRobot does in that precision only.",
}

_OPENPI = """
## Run it

openpi's `serve_policy.py` has no option for the number of steps. In openpi's repository, with its transformers patch in
place, this is the server:

```python
from openpi.policies import policy_config
from openpi.serving import websocket_policy_server
from openpi.training import config

policy = policy_config.create_trained_policy(
    config.get_config("<your train config>"), "{path}", sample_kwargs={{"num_steps": {steps}}}
)
{rotary}websocket_policy_server.WebsocketPolicyServer(policy=policy, host="0.0.0.0", port=8000).serve_forever()
```

The train config says:

```python
{facts}
```

{resizing}
"""

RELATIVE = (
    "the actions are relative to the state of their chunk, and LeRobot's stock policies add those that wait in the "
    "queue to newer states: run lerobot-eval with --policy.n_action_steps=1, or ofp-serve or ofp-compare"
)

OTHER_RESIZING = (
    "trained with LeRobot's resizing of images, which differs from openpi's unless they are 224 × 224 already"
)

ROTARY = """\
# openpi serves in bfloat16 and rounds the rotary frequencies too; these weights were trained without that rounding.
for module in policy._model.modules():
    if hasattr(module, "original_inv_freq"):
        module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
"""


class Origin(NamedTuple):
    """What was exported: the checkpoint as the user named it, "student" or "teacher" weights, the number of steps."""

    checkpoint: str
    weights: str
    steps: int
    adapter: bool
    kind: str = "pi05"  # LeRobot's type


def describe_lerobot(
    origin: Origin, config: Any, found: Sequence[Difference], *, needs_plugin: bool, relative: bool
) -> str:
    """config: the stock policy's; relative: whether its actions are relative to the state of their chunk."""
    plugin = (
        " Its processors have steps of `lerobot_policy_ofp`, which must be installed; the network is stock."
        if needs_plugin
        else " Nothing of `lerobot_policy_ofp` is needed."
    )
    run = _LEROBOT.format(
        path="<this directory>",
        dtype=_DTYPE[precision(config)] if hasattr(config, "dtype") and origin.kind != "smolvla" else "",
        plugin=plugin,
        setting=steps_setting(config),
        relative_flag="--policy.n_action_steps=1 " if relative else "",
        relative=f"\n{RELATIVE[0].upper()}{RELATIVE[1:]}.\n" if relative else "",
        **_plural(origin),
    )
    return _head(origin, "lerobot") + run + _proof(origin, found) + _LOST.format(**_plural(origin))


def describe_openpi(origin: Origin, facts: str, found: Sequence[Difference], *, rounded: bool, pillow: bool) -> str:
    """facts: `convert.train_config_facts`; rounded: whether the weights want rounded rotary frequencies.

    pillow: whether the policy had openpi's resizing of images.
    """
    rotary = "" if rounded else ROTARY
    resizing = "Send 224 × 224 images, or let openpi resize them." if pillow else f"It was {OTHER_RESIZING}."
    run = _OPENPI.format(path="<this directory>", facts=facts, rotary=rotary, resizing=resizing, **_plural(origin))
    return _head(origin, "openpi") + run + _proof(origin, found) + _LOST.format(**_plural(origin))


def _head(origin: Origin, library: str) -> str:
    path = Path(origin.checkpoint)
    return _HEAD.format(
        library=library,
        source=path.name if path.is_absolute() else origin.checkpoint,
        weights={"student": "student", "teacher": "moving-average"}[origin.weights],
        adapter=", adapter merged" if origin.adapter else "",
        plugin=version("lerobot_policy_ofp"),
        **_plural(origin),
    )


def _proof(origin: Origin, found: Sequence[Difference]) -> str:
    rows = "\n".join(f"| {d.what} | {d.relative:.1e} | {d.bound:.0e} |" for d in found)
    return _PROOF.format(rows=rows, lerobot=version("lerobot"), **_plural(origin))


def _plural(origin: Origin) -> dict[str, Any]:
    policy = FAMILIES[origin.kind].policy
    return {
        "steps": origin.steps,
        "s": "" if origin.steps == 1 else "s",
        "kind": origin.kind,
        "network": policy.network_name,
        "ours": policy.name,
    }
