"""Results of a comparison of two recipes at 1 and 2 images, some of which did not finish."""

from __future__ import annotations

from gn_det.studies.comparison.results import Cost, RunResult


def reached(recipe: str, ims_per_gpu: int, seed: int, ap: float, failure: str = "") -> RunResult:
    curves = {"segm/AP": {10: ap / 2, 20: ap}, "total_loss": {10: 2.0, 20: 1.0}}
    return RunResult(recipe, ims_per_gpu, seed, ims_per_gpu, failure, curves)


RESULTS = [
    reached("bn", 1, 0, 2.0), reached("bn", 1, 1, 4.0), reached("bn", 2, 0, 8.0, "NaN"),
    reached("bn", 2, 1, 9.0), reached("gn", 1, 0, 30.0), reached("gn", 1, 1, 32.0),
    reached("gn", 2, 0, 0.0, "NaN"), reached("gn", 2, 1, 0.0, "disk full"),
]  # fmt: skip
COSTS = [Cost("bn", 1, 10.0, 0.25), Cost("bn", 2, 9.0, 0.2), Cost("gn", 1, 20.0, 0.5)]
