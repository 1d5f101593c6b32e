"""The lines of gn_det/README.md#other-projects, on stand-ins for what these projects have."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from detectron2.config import CfgNode, LazyCall, get_cfg, instantiate
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    build_backbone,
    build_model,
)
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.utils.registry import Registry
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.registry import MODELS
from support.models import norms_by_site
from support.programs import ROOT
from torch import Tensor, nn

import gn_det
import gn_det.mmcv_plugin
import gn_det.modeling

PAGE = (ROOT / "gn_det/README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Other projects\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)[1]
LINES = {
    next(word for word in ("GN.BACKBONE", "ROI_MASK_HEAD", "MaskFormer", "LazyCall", "torchvision",
                           "timm", "InjectGN") if word in block): block
    for block in re.findall(r"^```python\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
}  # fmt: skip


def config() -> CfgNode:
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    return cfg


def fused_forms(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in gn_det.audit(model).rows:
        counts[row.form] = counts.get(row.form, 0) + len(row.modules)
    return counts


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts classes into a registry until the end of the test."""

    def register(registry: Registry, *added: object) -> None:
        known = registry._obj_map | {entry.__name__: entry for entry in added}
        monkeypatch.setattr(registry, "_obj_map", known)

    return register


def test_every_project_has_its_lines() -> None:
    assert len(LINES) == 7


def test_adelaidet(entries: Callable[..., None]) -> None:
    def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
        bottom_up = build_resnet_backbone(cfg, input_shape)
        top = LastLevelP6P7(256, 256, in_feature="p5")
        return FPN(bottom_up, ["res3", "res4", "res5"], 256, top_block=top)

    entries(BACKBONE_REGISTRY, build_fcos_resnet_fpn_backbone)
    cfg = config()
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"
    exec(LINES["GN.BACKBONE"], {"cfg": cfg})
    backbone = build_backbone(cfg)
    assert norms_by_site(backbone) == {"backbone": 53, "fpn": 6}
    assert fused_forms(backbone)["GN+ReLU"] == 33  # stem and the first two of each block
    assert sum(count for form, count in fused_forms(backbone).items() if "add" in form) >= 16
    assert backbone.top_block.p6.in_channels == 256


class SpatialAttentionMaskHead(nn.Module):
    """A list of convolutions, attention over the picture, a deconvolution and a predictor."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        super().__init__()
        norm = cfg.MODEL.ROI_MASK_HEAD.NORM
        self.conv_norm_relus = nn.ModuleList(
            Conv2d(
                64, 64, 3, padding=1, bias=not norm, norm=get_norm(norm, 64), activation=nn.ReLU()
            )
            for _ in range(4)
        )
        self.attention = Conv2d(2, 1, 3, padding=1)
        self.deconv = nn.ConvTranspose2d(64, 64, 2, stride=2)
        self.predictor = Conv2d(64, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.conv_norm_relus:
            x = layer(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        x = x * self.attention(pooled).sigmoid()
        return self.predictor(self.deconv(x).relu())


def test_centermask2() -> None:
    theirs = SimpleNamespace(
        ROI_MASK_HEAD_REGISTRY=Registry("THEIR_ROI_MASK_HEAD"),
        SpatialAttentionMaskHead=SpatialAttentionMaskHead,
    )
    cfg = config()
    exec(LINES["ROI_MASK_HEAD"], {"cfg": cfg, "gn_det": gn_det, "theirs": theirs})
    head = theirs.ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.ROI_MASK_HEAD.NAME)(
        cfg, ShapeSpec(channels=64, width=14, height=14)
    )
    norms = [module for module in head.modules() if isinstance(module, gn_det.FusedGroupNorm)]
    assert len(norms) >= 4 and all(layer.norm in norms for layer in head.conv_norm_relus)
    assert fused_forms(head)["GN+ReLU"] >= 4
    assert head.predictor.norm is None and head.attention.norm is None
    assert head(torch.rand(2, 64, 14, 14)).shape == (2, 3, 28, 28)


class MaskFormer(nn.Module):
    """A backbone and a pixel decoder that has GN."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.adapter = Conv2d(2048, 64, 1, bias=False, norm=get_norm("GN", 64))
        self.layer = Conv2d(
            64, 64, 3, padding=1, bias=False, norm=get_norm("GN", 64), activation=nn.ReLU()
        )
        self.mask_features = Conv2d(64, 64, 3, padding=1)


def test_mask2former(entries: Callable[..., None]) -> None:
    entries(META_ARCH_REGISTRY)
    cfg = config()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    names = {"META_ARCH_REGISTRY": META_ARCH_REGISTRY, "MaskFormer": MaskFormer}
    exec(LINES["MaskFormer"], {"cfg": cfg, "gn_det": gn_det, **names})
    model = build_model(cfg)
    assert isinstance(model, MaskFormer)
    assert gn_det.audit(model).num_norms == 55
    assert type(model.adapter.norm) is gn_det.FusedGroupNorm
    assert fused_forms(model)["GN+ReLU"] == 34
    assert model.mask_features.norm is None


class Transformer(nn.Module):
    """What a LazyConfig builds from a backbone that it builds."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.input_proj = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.GroupNorm(32, 64))


def test_detrex() -> None:
    backbone = LazyCall(torchvision.models.resnet18)(weights=None)
    model = LazyCall(Transformer)(backbone=backbone, channels=512)
    names = {"gn_det": gn_det, "LazyCall": LazyCall, "model": model}
    exec(LINES["LazyCall"], names)
    built = instantiate(names["model"])
    assert isinstance(built, Transformer)
    assert gn_det.audit(built).num_norms == 21


def test_torchvision() -> None:
    names = {"gn_det": gn_det, "torchvision": torchvision}
    exec(LINES["torchvision"], names)
    assert norms_by_site(names["model"]) == {"backbone": 53, "fpn": 8, "rpn": 1, "mask_head": 4}
    assert fused_forms(names["model"])["GN+ReLU"] >= 5


def test_timm() -> None:
    names = {"gn_det": gn_det, "timm": timm}
    exec(LINES["timm"], names)
    assert norms_by_site(names["model"]) == {"other": 53}


class MaskRCNN(nn.Module):
    """Stages with BN, a neck of mmcv's modules."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        bn = dict(type="BN")
        self.backbone = nn.Sequential(
            ConvModule(3, channels, 3, norm_cfg=bn), ConvModule(channels, channels, 3, norm_cfg=bn)
        )
        self.neck = ConvModule(channels, channels, 1, norm_cfg=bn, act_cfg=None)


def test_mmdetection() -> None:
    MODELS.register_module("MaskRCNN", module=MaskRCNN)
    try:
        lines = LINES["InjectGN"].replace('"mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"', "[]")
        child = Config.fromstring(lines, ".py")
        inherited = Config(dict(model=dict(type="MaskRCNN", channels=64)))
        inherited.merge_from_dict(child.to_dict())
        model = MODELS.build(inherited.model)
    finally:
        MODELS._module_dict.pop("MaskRCNN")
    assert type(model) is MaskRCNN
    assert gn_det.audit(model).num_norms == 3


class PoolingPyramid(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), Conv2d(channels, channels // 4, 1))
            for size in (1, 2)
        )
        self.bottleneck = Conv2d(channels + 2 * (channels // 4), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [
            nn.functional.interpolate(nn.functional.relu_(stage(x)), x.shape[2:])
            for stage in self.stages
        ]
        return nn.functional.relu_(self.bottleneck(torch.cat([*pooled, x], 1)))


class ContextEncoder(nn.Module):
    """A pyramid that neither its name nor that of its class tells of."""

    def __init__(self, channels: list[int], out: int) -> None:
        super().__init__()
        self.fpn_laterals = nn.ModuleList(Conv2d(c, out, 1) for c in channels)
        self.fpn_outputs = nn.ModuleList(Conv2d(out, out, 3, padding=1) for _ in channels)
        self.ppm = PoolingPyramid(out)
        self.fusion = nn.Conv2d(out * len(channels), out, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        features = [features[name] for name in ("res5", "res4", "res3")]
        above = self.ppm(self.fpn_laterals[0](features[0]))
        outputs = [self.fpn_outputs[0](above)]
        for x, lateral, output in zip(
            features[1:], self.fpn_laterals[1:], self.fpn_outputs[1:], strict=True
        ):
            above = lateral(x) + nn.functional.interpolate(above, scale_factor=2.0)
            outputs.insert(0, output(above))
        size = outputs[0].shape[2:]
        return self.fusion(torch.cat([nn.functional.interpolate(x, size) for x in outputs], 1))


class InstanceBranch(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inst_convs = nn.Sequential(
            *(
                layer
                for _ in range(2)
                for layer in (Conv2d(channels, channels, 3, padding=1), nn.ReLU(True))
            )
        )
        self.iam_conv = nn.Conv2d(channels, 10, 3, padding=1)
        self.cls_score = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inst_convs(x)
        weights = self.iam_conv(x).sigmoid().flatten(2)
        return self.cls_score(weights @ x.flatten(2).mT)


class SparseDetector(nn.Module):
    """A backbone, an encoder, and a decoder of two branches that have no heads' names."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        self.backbone = build_resnet_backbone(config(), ShapeSpec(channels=3))
        self.encoder = ContextEncoder([2048, 1024, 512], 64)
        self.decoder = nn.Module()
        self.decoder.add_module(branch, InstanceBranch(64))
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder.get_submodule(self.branch)(self.encoder(self.backbone(x)))


@pytest.mark.parametrize("branch", ["inst_branch", "cls_branch", "kernel_branch"])
def test_pyramids_and_branches_of_other_names(branch: str) -> None:
    torch.manual_seed(0)
    model = gn_det.inject(SparseDetector(branch))
    assert norms_by_site(model) == {"backbone": 53, "fpn": 7, "dense_head": 2}
    assert not any("ppm" in name and "norm" in name for name, _ in model.named_modules())
    assert not isinstance(model.decoder.get_submodule(branch).iam_conv, gn_det.FusedGroupNorm)
    left = {name: each.reason for each in gn_det.audit(model).left_alone for name in each.modules}
    assert "predictor" in left[f"decoder.{branch}.iam_conv"]
    assert "encoder.ppm.bottleneck" in left
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    assert torch.equal(gn_det.fuse(model)(x), expected)
    forms = fused_forms(model)
    assert (forms["GN+add"], forms["GN"]) == (2, 5)  # the laterals; the level of the start, outputs
