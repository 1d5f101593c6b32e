"""Names of timm's models."""

from __future__ import annotations

import pytest

from gn_det import InputError
from gn_det.config import load_config
from gn_det.modeling import TimmBackbone


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5o", "did you mean resnet50"),
        ("tf_eficientnet_lite0", "did you mean tf_efficientnet_lite0"),
        ("resnet18.a1_in1", "did you mean resnet18.a1_in1k"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(None, ["MODEL.TIMM.NAME", name])
    with pytest.raises(InputError, match=message):
        TimmBackbone(name)
