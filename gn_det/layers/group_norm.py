"""The GroupNorm layer that fits every norm slot: Detectron2's, mmcv's, torchvision's."""

from __future__ import annotations

from typing import Optional

import torch
import torch.fx
from torch import Tensor, nn

from gn_det.layers.groups import default_num_groups
from gn_det.layers.recomputation import recomputed
from gn_det.ops import group_norm
from gn_det.ops.aten import group_norm_composed

__all__ = ["FusedGroupNorm", "FusedGroupNormAct"]

# torch.fx, as in torchvision's create_feature_extractor, records a call and does not look inside.
torch.fx.wrap("group_norm")


class FusedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm that keeps its input's dtype under autocast and picks its own group count.

    num_channels comes first, unlike in nn.GroupNorm, since the norm slots of Detectron2, mmcv and
    torchvision call ``norm(num_channels)``. Being a subclass, it is exempt from weight decay
    wherever nn.GroupNorm is, and its state dict is nn.GroupNorm's.

    Args:
        num_channels: C of the (N, C, *spatial) input.
        num_groups: G, a divisor of C; default :func:`default_num_groups`.
        eps: added to the variance.
        affine: whether to learn γ (from 1) and β (from 0), each of shape (C,).
        activation: None or "relu", applied to the output in the same kernel.

    Raises:
        ValueError: num_channels is not a multiple of num_groups, or the activation is unknown.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_groups is None:
            num_groups = default_num_groups(num_channels)
        elif num_groups < 1 or num_channels % num_groups != 0:
            raise ValueError(
                f"num_channels, {num_channels}, is not a multiple of num_groups, {num_groups}"
            )
        if activation not in (None, "relu"):
            raise ValueError(f'activation is "{activation}", not None or "relu"')
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.activation)

    # Optional[Tensor], not Tensor | None: TorchScript reads these annotations.
    def normalize(
        self,
        x: Tensor,
        activation: Optional[str] = None,
        residual: Optional[Tensor] = None,
        normalize_residual: bool = False,
        residual_weight: Optional[Tensor] = None,
        residual_bias: Optional[Tensor] = None,
    ) -> Tensor:
        """Every form of :func:`gn_det.group_norm` with this layer's parameters.

        Blocks that end in this norm call it in place of the layer; self.activation has no part.
        """
        if torch.jit.is_scripting():
            return group_norm_composed(
                x, self.num_groups, self.weight, self.bias, self.eps, activation is not None,
                residual, normalize_residual, residual_weight, residual_bias,
            )  # fmt: skip
        arguments = (
            x, activation, residual, normalize_residual, residual_weight, residual_bias,
        )  # fmt: skip
        if activation is not None and residual is not None:
            # A block's result: the next block keeps it, and it is the mask of its own ReLU.
            return self._group_norm(*arguments)
        return recomputed(self._group_norm, *arguments)

    def _group_norm(
        self,
        x: Tensor,
        activation: str | None,
        residual: Tensor | None,
        normalize_residual: bool,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
    ) -> Tensor:
        return group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps,
            activation=activation, residual=residual, normalize_residual=normalize_residual,
            residual_weight=residual_weight, residual_bias=residual_bias,
        )  # fmt: skip

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation else ""
        return (
            f"{self.num_channels}, num_groups={self.num_groups}, eps={self.eps}, "
            f"affine={self.affine}{activation}"
        )


class FusedGroupNormAct(FusedGroupNorm):
    """FusedGroupNorm with the dropout and the activation that timm's norms hold.

    Attributes:
        drop, act: nn.Modules, called in this order behind the norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.normalize(x, self.activation)))
