"""What a comparison measures: the outcome of a run, and the cost of a recipe's steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gn_det.engine.evaluation import ap_of
from gn_det.plots.curves import read_metrics
from gn_det.studies.comparison.matrix import Run

__all__ = [
    "TASKS",
    "Cost",
    "RunResult",
    "metrics_of",
    "pairs_of",
    "recipes_of",
    "result_of",
    "results_of",
]


TASKS = {"bbox/AP": "box AP", "segm/AP": "mask AP"}


@dataclass(frozen=True)
class RunResult:
    """What a run reached.

    Attributes:
        recipe, ims_per_gpu, seed: which run.
        ims_per_step: images of a step.
        failure: why it did not finish; empty where it did.
        curves: by metric, its values by the images seen; the last AP is that of the run.
    """

    recipe: str
    ims_per_gpu: int
    seed: int
    ims_per_step: int
    failure: str = ""
    curves: dict[str, dict[int, float]] = field(default_factory=dict)

    def ap(self, metric: str) -> float | None:
        """The last value of bbox/AP or segm/AP; None for a run that did not finish."""
        curve = self.curves.get(metric)
        if not curve or self.failure:
            return None
        return ap_of(curve[max(curve)])

    @property
    def mean_ap(self) -> float | None:
        """The mean of box and mask AP, or the one that there is; None for an unfinished run."""
        values = [value for task in TASKS if (value := self.ap(task)) is not None]
        return statistics.mean(values) if values else None


@dataclass(frozen=True)
class Cost:
    """What a training step of a recipe costs, per image.

    Attributes:
        recipe, ims_per_gpu: which.
        activation_mb: MiB kept for the backward pass.
        seconds: of a forward and backward pass.
    """

    recipe: str
    ims_per_gpu: int
    activation_mb: float
    seconds: float


def result_of(run: Run, failure: str) -> RunResult:
    """What a run has left in metrics.json, by the images that it had seen."""
    step = run.cfg.SOLVER.IMS_PER_BATCH * run.cfg.SOLVER.ACCUMULATE_STEPS
    curves = {}
    if (run.folder / "metrics.json").exists():
        metrics = read_metrics(run.folder / "metrics.json")
        for name in ("bbox/AP", "segm/AP", "total_loss"):
            if name in metrics:
                curves[name] = {
                    min(iteration + 1, run.cfg.SOLVER.MAX_ITER) * step: value
                    for iteration, value in sorted(metrics[name].items())
                }
    return RunResult(run.recipe, run.ims_per_gpu, run.seed, step, failure, curves)


def metrics_of(results: Sequence[RunResult]) -> list[str]:
    """Which of TASKS were evaluated; box AP where no run was."""
    return [m for m in TASKS if any(m in result.curves for result in results)] or ["bbox/AP"]


def recipes_of(results: Sequence[RunResult]) -> list[str]:
    """The recipes, in their order."""
    return list(dict.fromkeys(result.recipe for result in results))


def pairs_of(results: Iterable[RunResult]) -> list[tuple[str, int]]:
    """Each recipe with each number of images per GPU that it was trained with, in their order."""
    return list(dict.fromkeys((result.recipe, result.ims_per_gpu) for result in results))


def results_of(results: Sequence[RunResult], recipe: str, ims_per_gpu: int) -> list[RunResult]:
    """The runs of one such pair, one for each seed."""
    return [
        result for result in results if (result.recipe, result.ims_per_gpu) == (recipe, ims_per_gpu)
    ]
