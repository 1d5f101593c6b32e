"""Detectron2's convolution, deformable block and FPN, ending in fused group_norm calls.

They are those whose forward torch.fx cannot record; see gn_det.injection.rewrite for all others.
Each is a subclass with the same modules and another forward; :func:`gn_det.fuse` gives a built
module the class in place, and :func:`gn_det.unfuse` takes it back. All their norms are
FusedGroupNorm. Where hooks watch the parts of a block, or one was given another forward or norm
since, Detectron2's own forward runs: a hook sees what it saw before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Optional

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock
from torch import Tensor, nn

from gn_det.layers.group_norm import FusedGroupNorm
from gn_det.layers.recomputation import recomputed
from gn_det.layers.watched import watched
from gn_det.layers.weight_standardization import WeightStandardized
from gn_det.ops.form import Form

__all__ = [
    "FUSED",
    "STANDARDIZED",
    "D2ConvWS2d",
    "Fused",
    "FusedConv2d",
    "FusedConvWS2d",
    "FusedDeformBottleneckBlock",
    "FusedFPN",
    "is_fused_conv",
]


class D2ConvWS2d(WeightStandardized, Conv2d):
    """Detectron2's Conv2d with Weight Standardization: convolution, norm, activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolved(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class Fused:
    """What :func:`gn_det.fuse` asks of a class in FUSED.

    Attributes:
        relu_norms: names of the norms below that apply the ReLU behind them themselves, since
            their convolution calls them.
    """

    relu_norms: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether a module of the class that FUSED names has the norms that are needed here."""
        raise NotImplementedError

    def forms(self) -> dict[str, Form]:
        """What each norm below computes in one call, by its name in this module."""
        raise NotImplementedError


class FusedConv2d(Fused, Conv2d):
    """Convolution, GN and activation, the last two in one call."""

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        return _ends_in_plain_norm(conv) and (conv.activation is None or _is_relu(conv.activation))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not isinstance(self.norm, FusedGroupNorm) or _watched(self.children()):
                return super().forward(x)
        # The ReLU may also be a module behind this one, which its norm has taken in.
        return self.normalized(x, "relu" if self.activation is not None else self.norm.activation)

    def convolved(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    def expanded(self, x: Tensor) -> Tensor:
        """The convolution alone; where it is 1x1, recomputation computes it again.

        For those that a block's channels multiply in: little work beside the size of the result.
        """
        if torch.jit.is_scripting() or self.kernel_size != (1, 1):
            return self.convolved(x)
        return recomputed(self.convolved, x)

    def normalized(
        self,
        x: Tensor,
        activation: Optional[str],
        residual: Optional[Tensor] = None,
        normalize_residual: bool = False,
        residual_weight: Optional[Tensor] = None,
        residual_bias: Optional[Tensor] = None,
    ) -> Tensor:
        """The convolution and a form of group_norm, see FusedGroupNorm.normalize."""
        return self.norm.normalize(
            self.convolved(x), activation,
            residual, normalize_residual, residual_weight, residual_bias,
        )  # fmt: skip

    def forms(self) -> dict[str, Form]:
        return {"norm": Form(relu=self.activation is not None)}


class FusedConvWS2d(FusedConv2d, D2ConvWS2d):
    """FusedConv2d with Weight Standardization."""

    convolved = D2ConvWS2d.convolved


class FusedDeformBottleneckBlock(Fused, DeformBottleneckBlock):
    """1x1, deformable 3x3 and 1x1 convolutions and a shortcut in three group_norm calls.

    The deformable one calls its norm itself.
    """

    relu_norms = ("conv2.norm",)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        if not _uses_only(DeformBottleneckBlock, _DEFORM_NAMES):
            return False
        plain = _ends_in_plain_norm(block.conv2) and block.conv2.activation is None
        convs = (block.conv1, block.conv3, block.shortcut)
        return plain and all(is_fused_conv(conv) for conv in convs if conv is not None)

    def forward(self, x: Tensor) -> Tensor:
        if _watched(self.children()):
            return DeformBottleneckBlock.forward(self, x)
        out = self.conv1.normalized(x, "relu")
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            *offset, mask = offset.chunk(3, dim=1)
            out = self.conv2(out, torch.cat(offset, dim=1), mask.sigmoid())
        else:
            out = self.conv2(out, offset)
        residual, normalize, weight, bias = self.shortcut_for(
            x, self.conv3.norm.num_groups, self.conv3.norm.eps
        )
        return self.conv3.norm.normalize(
            self.conv3.expanded(out), "relu", residual, normalize, weight, bias
        )

    def shortcut_for(
        self, x: Tensor, num_groups: int, eps: float
    ) -> tuple[Tensor, bool, Optional[Tensor], Optional[Tensor]]:
        """What the last norm adds: residual, normalize_residual, residual_weight, residual_bias.

        The norm of a projection joins that call where it has the last norm's num_groups and eps.
        """
        if self.shortcut is None:
            return x, False, None, None
        norm = self.shortcut.norm
        if norm.num_groups == num_groups and norm.eps == eps:
            return self.shortcut.expanded(x), True, norm.weight, norm.bias
        return self.shortcut.normalized(x, None), False, None, None

    def forms(self) -> dict[str, Form]:
        forms = {"conv1.norm": Form(relu=True), "conv2.norm": Form(relu=True)}
        forms["conv3.norm"] = Form(relu=True, add=True)
        if self.shortcut is not None:
            norm, end = self.shortcut.norm, self.conv3.norm
            forms["shortcut.norm"] = Form()
            if (norm.num_groups, norm.eps) == (end.num_groups, end.eps):
                both = Form(relu=True, add=True, normalize_add=True)
                forms["conv3.norm"] = forms["shortcut.norm"] = both
        return forms


class FusedFPN(Fused, FPN):
    """FPN whose lateral norms add the level above.

    Under CUDA autocast the level keeps the lateral's dtype, though F.interpolate returns float32.
    """

    @staticmethod
    def fits(fpn: nn.Module) -> bool:
        return _uses_only(FPN, _FPN_NAMES) and all(map(is_fused_conv, fpn.lateral_convs))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not torch.jit.is_scripting():
            if _watched(self.lateral_convs):
                return FPN.forward(self, x)
        features = self.bottom_up(x)
        level = self.lateral_convs[0](features[self.in_features[-1]])
        results = [self.output_convs[0](level)]
        # TorchScript unrolls a loop over modules, and cannot slice them.
        for index, (lateral, output) in enumerate(zip(self.lateral_convs, self.output_convs)):
            if index > 0:
                if torch.jit.is_scripting():
                    above = _upsampled(level)
                else:
                    above = recomputed(_upsampled, level)
                level = lateral.normalized(features[self.in_features[-index - 1]], None, above)
                if self._fuse_type == "avg":
                    level = level / 2
                results.insert(0, output(level))
        if self.top_block is not None:
            if self.top_block.in_feature in features:
                top = features[self.top_block.in_feature]
            else:
                top = results[self._out_features.index(self.top_block.in_feature)]
            results.extend(self.top_block(top))
        return dict(zip(self._out_features, results))

    def forms(self) -> dict[str, Form]:
        names = {conv: name for name, conv in self.named_children()}
        return {f"{names[conv]}.norm": Form(add=True) for conv in self.lateral_convs[1:]}


def _upsampled(level: Tensor) -> Tensor:
    return F.interpolate(level, scale_factor=2.0, mode="nearest")


def is_fused_conv(module: nn.Module) -> bool:
    """Whether a module is a fused convolution, of exactly these classes, that ends in its norm."""
    return type(module) in (FusedConv2d, FusedConvWS2d) and module.activation is None


def _ends_in_plain_norm(conv: nn.Module) -> bool:
    """Whether a convolution has a FusedGroupNorm that computes nothing else yet."""
    norm = getattr(conv, "norm", None)
    return type(norm) is FusedGroupNorm and norm.activation is None


def _is_relu(activation: object) -> bool:
    return type(activation) is nn.ReLU or activation in (F.relu, F.relu_, torch.relu)


def _watched(parts: Iterable[nn.Module]) -> bool:
    """Whether parts have to be called one by one, as they are watched or have another norm."""
    modules = [module for part in parts for module in part.modules()]
    return watched(modules) or any(
        isinstance(module, FusedConv2d) and not isinstance(module.norm, FusedGroupNorm)
        for module in modules
    )


# What the forwards of these classes name. Copies of Detectron2 that were edited keep the names of
# its classes.
_DEFORM_NAMES = {
    "F", "cat", "chunk", "conv1", "conv2", "conv2_offset", "conv3", "deform_modulated", "relu_",
    "shortcut", "sigmoid", "torch",
}  # fmt: skip
_FPN_NAMES = {
    "F", "_fuse_type", "_out_features", "append", "bottom_up", "enumerate", "extend", "get",
    "in_feature", "in_features", "index", "insert", "interpolate", "lateral_convs", "len",
    "output_convs", "range", "top_block", "zip",
}  # fmt: skip


def _uses_only(kind: type[nn.Module], names: set[str]) -> bool:
    """Whether a class's forward is written with these names alone."""
    return names.issuperset(kind.forward.__code__.co_names)


# What gn_det.fuse makes of a module, by its exact class, since a subclass may compute something
# else. Convolutions come first: the others need theirs to be fused ones.
FUSED: dict[type[nn.Module], type[Fused]] = {
    Conv2d: FusedConv2d,
    D2ConvWS2d: FusedConvWS2d,
    DeformBottleneckBlock: FusedDeformBottleneckBlock,
    FPN: FusedFPN,
}

# The same class with Weight Standardization, also by exact class.
STANDARDIZED: dict[type[nn.Module], type[nn.Module]] = {
    Conv2d: D2ConvWS2d,
    FusedConv2d: FusedConvWS2d,
}
