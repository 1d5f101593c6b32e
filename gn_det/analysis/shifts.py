"""Shifted pictures, and what BN's two kinds of statistics make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset
from torchvision.transforms import functional as T
from tqdm import tqdm

from gn_det.analysis.figures import csv_text, new_figure
from gn_det.modeling.classifiers import Classifier

__all__ = [
    "MODES",
    "SHIFTS",
    "batch_statistics",
    "gap_csv",
    "gap_table",
    "plot_gap",
    "shifted_errors",
]

# Of (N, 3, H, W) pictures with values from 0 to 255.
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "brightness": lambda x: x + 64,
    "contrast": lambda x: x.mean((1, 2, 3), keepdim=True) * 0.5 + x * 0.5,
    "blur": lambda x: T.gaussian_blur(x, 3, 1.0),
    "noise": lambda x: x + 40 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
}
MODES = ("running averages", "batch statistics")

Errors = Mapping[tuple[str, str, int], "float | None"]  # by shift, mode and batch size


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let the BN layers of a model normalise by their batch, and keep their running averages."""
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
def shifted_errors(
    classifier: Classifier, pictures: Dataset, batch_sizes: Sequence[int]
) -> dict[tuple[str, str, int], float | None]:
    """Error of a classifier on shifted pictures, by BN's running averages and by its batches.

    Args:
        classifier: put into eval mode.
        pictures: held out; in batches they are shuffled, the same way each time.
        batch_sizes: of the evaluation.

    Returns:
        Percentage by (shift, mode, batch size); None where BN is undefined, on single values.
    """
    classifier.eval()
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [pictures[i] for i in tqdm(order, desc="pictures", unit="picture", delay=2)]
    images = torch.stack([sample["image"] for sample in samples])
    labels = torch.tensor([sample["label"] for sample in samples])
    errors: dict[tuple[str, str, int], float | None] = {}
    cells = [(shift, mode, n) for shift in SHIFTS for mode in MODES for n in batch_sizes]
    for shift, mode, batch_size in tqdm(cells, desc="evaluations", unit="evaluation"):
        shifted = SHIFTS[shift](images).clamp(0, 255)
        try:
            predicted = [_classes(classifier, batch, mode) for batch in shifted.split(batch_size)]
        except ValueError:  # BN's, of one value for each channel
            errors[shift, mode, batch_size] = None
            continue
        wrong = torch.cat(predicted) != labels
        errors[shift, mode, batch_size] = 100 * wrong.float().mean().item()
    return errors


def _classes(classifier: Classifier, pictures: Tensor, mode: str) -> Tensor:
    if mode == "running averages":
        return classifier.scores(pictures).argmax(1).cpu()
    with batch_statistics(classifier):
        return classifier.scores(pictures).argmax(1).cpu()


def gap_csv(errors: Mapping[str, Errors]) -> str:
    """A line for each model, shift, kind of statistics and batch size."""
    return csv_text(
        ["model", "shift", "statistics", "batch_size", "error"],
        [[name, *key, error] for name, by in errors.items() for key, error in by.items()],
    )


def gap_table(errors: Mapping[str, Errors], tablefmt: str = "github") -> str:
    """A row for each model and shift: error by running averages, then by batches of each size.

    Running averages give the same at every batch size; one column has them.
    """
    sizes = list(dict.fromkeys(n for by in errors.values() for _, _, n in by))
    averages, batches = MODES
    rows = [
        [name, shift, _cell(by[shift, averages, sizes[0]])]
        + [_cell(by[shift, batches, n]) for n in sizes]
        for name, by in errors.items()
        for shift in dict.fromkeys(shift for shift, _, _ in by)
    ]
    headers = ["", "shift", averages, *(f"batches of {n}" for n in sizes)]
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def plot_gap(errors: Mapping[str, Errors], png: Path) -> None:
    """A panel for each shift: error against the batch size, dashed by running averages."""
    shifts = list(dict.fromkeys(shift for by in errors.values() for shift, _, _ in by))
    sizes = list(dict.fromkeys(n for by in errors.values() for _, _, n in by))
    averages, batches = MODES
    figure = new_figure(3.2 * len(shifts), 3.6)
    grid = figure.subplots(1, len(shifts), sharey=True, squeeze=False)[0]
    for axes, shift in zip(grid, shifts, strict=True):
        for number, (name, by) in enumerate(errors.items()):
            for mode, style in ((batches, "o-"), (averages, "--")):
                points = [(n, by[shift, mode, n]) for n in sizes if by[shift, mode, n] is not None]
                label = f"{name}, {mode}"
                axes.plot(*zip(*points, strict=True), style, label=label, color=f"C{number}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes], minor=False)
        axes.minorticks_off()
        axes.set(xlabel="batch size", title="no shift" if shift == "none" else shift)
        axes.grid(alpha=0.3)
    grid[0].set(ylabel="error (%)")
    grid[-1].legend(fontsize=7)
    figure.savefig(png, dpi=110)


def _cell(error: float | None) -> str:
    return "undefined" if error is None else f"{error:.1f}"
