"""What tests of models share: their norms, and what they compute."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import timm
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from torch import Tensor, nn

from gn_det import audit
from gn_det.injection.audit import Audit

_audits: dict[str, Audit] = {}


def audited(cfg: CfgNode) -> Audit:
    """The audit of a config's model, which is built once for all configs that describe it."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.WEIGHTS = "meta", "", ""
    key = cfg.MODEL.dump()
    if key not in _audits:
        with torch.device("meta"):
            _audits[key] = audit(build_model(cfg))
    return _audits[key]


def small_fpn(fuse_type: str = "sum") -> FPN:
    """An FPN with BN, of four levels of 32 channels, on four residual blocks."""
    channels = [64, 64, 96, 128, 160]
    stages = [
        ResNet.make_stage(
            BasicBlock, 1, in_channels=channels[i], out_channels=channels[i + 1],
            stride_per_block=[min(i + 1, 2)], norm="BN",
        )
        for i in range(4)
    ]  # fmt: skip
    levels = ["res2", "res3", "res4", "res5"]
    resnet = ResNet(BasicStem(norm="BN"), stages, out_features=levels)
    return FPN(resnet, levels, 32, norm="", fuse_type=fuse_type)


def norms_by_site(model: nn.Module) -> dict[str, int]:
    """How many GN layers a model has at each site."""
    found: Counter[str] = Counter()
    for row in audit(model).rows:
        found[row.site] += len(row.modules)
    return dict(found)


def randomized(module: nn.Module) -> nn.Module:
    """With γ and β that show when they are mixed up."""
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module


def computed(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and all gradients."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    ys = list(y.values()) if isinstance(y, dict) else [y]
    sum(y.square().sum() for y in ys).backward()
    return [*ys, x.grad, *(p.grad for p in module.parameters())]


def lite0_weights(file: Path) -> Path:
    """The file, with weights of timm's EfficientNet-Lite0 that stand in for ImageNet's."""
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):  # as of BN that was trained
            tensor.normal_(0, 0.01)
    torch.save(state, file)
    return file
