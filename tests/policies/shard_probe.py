"""Run by torchrun on two processes: some training steps under DDP, the same under FSDP2, and what each ended with."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ofp_lerobot.flow_map.ema import whole
from tests import small
from tests.kinds import KINDS

STEPS = 3


def train(name: str = "ofp", *, sharded: bool, bfloat16: bool = False, **settings):
    torch.manual_seed(0)
    policy = KINDS[name].policy(branch=0.5, **settings)
    module = policy
    if sharded:
        kind = torch.bfloat16 if bfloat16 else None
        # As accelerate makes it of --accelerator.mixed_precision=bf16.
        precision = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=kind, output_dtype=kind)
        for unit in policy.modules():
            if type(unit).__name__ in policy._fsdp_wrap_modules:
                fully_shard(unit, mp_policy=precision)
        fully_shard(policy, mp_policy=precision)
    else:
        module = DistributedDataParallel(policy, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        policy.train()
        loss, _ = module(small.batch(seed=10 * step + dist.get_rank()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.update()
        losses.append(loss.item())
    return {
        "losses": losses,
        "weights": {name: whole(p.detach()) for name, p in policy.named_parameters() if p.requires_grad},
        "teacher": policy.teacher_weights,
        "shares": {name: p.to_local().shape for name, p in policy.named_parameters()} if sharded else {},
    }


def refusal(name: str, **settings) -> str:
    policy = KINDS[name].policy(**settings)
    fully_shard(policy)
    try:
        policy.train()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "ddp": train(sharded=False),
        "fsdp2": train(sharded=True),
        "checkpointed": train(sharded=True, gradient_checkpointing=True),
        "bfloat16": train(sharded=True, bfloat16=True),
        "refusal": refusal("ofp", dtype="bfloat16"),
        "pi0, ddp": train("ofp_pi0", sharded=False),
        "pi0, fsdp2": train("ofp_pi0", sharded=True),
        "smolvla, refusal": refusal("ofp_smolvla"),
    }
    torch.save(found, f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
