"""Subclasses of Detectron2's modules. Importing this package alone does not import Detectron2."""

from __future__ import annotations

import sys
from types import ModuleType

__all__ = ["loaded_blocks"]


def loaded_blocks() -> ModuleType | None:
    """:mod:`gn_det.layers.detectron2.blocks` in a process that has loaded Detectron2, else None.

    A model can hold Detectron2's modules only after someone has imported their classes.
    """
    if "detectron2.layers" not in sys.modules:
        return None
    from gn_det.layers.detectron2 import blocks

    return blocks
