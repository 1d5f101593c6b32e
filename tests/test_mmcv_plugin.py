"""FusedGN from mmengine's registry, in mmcv's layers and in configs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, is_norm
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from support.programs import ROOT
from torch import nn

import gn_det.mmcv_plugin
from gn_det import FusedGroupNorm, InputError, audit, fuse, inject

EXAMPLE = ROOT / "configs/mmdet/mask-rcnn_r50_fpn_gn_2x_coco.py"


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


def test_the_activation_can_be_the_norms() -> None:
    fused = ConvModule(3, 64, 3, norm_cfg=dict(type="FusedGN", activation="relu"), act_cfg=None)
    plain = ConvModule(3, 64, 3, norm_cfg=dict(type="FusedGN"))
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 9)
    torch.testing.assert_close(fused(x), plain(x))


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


def example() -> Config:
    """The example without its base configs, which are mmdetection's."""
    text = EXAMPLE.read_text()
    own = text[: text.index("_base_")] + text[text.index("custom_imports") :]
    return Config.fromstring(own, ".py")


def test_the_example_builds_every_norm_that_it_names() -> None:
    model = example().model
    roi_head = model.roi_head
    for part in (model.backbone, model.neck, roi_head.bbox_head, roi_head.mask_head):
        assert type(build_norm_layer(part.norm_cfg, 256)[1]) is FusedGroupNorm


def test_the_examples_optimizer_does_not_decay_gamma_and_beta() -> None:
    model = nn.Sequential(ConvModule(3, 64, 1, norm_cfg=dict(type="FusedGN")))
    sgd = dict(type="SGD", lr=0.1, weight_decay=1e-4)
    wrapper = build_optim_wrapper(model, dict(optimizer=sgd, **example().optim_wrapper))
    decays = {
        parameter: group["weight_decay"]
        for group in wrapper.param_groups
        for parameter in group["params"]
    }
    assert [decays[p] for p in model.parameters()] == [1e-4, 0.0, 0.0]


def test_inject_and_fuse_take_mmcvs_modules() -> None:
    model = nn.Sequential(ConvModule(3, 64, 3, norm_cfg=dict(type="BN")))
    inject(model)
    assert type(model[0].norm) is FusedGroupNorm and list(model.state_dict())[1] == "0.bn.weight"
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    assert audit(fuse(model)).num_norms == 1
    torch.testing.assert_close(model(x), expected)


def test_a_name_that_is_taken_is_told() -> None:
    assert MODELS.get("FusedGN") is FusedGroupNorm
    with pytest.raises(InputError, match=r"FusedGN is in mmengine's MODELS registry already"):
        importlib.reload(gn_det.mmcv_plugin)
