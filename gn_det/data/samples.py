"""What a classification set holds, as a detection set holds Detectron2's dicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["sample"]


def sample(picture: np.ndarray, label: int, file_name: str) -> dict[str, Any]:
    """A sample of a classification set.

    Args:
        picture: (H, W, 3) BGR with values from 0 to 255.
        label: index of its class.
        file_name: where the picture is from, named in errors.

    Returns:
        ``image``, a (3, H, W) float32 tensor, ``label`` and ``file_name``.
    """
    image = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float()
    return {"image": image, "label": label, "file_name": file_name}
