"""How the values of a layer are distributed over a training: records, table and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.errors import InputError
from gn_det.plots.figures import new_figure, save_figure
from gn_det.text import csv_text, nearest

__all__ = [
    "PERCENTILES",
    "FeatureDistribution",
    "feature_recorders",
    "features_csv",
    "features_file",
    "find_module",
    "plot_features",
    "read_features",
]

PERCENTILES = (1, 20, 80, 99)  # Wu & He 2018, figure 6

Features = Mapping[int, Mapping[int, float]]  # value by iteration, by percentile


class FeatureDistribution(HookBase):
    """Writes percentiles of a module's output on training batches, a line of JSON for each record.

    The module is hooked in the steps that are recorded only, so what gn_det has fused runs fused in
    the others. Evaluations are not recorded.

    Args:
        file: to append to; where a resumed run went over an iteration again, its last line counts.
        module: name of a part of the model whose output is a tensor.
        records: how many there are over the training, evenly spaced.

    Raises:
        InputError: in training, where the model has no such part, or its output is no tensor.
    """

    def __init__(self, file: Path, module: str, records: int = 100) -> None:
        self._file = file
        self._name = module
        self._records = records
        self._outputs: list[Any] = []

    def before_train(self) -> None:
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
        self._module = find_module(model, self._name)
        self._period = max(1, self.trainer.max_iter // self._records)

    def before_step(self) -> None:
        if self.trainer.iter % self._period == 0:
            self._handle = self._module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            # A copy, since Detectron2's blocks add to it and apply ReLU in place.
            tensor = isinstance(output, torch.Tensor)
            self._outputs.append(output.detach().clone() if tensor else output)

    def after_step(self) -> None:
        if self.trainer.iter % self._period:
            return
        self._handle.remove()
        outputs, self._outputs = self._outputs, []
        if not outputs or not all(isinstance(output, torch.Tensor) for output in outputs):
            kinds = ", ".join(type(output).__name__ for output in outputs) or "nothing"
            raise InputError(f"{self._name} gave {kinds}, not a tensor; name a part of it")
        values = np.concatenate([o.float().cpu().numpy().ravel() for o in outputs])
        if not len(values):  # heads of detectors may have nothing to look at
            return
        record = dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True))
        with open(self._file, "a") as file:
            file.write(json.dumps({"iteration": self.trainer.iter, **record}) + "\n")


def find_module(model: nn.Module, name: str) -> nn.Module:
    """A part of a model by its name; InputError with the nearest name where there is none."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise InputError(
            f"{type(model).__name__} has no module {name!r}{nearest(name, [*modules])}"
        )
    return modules[name]


def features_file(folder: Path, module: str, records: int) -> Path:
    """Where a run has what was recorded of a module; another module or number is another file."""
    return folder / f"features-{module}-{records}.json"


def feature_recorders(folder: Path, module: str, records: int) -> list[HookBase]:
    """The hook of a run that writes into its folder."""
    return [FeatureDistribution(features_file(folder, module, records), module, records)]


def read_features(file: Path) -> Features:
    """What :class:`FeatureDistribution` wrote.

    Raises:
        InputError: it wrote nothing there.
    """
    features: dict[int, dict[int, float]] = {percentile: {} for percentile in PERCENTILES}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for percentile in PERCENTILES:
                features[percentile][record["iteration"]] = record[str(percentile)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} has no features of a layer; remove {file.parent} to train it anew"
        ) from error
    return {percentile: dict(sorted(values.items())) for percentile, values in features.items()}


def features_csv(features: Mapping[str, Features]) -> str:
    """A line for each run and iteration."""
    return csv_text(
        ["run", "iteration", *(f"p{percentile}" for percentile in PERCENTILES)],
        [
            [name, iteration, *(values[percentile][iteration] for percentile in PERCENTILES)]
            for name, values in features.items()
            for iteration in values[PERCENTILES[0]]
        ],
    )


def plot_features(features: Mapping[str, Features], title: str, png: Path) -> None:
    """A panel for each run, a line for each percentile.

    Args:
        features: by the name of the run.
        title: of the layer.
        png: where to.
    """
    figure = new_figure(4 * len(features), 3.6)
    grid = figure.subplots(1, len(features), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(grid, features.items(), strict=True):
        for percentile in reversed(PERCENTILES):
            axes.plot(*zip(*values[percentile].items(), strict=True), label=f"{percentile}%")
        # Without a norm the first steps may leave all that follows no room.
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel="iteration", title=name)
        axes.grid(alpha=0.3)
    grid[0].set(ylabel=f"values of {title}")
    grid[-1].legend(fontsize=8)
    save_figure(figure, png)
