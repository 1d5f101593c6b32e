"""nn.Modules over gn_det.ops. Those for Detectron2's blocks are in the package detectron2."""

from gn_det.layers.conv_norm import FusedReLU, give_norm
from gn_det.layers.group_norm import FusedGroupNorm, FusedGroupNormAct
from gn_det.layers.groups import Groups, default_num_groups, num_groups_of
from gn_det.layers.tower import GNTower, insert_norm
from gn_det.layers.weight_standardization import WeightStandardized

__all__ = [
    "FusedGroupNorm",
    "FusedGroupNormAct",
    "FusedReLU",
    "GNTower",
    "Groups",
    "WeightStandardized",
    "default_num_groups",
    "give_norm",
    "insert_norm",
    "num_groups_of",
]
