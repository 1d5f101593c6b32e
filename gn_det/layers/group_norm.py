"""The GroupNorm layer that fits every norm slot: Detectron2's, mmcv's, torchvision's."""

from __future__ import annotations

import sys
from typing import Any, Optional

import torch
import torch.fx
from torch import Tensor, fx, nn

from gn_det.errors import InputError
from gn_det.layers.groups import default_num_groups
from gn_det.layers.recomputation import recomputed
from gn_det.ops import group_norm
from gn_det.ops.aten import group_norm_composed

__all__ = ["FusedGroupNorm", "FusedGroupNormAct"]

# torch.fx, as in torchvision's create_feature_extractor, records a call and does not look inside.
torch.fx.wrap("group_norm")

# Whoever is called from here is made for a norm_cfg. What takes one applies an activation itself,
# before or behind which the norm's would be a second one, or adds something in between.
_MMCVS_NORMS = "mmcv.cnn.bricks.norm"


class FusedGroupNorm(nn.GroupNorm):
    """An nn.GroupNorm with fused kernels, for the norm slots of Detectron2, mmcv and torchvision.

    It differs from nn.GroupNorm in three ways. num_channels comes first, because those slots call
    ``norm(num_channels)``. num_groups has a default. The output keeps the dtype of the input, under
    autocast as well. It is a subclass of nn.GroupNorm with the same state dict, so code that
    exempts nn.GroupNorm from weight decay exempts this too.

    Args:
        num_channels: C of the (N, C, *spatial) input, which may have any floating dtype.
        num_groups: G, a divisor of C. Default: :func:`gn_det.default_num_groups` of C.
        eps: added to the variance, default 1e-5.
        affine: whether to learn γ (initially 1) and β (initially 0), each of shape (C,). Default:
            True.
        activation: None (default) or "relu", which is applied to the output in the same kernel.
        bias: whether to learn β where affine is set. Default: True.
        device, dtype: of γ and β.

    Raises:
        ValueError: num_channels is not a multiple of num_groups, the activation is unknown or
            stands in a norm_cfg of mmcv's, or, in a call of an injected layer, each group is a
            single value.

    Example::

        layer = gn_det.FusedGroupNorm(256, activation="relu")
        y = layer(torch.randn(2, 256, 50, 84))
    """

    name = ""  # of the module in the model that it was injected into, for messages

    def __init__(
        self,
        num_channels: int,
        num_groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str | None = None,
        *,
        bias: bool = True,
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
        if activation is not None and sys._getframe(1).f_globals.get("__name__") == _MMCVS_NORMS:
            raise InputError(
                f"activation={activation!r} has no place in a norm_cfg: the module that takes it "
                'has its own. For a norm that computes that too, build the model by type="InjectGN"'
                ", or call gn_det.fuse"
            )
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        if not bias:
            self.bias = None
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

    def normalize_and_add(
        self,
        x: Tensor,
        residual: Tensor,
        activation: Optional[str] = None,
        keeps: str = "",
        normalize_residual: bool = False,
        residual_weight: Optional[Tensor] = None,
        residual_bias: Optional[Tensor] = None,
    ) -> Tensor:
        """As :meth:`normalize` where x and residual are alike, else as PyTorch adds them.

        So residuals that are broadcast, or of another dtype under autocast, give what they gave
        before :func:`gn_det.fuse`.

        Args:
            keeps: "x" or "residual" where the addition was in place, into the normalized one or
                into the other: the result has that one's dtype.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, fx.Proxy):  # no shape is known
                return self.normalize(
                    x, activation, residual, normalize_residual, residual_weight, residual_bias
                )
            if not isinstance(residual, Tensor):  # a number
                y = self.normalize(x) + residual
                return torch.relu(y) if activation is not None else y
        if x.shape == residual.shape and x.dtype == residual.dtype:
            return self.normalize(
                x, activation, residual, normalize_residual, residual_weight, residual_bias
            )
        dtype = x.dtype if keeps == "x" else residual.dtype
        if normalize_residual:
            residual = group_norm_composed(
                residual, self.num_groups, residual_weight, residual_bias, self.eps, False,
                None, False, None, None,
            )  # fmt: skip
        y = self.normalize(x) + residual
        if keeps:
            y = y.to(dtype)
        return torch.relu(y) if activation is not None else y

    def _group_norm(
        self,
        x: Tensor,
        activation: str | None,
        residual: Tensor | None,
        normalize_residual: bool,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
    ) -> Tensor:
        # Of a layer that somebody built so, as for the paper's ablation, group_norm warns. What
        # torch.fx records has no sizes, and an export would take them for constants.
        has_sizes = isinstance(x, Tensor) and not torch.compiler.is_compiling()
        if self.name and self.num_groups == self.num_channels and has_sizes:
            self._check_size(x)
        return group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps,
            activation=activation, residual=residual, normalize_residual=normalize_residual,
            residual_weight=residual_weight, residual_bias=residual_bias,
        )  # fmt: skip

    def _check_size(self, x: Tensor) -> None:
        if x.shape[2:].numel() == 1 and x.numel() > 0:
            raise InputError(
                f"{self.name}: each of {self.num_groups} groups is one value in an input "
                f"{tuple(x.shape)}, so that GN returns its β for any picture; give it fewer groups "
                "(num_groups, channels_per_group), or no norm"
            )

    def mark_values_of_bn(self) -> None:
        """Note that γ and β are BN's, until they change."""
        if self.weight.is_inference() or self.bias.is_inference():
            return  # they have no versions
        # A later load, or a step, raises the versions. (TorchScript reads no attribute that a class
        # types.)
        vars(self)["taken_from_bn"] = (self.weight._version, self.bias._version)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        named = (f"{prefix}{name}" for name in ("weight", "running_mean"))
        if self.affine and self.bias is not None and all(name in state_dict for name in named):
            self.mark_values_of_bn()

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
