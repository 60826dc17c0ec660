"""What LeRobot's model card does not say of a checkpoint of ours."""

from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCard

_SECTION = """
## One-step {network}

{method}{warm}

| | |
| --- | --- |
| Objective | `{objective}` |
| Evaluations per chunk | {steps} (`num_inference_steps`, sampler `{sampler}`){samples}{temperature} |
| Chunk, executed | {chunk}, {executed} |
| Base model | {base} |
| lerobot | {lerobot} |
| lerobot_policy_ofp | {plugin} |

```bash
pip install lerobot_policy_ofp
# one evaluation per chunk, and {network}'s ten-step sampler with the same weights
lerobot-eval --policy.path={repo} --env.type=<env> --eval.n_episodes=50
lerobot-eval --policy.path={repo} --env.type=<env> --eval.n_episodes=50 \\
  --policy.sampler=euler --policy.num_inference_steps=10
```
"""


_METHOD = {
    "flow_matching": "Trained with plain flow matching, as {network} is, in the code of `lerobot_policy_ofp`.",
    "ofp": "Trained with the [One-Step Flow Policy](https://arxiv.org/abs/2603.12480) method: the action expert\n"
    "predicts the average velocity over an interval, which lets one or two network evaluations answer.",
}


def describe(card: ModelCard, config: Any, network: str) -> ModelCard:
    """Adds base model, evaluations per chunk, versions and commands to LeRobot's card. network: its name."""
    if config.base_model:
        card.data["base_model"] = config.base_model
    method = _METHOD.get(config.objective, f"Trained with the objective `{config.objective}`.")
    section = _SECTION.format(
        network=network,
        steps=config.num_inference_steps,
        samples=f", of the densest of {config.test_time_samples} samples" if config.test_time_samples > 1 else "",
        temperature=f", noise times {config.noise_temperature:g}" if config.noise_temperature != 1 else "",
        method=method.format(network=network),
        warm=f" Chunks start from {config.warm_start:.0%} of the previous plan." if config.warm_start else "",
        objective=config.objective,
        sampler=config.sampler,
        chunk=config.chunk_size,
        executed=config.n_action_steps,
        base=f"[{config.base_model}](https://huggingface.co/{config.base_model})" if config.base_model else "none",
        lerobot=version("lerobot"),
        plugin=version("lerobot_policy_ofp"),
        repo=config.repo_id,
    )
    card.text = card.text.rstrip() + "\n" + section
    return card
