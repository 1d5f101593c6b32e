"""FusedGroupNorm for mmcv, mmengine and mmdetection: importing this registers two names in MODELS.

``FusedGN`` is a norm: ``norm_cfg=dict(type="FusedGN", num_groups=32, requires_grad=True)`` works
wherever a config takes a norm_cfg; num_groups may be left out (:func:`gn_det.default_num_groups`).
Parameters have the names of mmcv's GN, so weights of GN models load.

``InjectGN`` is a model: it builds another one, puts GN into it and fuses it with the additions and
ReLUs that follow (:func:`inject_gn`)::

    _base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    custom_imports = dict(imports=["gn_det.mmcv_plugin"], allow_failed_imports=False)
    model = dict(type="InjectGN", model="MaskRCNN", sites=["default", "rpn"])

Importing ``gn_det.mmcv_plugin.as_gn`` as well makes mmcv's own name, GN, the same as FusedGN.
"""

from __future__ import annotations

from mmengine.registry import MODELS

from gn_det.errors import InputError
from gn_det.layers import FusedGroupNorm as FusedGN
from gn_det.mmcv_plugin.exact_boxes import use_exact_boxes
from gn_det.mmcv_plugin.inject_gn import inject_gn

__all__ = ["FusedGN", "inject_gn", "use_exact_boxes"]

_ENTRIES = {"FusedGN": FusedGN, "InjectGN": inject_gn}

for _name in _ENTRIES:
    if _name in MODELS:
        raise InputError(
            f"{_name} is in mmengine's MODELS registry already, from "
            f"{MODELS.get(_name).__module__}; gn_det registers itself once, and so may no other "
            "package take the name"
        )
for _name, _entry in _ENTRIES.items():
    MODELS.register_module(_name, module=_entry)
