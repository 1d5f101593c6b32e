"""The memory of a training step of a config, counted without a GPU and without data.

The model runs on fake CUDA tensors. Only what depends on data has a stand-in: the batch, the RPN's
proposals, and the regions that are cut out for the heads, which get tensors of the training batch's
size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, ResNet, RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.solver import build_optimizer
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gn_det.amp import amp_dtype
from gn_det.config import get_config
from gn_det.engine.activation_memory import ELSEWHERE, autocast, kept_for_backward
from gn_det.errors import InputError
from gn_det.injection import unfuse
from gn_det.modeling.with_gn import gn_options_from_config, with_gn

__all__ = [
    "DETECTRON2_GN",
    "FROZEN_BN",
    "GN_DET",
    "RECOMPUTE",
    "RESNET",
    "VARIANTS",
    "StepMemory",
    "build_variant",
    "count_step",
    "measure_step",
    "memory_rows",
    "parts_of",
    "synthetic_step",
]

RESNET = ("stem", "res2", "res3", "res4", "res5")

VARIANTS = ("frozen BN", "Detectron2's GN", "gn_det", "gn_det, RECOMPUTE")
FROZEN_BN, DETECTRON2_GN, GN_DET, RECOMPUTE = VARIANTS

_SUPPORTED = (
    "GeneralizedRCNN with RPN and StandardROIHeads, CascadeROIHeads or Res5ROIHeads (their GN "
    "forms too), and RetinaNet"
)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step, each by part of the model.

    Attributes:
        parameters: and buffers.
        gradients: of the parameters that train.
        momentum: SGD's state.
        activations: kept for the backward pass.
        images: the batch in float32.
    """

    parameters: dict[str, int]
    gradients: dict[str, int]
    momentum: dict[str, int]
    activations: dict[str, int]
    images: int

    @property
    def fixed(self) -> int:
        """What does not depend on the images."""
        kinds = (self.parameters, self.gradients, self.momentum)
        return sum(sum(kind.values()) for kind in kinds)

    @property
    def resnet(self) -> int:
        """Activations of the ResNet."""
        return sum(self.activations.get(part, 0) for part in RESNET)

    @property
    def kept(self) -> int:
        """Activations of all parts."""
        return sum(self.activations.values())

    @property
    def total(self) -> int:
        """The sum of all parts, an upper bound: gradients take the place of activations."""
        return self.fixed + self.kept + self.images


def count_step(
    cfg: CfgNode, variant: str, num_images: int, image_size: tuple[int, int]
) -> StepMemory:
    """Count a training step on one GPU.

    What is not in the count: CUDA's context, workspace of convolutions, gradients of activations,
    what losses, proposals and sampling keep, and fragmentation.

    Args:
        cfg: of :func:`gn_det.config.load_config`. Its norms do not matter, nor gn_det's
            components: the model is built without and then made the variant. SOLVER.AMP.ENABLED
            and MODEL.CHANNELS_LAST count.
        variant: of VARIANTS; GN stands at MODEL.GN.SITES.
        num_images: in the batch.
        image_size: (height, width), before padding.

    Raises:
        InputError: the model is of a kind whose step is not known here.
    """
    with FakeTensorMode(), torch.device("cuda"), autocast(cfg.SOLVER.AMP.ENABLED):
        model = build_variant(cfg, variant)
        step, parts = synthetic_step(model, num_images, image_size)
        activations = kept_for_backward(step, parts, model.parameters())
    trained = _num_bytes([p for p in model.parameters() if p.requires_grad], parts)
    return StepMemory(
        parameters=_num_bytes([*model.parameters(), *model.buffers()], parts),
        gradients=trained,
        momentum=trained if cfg.SOLVER.MOMENTUM else {},
        activations=activations,
        images=model.preprocess_image(()).tensor.nbytes,
    )


def memory_rows(num_images: int) -> list[dict[str, Any]]:
    """What Mask R-CNN R-50-FPN with 4conv1fc heads keeps in mixed precision, in MiB.

    A row for each FREEZE_AT, 0 and 2, and variant: the ResNet and the whole model, and both as a
    share of frozen BN.
    """
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_amp_1x.yaml")
    rows = []
    for freeze_at in (0, 2):
        cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
        steps = {v: count_step(cfg, v, num_images, (800, 1333)) for v in VARIANTS}
        frozen = steps[FROZEN_BN]
        rows += [
            {
                "FREEZE_AT": freeze_at,
                "norm": variant,
                "ResNet": round(memory.resnet / 2**20),
                "whole": round(memory.kept / 2**20),
                "ResNet, of frozen BN": f"{100 * memory.resnet / frozen.resnet:.1f}%",
                "whole, of frozen BN": f"{100 * memory.kept / frozen.kept:.1f}%",
            }
            for variant, memory in steps.items()
        ]
    return rows


def measure_step(
    cfg: CfgNode,
    variant: str,
    num_images: int,
    image_size: tuple[int, int],
    device: str = "cuda",
) -> tuple[int, int]:
    """Run the step of :func:`count_step` on the GPU, with its optimizer.

    Returns:
        Bytes that PyTorch's allocator holds for activations after the forward pass, and the most
        that it held at all, the weights included.
    """
    dtype = amp_dtype(cfg.SOLVER.AMP.ENABLED)
    with torch.device(device):
        model = build_variant(cfg, variant)
        step, _ = synthetic_step(model, num_images, image_size)
        optimizer = build_optimizer(cfg, model)
        for _ in range(2):  # the momentum is there from the second on
            optimizer.zero_grad()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = sum(step().values())
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
            optimizer.step()
    return kept, torch.cuda.max_memory_allocated()


def build_variant(cfg: CfgNode, variant: str) -> nn.Module:
    """The model of a config with frozen BN or GN, on the device that is the default one.

    Args:
        cfg, variant: see :func:`count_step`.

    Raises:
        InputError: there is nothing to normalize at MODEL.GN.SITES.
    """
    cfg = _without_gn(cfg)
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg).train()
    if variant != FROZEN_BN:
        options = gn_options_from_config(cfg) | {"recompute": variant == RECOMPUTE}
        with_gn(model, cfg.MODEL.GN.SITES, **options)
    if variant == DETECTRON2_GN:
        unfuse(model)
    if cfg.MODEL.CHANNELS_LAST:
        for parameter in model.parameters():
            if parameter.dim() == 4:  # model.to() refuses fake tensors
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def synthetic_step(
    model: nn.Module, num_images: int, image_size: tuple[int, int]
) -> tuple[Callable[[], dict[str, Tensor]], dict[str, nn.Module]]:
    """A model's forward pass in training that needs no data, with the shapes of one that has.

    Args:
        model: its parts whose shapes depend on data are replaced, in place.
        num_images: in the batch.
        image_size: (height, width), before padding.

    Returns:
        The pass, and the parts of the model by name, for :func:`kept_for_backward`.

    Raises:
        InputError: the model is of another kind than those that are known here.
    """
    if type(model) is RetinaNet:
        model.forward_training = lambda images, features, predictions, truth: _losses(predictions)
    elif type(model) is GeneralizedRCNN and isinstance(model.proposal_generator, RPN):
        model.proposal_generator = _Proposals(model.proposal_generator)
        model.roi_heads = _RegionHeads(model.roi_heads, num_images)
    else:
        raise _not_supported(type(model).__name__)
    multiple = max(1, model.backbone.size_divisibility)
    padded = [math.ceil(side / multiple) * multiple for side in image_size]
    pixels = torch.zeros((num_images, 3, *padded), device=model.device)
    images = ImageList(pixels, [image_size] * num_images)
    model.preprocess_image = lambda batch: images
    batch = [{"instances": Instances(image_size)} for _ in range(num_images)]
    return lambda: model(batch), parts_of(model)


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a detector by name: of the ResNet, FPN, RPN and heads, as far as it has them."""
    parts = {}
    backbone = getattr(model, "backbone", None)
    resnet = getattr(backbone, "bottom_up", backbone)
    if resnet is not backbone:
        parts["FPN"] = backbone
    if isinstance(resnet, ResNet):
        parts |= {name: getattr(resnet, name) for name in ("stem", *resnet.stage_names)}
    elif resnet is not None:
        parts["backbone"] = resnet
    heads = getattr(model, "roi_heads", None)
    found = {
        "dense head": getattr(model, "head", None),
        "RPN": getattr(model, "proposal_generator", None),
        **getattr(heads, "branches", {"RoI heads": heads}),
    }
    return parts | {name: module for name, module in found.items() if module is not None}


class _Proposals(nn.Module):
    """RPN that predicts, and proposes nothing."""

    def __init__(self, rpn: RPN) -> None:
        super().__init__()
        self.rpn = rpn

    def forward(self, images: Any, features: dict[str, Tensor], truth: Any) -> tuple[None, dict]:
        return None, _losses(self.rpn.rpn_head([features[f] for f in self.rpn.in_features]))


class _RegionHeads(nn.Module):
    """RoI heads on as many regions as the training batch has, without cutting them out."""

    def __init__(self, heads: nn.Module, num_images: int) -> None:
        super().__init__()
        self.in_feature = heads.in_features[0] if hasattr(heads, "in_features") else None
        regions = num_images * getattr(heads, "batch_size_per_image", 0)
        positive = int(regions * getattr(heads, "positive_fraction", 0))
        self.branches = nn.ModuleDict()
        if type(heads) is Res5ROIHeads:
            self.branches["RoI heads"] = _Branch(_Res5(heads, positive), regions, heads.pooler)
        elif type(heads) in (StandardROIHeads, CascadeROIHeads):
            cascade = isinstance(heads, CascadeROIHeads)
            stages = zip(
                heads.box_head if cascade else [heads.box_head],
                heads.box_predictor if cascade else [heads.box_predictor],
                strict=True,
            )
            for number, (head, predictor) in enumerate(stages, 1):
                name = f"box head {number}" if cascade else "box head"
                layers = nn.Sequential(head, predictor)
                self.branches[name] = _Branch(layers, regions, heads.box_pooler)
            for task, on in (("mask", heads.mask_on), ("keypoint", heads.keypoint_on)):
                if on:
                    head, pooler = (getattr(heads, f"{task}_{part}") for part in ("head", "pooler"))
                    head.forward = head.layers  # without the loss
                    self.branches[f"{task} head"] = _Branch(head, positive, pooler)
        else:
            raise _not_supported(type(heads).__name__)

    def forward(
        self, images: Any, features: dict[str, Tensor], proposals: Any, truth: Any
    ) -> tuple[list, dict[str, Tensor]]:
        feature = features[self.in_feature]
        losses = {}
        for name, branch in self.branches.items():
            losses |= {f"{name} {key}": loss for key, loss in branch(feature).items()}
        return [], losses


class _Branch(nn.Module):
    """A head, and the regions that it gets."""

    def __init__(self, layers: nn.Module, num_regions: int, pooler: nn.Module | None) -> None:
        super().__init__()
        self.layers = layers
        self.num_regions = num_regions
        self.size = pooler.output_size if pooler is not None else None

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        shape = (self.num_regions, feature.size(1), *self.size)
        return _losses(self.layers(feature.new_zeros(shape).requires_grad_()))


class _Res5(nn.Module):
    """The head of C4 models: res5, whose result boxes and masks share."""

    def __init__(self, heads: Res5ROIHeads, positive: int) -> None:
        super().__init__()
        self.heads = heads
        self.positive = positive
        if heads.mask_on:
            heads.mask_head.forward = heads.mask_head.layers  # without the loss

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.heads.res5(x)
        predictions = [self.heads.box_predictor(x.mean(dim=[2, 3]))]
        if self.heads.mask_on:
            chosen = torch.arange(self.positive, device=x.device)
            predictions.append(self.heads.mask_head(x[chosen]))
        return predictions


def _losses(predictions: Any) -> dict[str, Tensor]:
    """A loss of each prediction, which keeps nothing."""
    return {f"loss {i}": tensor.mean() for i, tensor in enumerate(tree_leaves(predictions))}


def _not_supported(kind: str) -> InputError:
    return InputError(f"the training step of {kind} is not known here; known are {_SUPPORTED}")


def _without_gn(cfg: CfgNode) -> CfgNode:
    """The config with Detectron2's components in place of gn_det's, frozen BN, no other norm."""
    cfg = cfg.clone()
    cfg.defrost()
    model = cfg.MODEL
    for node, key in (
        (model, "META_ARCHITECTURE"),
        (model.BACKBONE, "NAME"),
        (model.RPN, "HEAD_NAME"),
        (model.ROI_BOX_HEAD, "NAME"),
        (model.ROI_MASK_HEAD, "NAME"),
        (model.ROI_KEYPOINT_HEAD, "NAME"),
    ):
        node[key] = node[key].removeprefix("GN").replace("build_gn_", "build_")
    model.RESNETS.NORM = model.TIMM.NORM = "FrozenBN"
    model.TIMM.WEIGHTS = ""  # values do not matter, and files need not be there
    model.GN.HAND_OVER_STEPS = 0
    for node in (model.FPN, model.ROI_BOX_HEAD, model.ROI_MASK_HEAD, model.RETINANET):
        node.NORM = ""
    return cfg


def _num_bytes(tensors: Sequence[Tensor], parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes of parameters and buffers by the innermost part that has them."""
    part_of = {}
    for name, part in sorted(parts.items(), key=lambda item: -len([*item[1].modules()])):
        part_of |= dict.fromkeys((*part.parameters(), *part.buffers()), name)
    found: Counter[str] = Counter()
    for tensor in tensors:
        found[part_of.get(tensor, ELSEWHERE)] += tensor.nbytes
    return dict(found)
