"""nn.Modules over gn_det.ops."""

from .group_norm import FusedGroupNorm, default_num_groups

__all__ = ["FusedGroupNorm", "default_num_groups"]
