"""timm's BN layers, frozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from gn_det.injection.exchange import check_exchangeable, exchange

__all__ = ["FrozenBatchNorm1d", "FrozenBatchNormAct2d", "freeze_batch_norms"]


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Detectron2's FrozenBatchNorm2d with the dropout and the activation that timm's BN holds.

    Attributes:
        drop, act: nn.Modules, called in this order behind the norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm1d(nn.BatchNorm1d):
    """nn.BatchNorm1d that stays as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requires_grad_(False).train()

    def train(self, mode: bool = True) -> FrozenBatchNorm1d:
        return super().train(False)


def freeze_batch_norms(body: nn.Module, among: Iterable[nn.Module]) -> None:
    """Exchange the BN layers among some modules of a model for frozen ones.

    Detectron2's own conversion would drop the activation that timm's BN layers hold.

    Raises:
        InputError: a function of the model holds one for itself.
    """
    chosen = {
        module
        for module in among
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, FrozenBatchNorm1d)
    }
    check_exchangeable(body, chosen)
    exchange(body, {bn: _frozen(bn) for bn in chosen})


def _frozen(bn: Any) -> nn.Module:
    if isinstance(bn, nn.BatchNorm1d):
        frozen = FrozenBatchNorm1d(bn.num_features, bn.eps, affine=bn.affine)
        frozen.load_state_dict(bn.state_dict())
        return frozen
    act = hasattr(bn, "act")
    new = (FrozenBatchNormAct2d if act else FrozenBatchNorm2d)(bn.num_features, bn.eps)
    for key in ("weight", "bias", "running_mean", "running_var"):
        if getattr(bn, key) is not None:
            getattr(new, key).copy_(getattr(bn, key).detach())
    if act:
        new.drop, new.act = bn.drop, bn.act
    for key, value in vars(bn).items():
        if key.startswith(("_forward_", "_backward_")):  # timm takes some feature maps by hooks
            setattr(new, key, value)
    return new.train(bn.training)
