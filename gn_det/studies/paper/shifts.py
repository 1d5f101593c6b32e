"""Shifted images, and what BN's two kinds of statistics make of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as T
from tqdm import tqdm

from gn_det.classification.networks import Classifier, stacked
from gn_det.plots.figures import new_figure, save_figure, set_log2_places
from gn_det.text import csv_text, table

__all__ = [
    "SHIFTS",
    "batch_statistics",
    "gap_csv",
    "gap_table",
    "plot_gap",
    "shifted_errors",
]

_AVERAGES = "running averages"


def _noise(images: Tensor, numbers: Sequence[int]) -> Tensor:
    generators = (torch.Generator().manual_seed(number) for number in numbers)
    return torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators])


# Of (N, 3, H, W) images with values from 0 to 255, and their numbers in the set.
SHIFTS: dict[str, Callable[[Tensor, Sequence[int]], Tensor]] = {
    "none": lambda x, numbers: x,
    "brightness": lambda x, numbers: x + 64,
    "contrast": lambda x, numbers: x.mean((1, 2, 3), keepdim=True) * 0.5 + x * 0.5,
    "blur": lambda x, numbers: T.gaussian_blur(x, 3, 1.0),
    "noise": lambda x, numbers: x + 40 * _noise(x, numbers),
}

# By shift, and batch size; None for BN's running averages. None where BN is undefined.
Errors = dict[tuple[str, "int | None"], "float | None"]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let the BN layers of a model normalize by their batch, and keep their running averages."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.train(training)
            norm.momentum = momentum


@torch.no_grad()
def shifted_errors(classifier: Classifier, images: Dataset, batch_sizes: Sequence[int]) -> Errors:
    """Error of a classifier on shifted images, by BN's running averages and by its batches.

    Args:
        classifier: put into eval mode.
        images: held out; they are shuffled, the same way each time, and a last batch that is not
            full is filled up with images before it, which count once.
        batch_sizes: of the evaluation.

    Returns:
        Percentage by (shift, batch size), and (shift, None) by running averages; None where BN is
        undefined, on single values.
    """
    classifier.eval()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    errors: Errors = {}
    for batch_size in tqdm([None, *batch_sizes], desc="evaluations", unit="evaluation"):
        with nullcontext() if batch_size is None else batch_statistics(classifier):
            for shift, error in _errors(classifier, images, order, batch_size or 32).items():
                errors[shift, batch_size] = error
    return {(shift, n): errors[shift, n] for shift in SHIFTS for n in (None, *batch_sizes)}


def _errors(
    classifier: Classifier, images: Dataset, order: Sequence[int], batch_size: int
) -> dict[str, float | None]:
    """Percentage by shift."""
    starts = range(0, len(order), batch_size)
    batches = [order[max(0, min(s, len(order) - batch_size)) :][:batch_size] for s in starts]
    wrong: Counter[str] = Counter()
    loader = DataLoader(images, batch_sampler=batches, collate_fn=list)
    for start, numbers, samples in zip(starts, batches, loader, strict=True):
        batch, labels = stacked(samples)
        new = min(batch_size, len(order) - start)
        for shift, change in SHIFTS.items():
            try:
                scores = classifier.scores(change(batch, numbers).clamp(0, 255))
            except ValueError as error:
                if "more than 1 value per channel" in str(error):
                    return dict.fromkeys(SHIFTS)
                raise
            wrong[shift] += (scores.argmax(1).cpu() != labels)[-new:].sum().item()
    return {shift: 100 * wrong[shift] / len(order) for shift in SHIFTS}


def gap_csv(errors: Mapping[str, Errors]) -> str:
    """A line for each model, shift, kind of statistics and batch size."""
    return csv_text(
        ["model", "shift", "statistics", "batch_size", "error"],
        [
            [name, shift, _AVERAGES if n is None else "batch statistics", n, error]
            for name, by in errors.items()
            for (shift, n), error in by.items()
        ],
    )


def gap_table(errors: Mapping[str, Errors]) -> str:
    """A row for each model and shift: error by running averages, then by batches of each size."""
    sizes = list(dict.fromkeys(n for by in errors.values() for _, n in by))
    rows = [
        [name, shift, *(_cell(by[shift, n]) for n in sizes)]
        for name, by in errors.items()
        for shift in SHIFTS
    ]
    headers = ["", "shift", *(_AVERAGES if n is None else f"batches of {n}" for n in sizes)]
    return table(rows, headers, tablefmt="github", disable_numparse=True)


def plot_gap(errors: Mapping[str, Errors], png: Path) -> None:
    """A panel for each shift: error against the batch size, dashed by running averages.

    Models without BN have no dashed line.
    """
    figure = new_figure(3.2 * len(SHIFTS), 3.6)
    grid = figure.subplots(1, len(SHIFTS), sharey=True)
    for axes, shift in zip(grid, SHIFTS, strict=True):
        for number, (name, by) in enumerate(errors.items()):
            sees_the_batch = any(by[s, n] not in (None, by[s, None]) for s, n in by)
            color = f"C{number}"
            sizes = [n for s, n in by if s == shift and n is not None]
            known = [n for n in sizes if by[shift, n] is not None]
            axes.plot(known, [by[shift, n] for n in known], "o-", label=name, color=color)
            if sees_the_batch:
                label = f"{name}, {_AVERAGES}"
                axes.axhline(by[shift, None], linestyle="--", label=label, color=color)
        set_log2_places(axes, sizes)
        axes.set(xlabel="batch size", title="no shift" if shift == "none" else shift)
        axes.grid(alpha=0.3)
    grid[0].set(ylabel="error (%)")
    grid[-1].legend(fontsize=7)
    save_figure(figure, png)


def _cell(error: float | None) -> str:
    return "undefined" if error is None else f"{error:.1f}"
