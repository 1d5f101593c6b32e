"""How the values of a layer are distributed, over a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.analysis.feature_report import PERCENTILES
from gn_det.errors import InputError
from gn_det.utils import nearest

__all__ = ["FeatureDistribution", "feature_recorders", "features_file"]


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
        modules = dict(model.named_modules())
        if self._name not in modules:
            raise InputError(
                f"{type(model).__name__} has no module {self._name!r}"
                f"{nearest(self._name, [*modules])}"
            )
        self._module = modules[self._name]
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


def features_file(folder: Path, module: str, records: int) -> Path:
    """Where a run has what was recorded of a module; another module or number is another file."""
    return folder / f"features-{module}-{records}.json"


def feature_recorders(folder: Path, module: str, records: int) -> list[HookBase]:
    """The hook of a run that writes into its folder."""
    return [FeatureDistribution(features_file(folder, module, records), module, records)]
