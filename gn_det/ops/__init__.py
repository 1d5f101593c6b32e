"""group_norm as a pure function on tensors: its checks, its implementations, its reference."""

from gn_det.ops.backend import check_torch

check_torch()

from gn_det.ops.group_norm import group_norm  # noqa: E402

__all__ = ["group_norm"]
