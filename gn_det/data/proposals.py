"""Files of precomputed proposals, which Detectron2's data loading unpickles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode

from gn_det.checkpoint.download import is_address
from gn_det.checkpoint.unpickling import unpickle
from gn_det.errors import InputError
from gn_det.files import check_regular_file

__all__ = ["check_config_proposals", "check_proposals"]

# By both names of a key, Detectron2's and Detectron's.
_KEYS = {"ids": "indexes", "boxes": "boxes", "objectness_logits": "scores"}


def check_config_proposals(cfg: CfgNode, split: str, names: Sequence[str]) -> None:
    """:func:`check_proposals` of the files that a YAML config has for a split.

    Args:
        cfg: with MODEL.LOAD_PROPOSALS, without which Detectron2 reads none.
        split: "TRAIN" or "TEST".
        names: the data sets of the split, each of which needs a file.
    """
    if not cfg.MODEL.LOAD_PROPOSALS or not names:
        return
    files = cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
    if len(names) != len(files):
        raise InputError(
            f"MODEL.LOAD_PROPOSALS needs a file for each data set, and {list(names)} have "
            f"DATASETS.PROPOSAL_FILES_{split} {list(files)}"
        )
    check_proposals(files)


def check_proposals(files: Sequence[str]) -> None:
    """Read files of proposals in a way that runs nothing, before Detectron2 unpickles them.

    What :func:`gn_det.checkpoint.unpickling.unpickle` admits runs nothing in Detectron2, either.

    Args:
        files: pickled dicts of "ids", "boxes" (N, 4 each), "objectness_logits" (N each) and
            perhaps "bbox_mode" (XYXY_ABS is the default), or with Detectron's names for these.

    Raises:
        InputError: a file that is missing, that asks for anything but arrays and plain
            containers, or that has another form.
    """
    for file in files:
        if is_address(file):
            raise InputError(f"proposals {file}: download the file, and name the local copy")
        check_regular_file(file, "proposals")
        _check(Path(file), Path(file).stat().st_mtime_ns)


@cache  # data are checked before a run, and as its loaders are built
def _check(file: Path, _: int) -> None:
    fault = _fault(unpickle(file))
    if fault:
        raise InputError(f"{file} holds no proposals: {fault}")


def _fault(content: Any) -> str:
    """What is wrong with the form of proposals, or nothing."""
    if not isinstance(content, dict):
        return f"it is no dict, but {type(content).__name__}"
    lists = [content.get(key, content.get(other)) for key, other in _KEYS.items()]
    for names, values in zip(_KEYS.items(), lists, strict=True):
        if not isinstance(values, (list, np.ndarray)):
            return f"it needs a list {' or '.join(dict.fromkeys(names))}, and has {list(content)}"
    ids, boxes, scores = lists
    if not len(ids) == len(boxes) == len(scores):
        return f"{len(ids)} ids, {len(boxes)} arrays of boxes, {len(scores)} of scores"
    for image, its_boxes, its_scores in zip(ids, boxes, scores, strict=True):
        shapes = np.shape(its_boxes), np.shape(its_scores)
        if shapes != ((*shapes[1], 4), shapes[1][:1]):
            return f"image {image} has boxes {shapes[0]} and scores {shapes[1]}, not (N, 4), (N,)"
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if mode not in list(BoxMode):
        return f"bbox_mode is {mode!r}, none of {[int(m) for m in BoxMode]}"
    return ""
