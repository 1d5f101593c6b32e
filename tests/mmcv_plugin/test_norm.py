"""FusedGN from mmengine's registry, in mmcv's layers and in configs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, is_norm
from mmengine.registry import MODELS
from support.programs import ROOT
from torch import nn

import gn_det.mmcv_plugin
from gn_det import FusedGroupNorm, InputError, audit, inject


def test_build_norm_layer_gives_our_layer_under_mmcvs_name() -> None:
    name, layer = build_norm_layer(dict(type="FusedGN", num_groups=16), 256, postfix=1)
    assert name == "gn1" and type(layer) is FusedGroupNorm
    assert (layer.num_channels, layer.num_groups, layer.eps) == (256, 16, 1e-5)
    assert is_norm(layer)


def test_without_num_groups_ours_are_taken_where_mmcvs_gn_fails() -> None:
    assert build_norm_layer(dict(type="FusedGN"), 48)[1].num_groups == 24
    with pytest.raises(AssertionError):
        build_norm_layer(dict(type="GN"), 48)


def test_requires_grad_is_heeded() -> None:
    _, layer = build_norm_layer(dict(type="FusedGN", requires_grad=False), 32)
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_conv_module_computes_and_loads_as_with_mmcvs_gn() -> None:
    def module(kind: str) -> ConvModule:
        return ConvModule(3, 64, 3, norm_cfg=dict(type=kind, num_groups=32, requires_grad=True))

    ours, theirs = module("FusedGN"), module("GN")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.conv.bias is None
    assert torch.equal(ours.norm.weight, torch.ones(64)) and not ours.norm.bias.any()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 8, 9)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["FusedGN", FusedGroupNorm], ids=["name", "class"])
@pytest.mark.parametrize("act_cfg", [None, dict(type="ReLU")])
def test_an_activation_of_the_norm_is_refused(kind: str | type, act_cfg: dict | None) -> None:
    norm_cfg = dict(type=kind, activation="relu")
    with pytest.raises(InputError, match=r"activation='relu' has no place in a norm_cfg: .*fuse"):
        ConvModule(3, 64, 3, norm_cfg=norm_cfg, act_cfg=act_cfg)
    with pytest.raises(InputError, match="has no place"):
        build_norm_layer(norm_cfg, 64)
    assert build_norm_layer(dict(type=kind, activation=None), 64)[1].activation is None


def test_one_import_makes_gn_of_configs_and_defaults_ours() -> None:
    code = (
        "import gn_det.mmcv_plugin.as_gn\n"
        "from mmcv.cnn import ConvModule, build_norm_layer\n"
        "class Head(ConvModule):\n"
        "    def __init__(self, norm_cfg=dict(type='GN', num_groups=8, requires_grad=True)):\n"
        "        super().__init__(3, 16, 3, norm_cfg=norm_cfg)\n"
        "name, layer = build_norm_layer(dict(type='GN', num_groups=4), 32, postfix=2)\n"
        "print(name, type(layer).__name__, layer.num_groups, *Head().state_dict())\n"
        "print(type(Head().norm).__name__, Head().norm.num_groups)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "gn2 FusedGroupNorm 4 conv.weight gn.weight gn.bias",
        "FusedGroupNorm 8",
    ], done.stderr


def test_a_config_file_brings_the_plugin_by_custom_imports(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(
        'custom_imports = dict(imports=["gn_det.mmcv_plugin"], allow_failed_imports=False)\n'
        'norm_cfg = dict(type="FusedGN", num_groups=32, requires_grad=True)\n'
        'model = dict(type="ConvModule", in_channels=3, out_channels=64, kernel_size=1,\n'
        "             norm_cfg=norm_cfg)\n"
    )
    code = (
        "import mmcv.cnn\n"
        "from mmengine.config import Config\n"
        "from mmengine.registry import MODELS\n"
        "cfg = Config.fromfile('config.py')\n"
        "print(type(MODELS.build(cfg.model).norm).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "FusedGroupNorm", done.stderr


def test_convolutions_of_mmcv_that_standardize_their_weight_are_known() -> None:
    def model() -> nn.Module:
        ws = dict(type="ConvWS")
        return nn.Sequential(
            ConvModule(3, 64, 3, conv_cfg=ws, norm_cfg=dict(type="BN")),
            ConvModule(64, 64, 3, norm_cfg=dict(type="BN")),
        )

    only = nn.Sequential(model()[0])
    inject(only, weight_standardization=True)  # it does already, so there is nothing to refuse
    assert [row.form for row in audit(only).rows] == ["WS+GN"]

    both = inject(model(), weight_standardization=True)
    assert [(row.form, len(row.modules)) for row in audit(both).rows] == [("WS+GN", 2)]
    assert audit(both).left_alone == ()
    assert type(both[0].conv).__name__ == "ConvWS2d"


def test_a_name_that_is_taken_is_told() -> None:
    assert MODELS.get("FusedGN") is gn_det.mmcv_plugin.FusedGN
    with pytest.raises(InputError, match=r"FusedGN is in mmengine's MODELS registry already"):
        importlib.reload(gn_det.mmcv_plugin)
