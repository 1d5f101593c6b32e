"""Seeding by what is computed, so that it can be computed again."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["seed_generators"]


def seed_generators(*numbers: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, of all devices, from some numbers.

    Args:
        numbers: non-negative; others, of as many, give unrelated seeds.
    """
    python, numpy, torch_low, torch_high = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(int(python))
    np.random.seed(numpy)
    torch.manual_seed(int(torch_high) << 32 | int(torch_low))
