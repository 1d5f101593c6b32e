"""Random numbers that can be drawn again."""

from __future__ import annotations

import random

import numpy as np
import torch

from gn_det.data.seeding import seed_generators


def drawn(*numbers: int) -> tuple[float, float, float]:
    seed_generators(*numbers)
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_numbers_draw_the_same_from_every_generator() -> None:
    assert drawn(1, 2, 3) == drawn(1, 2, 3)


def test_every_other_number_draws_something_else() -> None:
    draws = [drawn(*numbers) for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for values in zip(*draws, strict=True):
        assert len(set(values)) == len(draws)
