"""Detectron2's resizing, of which a picture that is long and thin keeps a pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T

__all__ = ["ResizeShortestEdge", "for_thin_pictures"]


class ResizeShortestEdge(T.ResizeShortestEdge):
    """T.ResizeShortestEdge with at least one pixel on each side.

    Where max_size is less than half the ratio of the sides, Detectron2's asks for none, which ends
    in an error of Pillow.
    """

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


def for_thin_pictures(augmentations: Sequence[T.Augmentation]) -> list[T.Augmentation]:
    """The same augmentations, with :class:`ResizeShortestEdge` for Detectron2's."""
    return [
        ResizeShortestEdge(a.short_edge_length, a.max_size, a.sample_style, a.interp)
        if type(a) is T.ResizeShortestEdge
        else a
        for a in augmentations
    ]
