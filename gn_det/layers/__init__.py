"""nn.Modules over gn_det.ops. Those for Detectron2's blocks are in detectron2_blocks.py."""

from .conv_norm import FusedReLU, give_norm
from .group_norm import FusedGroupNorm, FusedGroupNormAct, default_num_groups
from .tower import GNTower, insert_norm

__all__ = [
    "FusedGroupNorm",
    "FusedGroupNormAct",
    "FusedReLU",
    "GNTower",
    "default_num_groups",
    "give_norm",
    "insert_norm",
]
