"""What gn_det's entries in Detectron2's registries do with a module that Detectron2 has built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from detectron2.config import CfgNode, configurable
from torch import nn

from gn_det import injection
from gn_det.layers.hand_over import hand_over_from, statistics_of

__all__ = ["WithGN", "gn_options_from_config", "groups_from_config", "with_gn"]

Module = TypeVar("Module", bound=nn.Module)


def with_gn(
    module: Module,
    sites: str | Sequence[str],
    *,
    recompute: bool = False,
    hand_over: bool = False,
    **options: int | None,
) -> Module:
    """inject, then fuse, then recompute if asked; the options of inject by name.

    With hand_over, GN that replaces BN keeps its statistics, see gn_det/layers/hand_over.py.
    """
    bns = statistics_of(module) if hand_over else {}
    module = injection.inject(module, sites, **options)
    hand_over_from(module, bns)
    module = injection.fuse(module)
    return injection.recompute(module) if recompute else module


def gn_options_from_config(cfg: CfgNode) -> dict[str, int]:
    """What MODEL.GN says of every site, as arguments of :func:`with_gn`."""
    return {
        **groups_from_config(cfg),
        "weight_standardization": cfg.MODEL.GN.WEIGHT_STANDARDIZATION,
        "recompute": cfg.MODEL.GN.RECOMPUTE,
        "hand_over": cfg.MODEL.GN.HAND_OVER_STEPS > 0,
    }


def groups_from_config(cfg: CfgNode) -> dict[str, int]:
    """What MODEL.GN says of the number of groups, as arguments of :func:`gn_det.inject`.

    MODEL.GN.CHANNELS_PER_GROUP takes the place of MODEL.GN.NUM_GROUPS where it is above 0.
    """
    least = {"min_channels_per_group": cfg.MODEL.GN.MIN_CHANNELS_PER_GROUP}
    if cfg.MODEL.GN.CHANNELS_PER_GROUP > 0:
        return {"channels_per_group": cfg.MODEL.GN.CHANNELS_PER_GROUP, **least}
    return {"num_groups": cfg.MODEL.GN.NUM_GROUPS, **least}


class WithGN:
    """Builds the class that follows in the method resolution order, then injects GN and fuses.

    Built from a config, as Detectron2 does, or with explicit arguments, as LazyConfigs do.

    Args:
        args, kwargs: those of the Detectron2 class.
        num_groups, channels_per_group, min_channels_per_group, weight_standardization: see
            :func:`gn_det.inject`.
        recompute: whether to call :func:`gn_det.recompute` as well.
        hand_over: whether GN that replaces BN keeps its statistics, for gn_det's trainer to hand
            over from.

    Raises:
        InputError: there is nothing to normalize.
    """

    sites: ClassVar[str]

    @configurable
    def __init__(
        self,
        *args: Any,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        min_channels_per_group: int = 1,
        weight_standardization: bool = False,
        recompute: bool = False,
        hand_over: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        with_gn(
            self,
            self.sites,
            num_groups=num_groups,
            channels_per_group=channels_per_group,
            min_channels_per_group=min_channels_per_group,
            weight_standardization=weight_standardization,
            recompute=recompute,
            hand_over=hand_over,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().from_config(cfg, *args, **kwargs), **gn_options_from_config(cfg)}
