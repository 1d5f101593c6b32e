"""Detectron2's checkpointer, for which weights that do not fit are an error."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from gn_det.checkpoint.reading import read_weights
from gn_det.checkpoint.weights_file import find_weights
from gn_det.errors import InputError
from gn_det.files import whole_file, write_atomically
from gn_det.layers import FusedGroupNorm, GNTower
from gn_det.layers.hand_over import HandOver, hand_overs
from gn_det.text import reason_of, shortened

__all__ = ["Checkpointer", "checkpoints_of", "last_checkpoint"]

_CHECKPOINT = re.compile(r"model_(\d+|final)\.pth")
# Layers whose shape follows the number of classes: fine-tuning starts them anew.
_CLASS_LAYERS = re.compile(r"predictor|cls_score|bbox_pred|score_lowres")

_FOLDED_BN = re.compile(r"_bn_[bs]$")


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run: numbers in their order, then the final one."""
    try:
        names = os.listdir(folder)
    except OSError:  # it is not there, or may not be read
        return []
    return [folder / name for name in sorted(names) if _CHECKPOINT.fullmatch(name)]


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; None where it has none.

    ``last_checkpoint`` names it. Where that is missing, it is the one of the most iterations: each
    is whole. A final one has fewer where the run was made longer after it.

    Raises:
        InputError: ``last_checkpoint`` names no file of that folder.
    """
    file = folder / "last_checkpoint"
    checkpoints = checkpoints_of(folder)
    try:
        name = file.read_text(encoding="utf-8").strip()
        problem = f"names {name[:200]!a}, which is no file of that folder"
    except FileNotFoundError:
        if len(checkpoints) > 1:
            return max(reversed(checkpoints), key=_iteration)
        return checkpoints[0] if checkpoints else None
    except (OSError, UnicodeDecodeError) as error:
        name, problem = "", f"cannot be read ({reason_of(error)})"
    if not name or name != os.path.basename(name) or not (folder / name).is_file():
        there = shortened((path.name for path in reversed(checkpoints)), 5) or "none is there"
        raise InputError(
            f"{file} {problem}; write the name of one of its checkpoints there: {there}"
        )
    return folder / name


def _iteration(checkpoint: Path) -> int:
    number = _CHECKPOINT.fullmatch(checkpoint.name)[1]
    if number != "final":
        return int(number)
    try:
        return int(read_weights(checkpoint)["iteration"])
    except (InputError, LookupError, TypeError, ValueError):  # it is damaged, or none of a run
        return -1


class Checkpointer(DetectionCheckpointer):
    """DetectionCheckpointer that refuses weights of another model, and never spoils a checkpoint.

    A checkpoint is written beside its place and moved there when it is complete, then
    ``last_checkpoint`` names it: one that is there is whole, whatever ended the process.

    For inference (a checkpointer of the model alone) and for resuming, a file must have every
    tensor of the model and nothing else. For the start of a training
    (``load(path, checkpointables=[])``, as Detectron2 has it), what fits is taken, what did not
    come from the file is said, and a file is refused of which nothing fits or whose tensors have
    other shapes (but for the layers that follow the number of classes). Files are read by
    :func:`gn_det.checkpoint.reading.read_weights`, so nothing in them runs, and where one is
    refused the model stays as it was.

    Raises:
        InputError: from load, naming what a file asked for beside tensors, or how many keys do not
            match and the first of them; from save, where the file cannot be written, or the weights
            are not finite.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        state = self.model.state_dict()
        broken = [
            key for key, value in state.items()
            if isinstance(value, Tensor) and value.is_floating_point()
            and not value.isfinite().all()
        ]  # fmt: skip
        if broken:
            raise InputError(
                f"{name} is not saved, as {len(broken)} of {len(state)} tensors are not finite "
                f"({shortened(broken, 3)}); {self._last()}"
            )
        file = Path(self.save_dir) / f"{name}.pth"
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        self.logger.info(f"Saving checkpoint to {file}")
        try:
            with whole_file(file) as stream:
                torch.save({"model": state, **parts, **kwargs}, stream)
            write_atomically(file.with_name("last_checkpoint"), file.name)
        except InputError as error:
            raise InputError(f"{error}; {self._last()}") from error

    def _last(self) -> str:
        """What is left to go on from."""
        try:
            file = self.get_checkpoint_file()
        except InputError as error:
            return str(error)
        if not file:
            return "there is no checkpoint yet"
        return f"{file} is as it was, and a resumed run starts from it"

    def get_checkpoint_file(self) -> str:
        """The file in this folder that ``last_checkpoint`` names; empty where there is none.

        Raises:
            InputError: see :func:`last_checkpoint`.
        """
        file = last_checkpoint(Path(self.save_dir)) if self.save_dir else None
        return str(file or "")

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def load(
        self, path: str, checkpointables: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        self._whole = checkpointables is None or not self.checkpointables
        if self._whole and not path:
            raise InputError("there are no weights to load: set MODEL.WEIGHTS")
        self._path = path
        if path:
            file, self._matching_heuristics = find_weights(path)
            path = str(file)
        try:
            with _as_it_was_on_failure(self.model):
                return super().load(path, checkpointables, **kwargs)
        except InputError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if self.checkpointables and self._whole:
                raise InputError(
                    f"{path}: the state of the training in it cannot be used ({reason_of(error)})"
                ) from error
            raise
        finally:
            self._parsed_url_during_load = None  # which Detectron2 leaves after a failure

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = read_weights(filename)
        absent = [key for key in self.checkpointables if key not in loaded] if self._whole else []
        if absent:
            raise InputError(
                f"{filename} is no checkpoint of a training, as it has no {', '.join(absent)}; "
                "to start from its weights, name it in MODEL.WEIGHTS (train.init_checkpoint for a "
                "LazyConfig) of a new run"
            )
        if self._whole and not self.checkpointables and _hands_over(loaded):
            self.logger.warning(
                f"{filename} is from the middle of a hand-over: it is evaluated as GN, which its "
                "norms were in part. Take a checkpoint from after MODEL.GN.HAND_OVER_STEPS"
            )
        if self._matching_heuristics:
            loaded["matching_heuristics"] = True
        # FAIR's files have BN as a scale and a shift, which GN takes without a trace.
        self._has_folded_bn = any(_FOLDED_BN.search(key) for key in loaded["model"])
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        # Before Detectron2 drops what has another shape than the module that is there now.
        for name, module in self.model.named_modules():
            if isinstance(module, GNTower):
                module.remap(checkpoint["model"], f"{name}.")
        try:
            return super()._load_model(checkpoint)
        except (AssertionError, RuntimeError, ValueError) as error:  # of names that are ambiguous
            raise InputError(
                f"{self._path} does not fit the model: {' '.join(str(error).split())}"
            ) from error

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
                f"{len(keys)} {kind} ({shortened(keys, 3)})"
                for kind, keys in misfits.items()
                if keys
            ]
            advice = (
                ". The file has other classes than the model: take the config.yaml of its run, or "
                "name its --train as well"
                if shapes and not (other_shape or missing or unexpected)
                else ""
            )
            raise InputError(f"{self._path} does not fit the model: {'; '.join(described)}{advice}")
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        random = sorted(frozen.intersection([*missing, *shapes]))
        if random:
            raise InputError(
                f"{self._path} lacks {len(random)} tensors that do not train "
                f"({shortened(random, 3)}), which would stay at their random start: name weights "
                "that hold them, or set MODEL.BACKBONE.FREEZE_AT to 0 (freeze_at of the ResNet for "
                "a LazyConfig)"
            )
        for _, norm in hand_overs(self.model):
            norm.is_of_gn = norm.lacks_statistics and not self._has_folded_bn
        self._say_where_gn_took_bn(incompatible)
        if any(misfits.values()):
            logging.getLogger(__name__).warning(
                f"{fitting} of {total} tensors come from {self._path}. "
                f"At their random start: {_by_part([*missing, *shapes])}. "
                f"Not used: {_by_part(unexpected)}."
            )

    def _say_where_gn_took_bn(self, incompatible: Any) -> None:
        """Warn of GN layers that took γ and β of BN, whose statistics they do not have."""
        lost = {
            key.removesuffix(".running_mean")
            for key in incompatible.unexpected_keys
            if key.endswith(".running_mean")
        }
        missing = set(incompatible.missing_keys)
        took = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.GroupNorm)
            and not isinstance(module, HandOver)
            and f"{name}.weight" not in missing
            and (self._has_folded_bn or any(f".{name}".endswith(f".{each}") for each in lost))
        ]
        for module in took:
            if isinstance(module, FusedGroupNorm):
                module.mark_values_of_bn()
        if took:
            frozen = sum(not p.requires_grad for module in took for p in module.parameters()) // 2
            also = f", and {frozen} of them are frozen" if frozen else ""
            logging.getLogger(__name__).warning(
                f"{len(took)} GN layers took γ and β of BN from {self._path}, without its "
                f"statistics{also}. Name weights with GN, hand over "
                "(MODEL.GN.HAND_OVER_STEPS), or convert a trained model "
                "(tools/convert_bn_to_gn.py); if you go on, set MODEL.BACKBONE.FREEZE_AT to 0"
            )


def _hands_over(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint has the state of a hand-over that had not ended."""
    trainer = checkpoint.get("trainer")
    hooks = trainer.get("hooks", {}) if isinstance(trainer, dict) else {}
    return any(isinstance(state, dict) and state.get("bn") for state in hooks.values())


@contextmanager
def _as_it_was_on_failure(model: nn.Module) -> Iterator[None]:
    """Give a model its state back where loading fails.

    What fits cannot be told before: modules fill in keys of their own while they load.
    """
    before = {
        key: value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in model.state_dict().items()
    }
    try:
        yield
    except BaseException:
        model.load_state_dict(before)
        raise


def _by_part(keys: Iterable[str]) -> str:
    parts = Counter(".".join(key.split(".")[:2]) for key in set(keys))
    return ", ".join(f"{part} {count}" for part, count in sorted(parts.items())) or "none"
