"""nn.Modules that call gn_det.ops: the norm, and convolutions and blocks that end in norms."""

from gn_det.layers.conv_norm import FusedReLU, give_norm
from gn_det.layers.group_norm import FusedGroupNorm, FusedGroupNormAct
from gn_det.layers.groups import Groups, default_num_groups
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
]
