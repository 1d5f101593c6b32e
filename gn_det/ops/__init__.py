"""Pure functions on tensors: validate, dispatch, compute."""

from .backend import check_torch

check_torch()

from .group_norm import group_norm  # noqa: E402

__all__ = ["group_norm"]
