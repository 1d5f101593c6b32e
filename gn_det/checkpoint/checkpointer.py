"""Detectron2's checkpointer, for which weights that do not fit are an error."""

from __future__ import annotations

import logging
import pickle
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer

from gn_det.checkpoint.weights_file import check_weights_exist
from gn_det.errors import InputError
from gn_det.layers import GNTower
from gn_det.utils import whole_file, write_atomically

__all__ = ["Checkpointer"]

# What Detectron2, torch and pickle raise on files that are none of theirs.
_UNREADABLE = (
    AttributeError,
    EOFError,
    ImportError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
# Layers whose shape follows the number of classes: fine-tuning starts them anew.
_CLASS_LAYERS = re.compile(r"predictor|cls_score|bbox_pred|score_lowres")


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that refuses weights of another model, and never spoils a checkpoint.

    A checkpoint is written beside its place and moved there when it is complete, then
    ``last_checkpoint`` names it: one that is there is whole, whatever ended the process.

    For inference (a checkpointer of the model alone) and for resuming, a file must have every
    tensor of the model and nothing else. For the start of a training
    (``load(path, checkpointables=[])``, as Detectron2 has it), what fits is taken, what did not
    come from the file is said, and a file is refused of which nothing fits or whose tensors have
    other shapes (but for the layers that follow the number of classes).

    Raises:
        InputError: from load, naming how many keys do not match and the first of them; from save,
            where the file cannot be written, or the weights are not finite.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        state = self.model.state_dict()
        broken = [
            key for key, value in state.items()
            if value.is_floating_point() and not value.isfinite().all()
        ]  # fmt: skip
        if broken:
            raise InputError(
                f"{name} is not saved, as {len(broken)} of {len(state)} tensors are not finite "
                f"({_first(broken)}); {self._last()}"
            )
        file = Path(self.save_dir) / f"{name}.pth"
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        self.logger.info(f"Saving checkpoint to {file}")
        try:
            with whole_file(file) as stream:
                torch.save({"model": state, **parts, **kwargs}, stream)
            write_atomically(file.with_name("last_checkpoint"), file.name)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(
                f"checkpoint {file} cannot be written ({reason}); {self._last()}"
            ) from error

    def _last(self) -> str:
        """What is left to go on from."""
        if not self.has_checkpoint():
            return "there is no checkpoint yet"
        return f"{self.get_checkpoint_file()} is as it was, and --resume goes on from it"

    def load(
        self, path: str, checkpointables: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        self._whole = checkpointables is None or not self.checkpointables
        if self._whole and not path:
            raise InputError("there are no weights to load: set MODEL.WEIGHTS")
        check_weights_exist(path)
        self._path = path
        return super().load(path, checkpointables, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            loaded = super()._load_file(filename)
        except _UNREADABLE as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(f"{filename} cannot be read as weights: {first}") from error
        model = loaded["model"]
        if not isinstance(model, dict) or not all(
            isinstance(value, (torch.Tensor, np.ndarray)) for value in model.values()
        ):
            found = _first(map(str, model)) if isinstance(model, dict) else type(model).__name__
            raise InputError(
                f"{filename} holds no weights under 'model' nor at its top, but {found}; save the "
                "model's state_dict alone"
            )
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        # Before Detectron2 drops what has another shape than the module that is there now.
        for name, module in self.model.named_modules():
            if isinstance(module, GNTower):
                module.remap(checkpoint["model"], f"{name}.")
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        unexpected = incompatible.unexpected_keys
        shapes = {
            key: f"{key} is {tuple(theirs)} in the file, {tuple(ours)} in the model"
            for key, theirs, ours in incompatible.incorrect_shapes
        }
        missing = [key for key in incompatible.missing_keys if key not in shapes]
        total = len(self.model.state_dict())
        fitting = total - len(missing) - len(shapes)
        misfits = {
            "missing": missing,
            "unknown to the model": unexpected,
            "of another shape": shapes.values(),
        }
        other_shape = [text for key, text in shapes.items() if not _CLASS_LAYERS.search(key)]
        if (self._whole and any(misfits.values())) or not fitting or other_shape:
            if not self._whole:
                misfits["of another shape"] = other_shape
            described = [
                f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in misfits.items() if keys
            ]
            raise InputError(f"{self._path} does not fit the model: {'; '.join(described)}")
        if any(misfits.values()):
            logging.getLogger(__name__).warning(
                f"{fitting} of {total} tensors come from {self._path}. "
                f"At their random start: {_by_part([*missing, *shapes])}. "
                f"Not used: {_by_part(unexpected)}."
            )


def _first(keys: Iterable[str], most: int = 3) -> str:
    keys = list(keys)
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def _by_part(keys: Iterable[str]) -> str:
    parts = Counter(".".join(key.split(".")[:2]) for key in set(keys))
    return ", ".join(f"{part} {count}" for part, count in sorted(parts.items())) or "none"
