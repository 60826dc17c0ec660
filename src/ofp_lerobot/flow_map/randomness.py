"""Randomness that is a function of (seed, step, rank) alone.

LeRobot gives all ranks one seed and does not restore the noise of an interrupted step; a generator that is
seeded anew from these numbers differs between ranks and makes a resumed run draw what an uninterrupted one would.
"""

import torch

_MASK = (1 << 64) - 1


def fold_in(seed: int, *data: int) -> int:
    """Mixes integers into a seed: SplitMix64 (Steele, Lea, Flood 2014) applied once per integer. Returns [0, 2^63)."""
    state = seed & _MASK
    for value in (0, *data):
        state = (state + (value & _MASK) * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def folded_generator(device: torch.device | str, seed: int, *data: int) -> torch.Generator:
    """A generator on `device`, seeded by fold_in(seed, *data)."""
    generator = torch.Generator(device=device)
    generator.manual_seed(fold_in(seed, *data))
    return generator
