"""Importing this makes GN of a config, or of a head's default, a FusedGroupNorm.

As in ``custom_imports = dict(imports=["gn_det.mmcv_plugin.as_gn"], allow_failed_imports=False)``.
"""

from __future__ import annotations

import mmcv.cnn  # noqa: F401 (it registers its own GN, and no later)
from mmengine.registry import MODELS

from gn_det.mmcv_plugin import FusedGN

MODELS.register_module("GN", module=FusedGN, force=True)
