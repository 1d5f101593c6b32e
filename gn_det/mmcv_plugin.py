"""FusedGroupNorm for mmcv and mmengine: importing this registers it in MODELS as FusedGN.

``norm_cfg=dict(type="FusedGN", num_groups=32, requires_grad=True)`` then works wherever a config
takes a norm_cfg; num_groups may be left out (:func:`gn_det.default_num_groups`). Parameters have
the names of mmcv's GN, so weights of GN models load. With ``activation="relu"`` the layer applies
the ReLU, and the ConvModule takes ``act_cfg=None``.
"""

from __future__ import annotations

from mmengine.registry import MODELS

from gn_det.errors import InputError
from gn_det.layers import FusedGroupNorm

__all__ = ["FusedGroupNorm"]

_NAME = "FusedGN"

if _NAME in MODELS:
    raise InputError(
        f"{_NAME} is in mmengine's MODELS registry already, from {MODELS.get(_NAME).__module__}; "
        "gn_det registers itself once, and so may no other package take the name"
    )
MODELS.register_module(_NAME, module=FusedGroupNorm)
