"""What gn_det's entries in Detectron2's registries do with a module that Detectron2 has built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from detectron2.config import CfgNode
from torch import nn

from gn_det import injection
from gn_det.errors import InputError
from gn_det.layers.hand_over import hand_over_from, statistics_of
from gn_det.modeling.bn_weights import warn_of_bn_weights

__all__ = [
    "WithGN",
    "builder_of_backbone",
    "gn_options_from_config",
    "groups_from_config",
    "inject_options_from_config",
    "puts_gn_into_the_backbone",
    "with_gn",
]

Module = TypeVar("Module", bound=nn.Module)

_EITHER = ("num_groups", "channels_per_group")  # of which inject takes one


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
    for key in ("recompute", "weight_standardization"):
        if hand_over and (recompute if key == "recompute" else options.get(key)):
            raise InputError(
                f"MODEL.GN.HAND_OVER_STEPS and MODEL.GN.{key.upper()} cannot be combined"
            )
    bns = statistics_of(module) if hand_over else {}
    module = injection.inject(module, sites, **options)
    hand_over_from(module, bns)
    module = injection.fuse(module)
    return injection.recompute(module) if recompute else module


def gn_options_from_config(cfg: CfgNode) -> dict[str, int]:
    """What MODEL.GN says of every site, as arguments of :func:`with_gn`."""
    return {
        **inject_options_from_config(cfg),
        "recompute": cfg.MODEL.GN.RECOMPUTE,
        "hand_over": cfg.MODEL.GN.HAND_OVER_STEPS > 0,
    }


def inject_options_from_config(cfg: CfgNode) -> dict[str, int]:
    """What MODEL.GN says of the norms, as arguments of :func:`gn_det.inject`."""
    standardization = {"weight_standardization": cfg.MODEL.GN.WEIGHT_STANDARDIZATION}
    return {**groups_from_config(cfg), **standardization}


def groups_from_config(cfg: CfgNode) -> dict[str, int]:
    """What MODEL.GN says of the number of groups, as arguments of :func:`gn_det.inject`.

    MODEL.GN.CHANNELS_PER_GROUP takes the place of MODEL.GN.NUM_GROUPS where it is above 0.
    """
    least = {"min_channels_per_group": cfg.MODEL.GN.MIN_CHANNELS_PER_GROUP}
    if cfg.MODEL.GN.CHANNELS_PER_GROUP > 0:
        return {"channels_per_group": cfg.MODEL.GN.CHANNELS_PER_GROUP, **least}
    return {"num_groups": cfg.MODEL.GN.NUM_GROUPS, **least}


def builder_of_backbone(cfg: CfgNode) -> str:
    """The builder that makes the backbone, whether or not build_gn_backbone gives it GN."""
    name = cfg.MODEL.BACKBONE.NAME
    return cfg.MODEL.GN.BACKBONE if name == "build_gn_backbone" else name


def puts_gn_into_the_backbone(cfg: CfgNode) -> bool:
    """Whether a config gives a timm backbone GN: by itself, or with what is around it."""
    sites = {site.split(".")[0] for site in cfg.MODEL.GN.SITES} & {"backbone", "default", "ALL"}
    of_model = cfg.MODEL.META_ARCHITECTURE.startswith("GN") and bool(sites)
    of_builder = cfg.MODEL.BACKBONE.NAME == "build_gn_backbone"
    return cfg.MODEL.TIMM.NORM == "GN" or of_model or of_builder


class WithGN:
    """Builds the class that follows in the method resolution order, then injects GN and fuses.

    For a head or a model of any registry, built from a config or with explicit arguments::

        @META_ARCH_REGISTRY.register()
        class GNTheirs(gn_det.modeling.WithGN, Theirs):
            pass

    A class attribute ``sites`` says where, as for a head that is one site by itself. Without it,
    ``MODEL.GN.SITES`` does.

    Args:
        args, kwargs: those of the class that follows; with a config as the first, what is not given
            here is what ``MODEL.GN`` says.
        sites, num_groups, channels_per_group, min_channels_per_group, weight_standardization: see
            :func:`gn_det.inject`.
        recompute: whether to call :func:`gn_det.recompute` as well.
        hand_over: whether GN that replaces BN keeps its statistics, for gn_det's trainer to hand
            over from.

    Raises:
        InputError: there is nothing to normalize.
    """

    sites: ClassVar[str | Sequence[str] | None] = None

    def __init__(
        self,
        *args: Any,
        sites: str | Sequence[str] | None = None,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        min_channels_per_group: int | None = None,
        weight_standardization: bool | None = None,
        recompute: bool | None = None,
        hand_over: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        cfg = kwargs.get("cfg", args[0] if args else None)
        configured = gn_options_from_config(cfg) if isinstance(cfg, CfgNode) else {}
        if num_groups or channels_per_group:
            configured = {k: v for k, v in configured.items() if k not in _EITHER}
        given = {
            "num_groups": num_groups,
            "channels_per_group": channels_per_group,
            "min_channels_per_group": min_channels_per_group,
            "weight_standardization": weight_standardization,
            "recompute": recompute,
            "hand_over": hand_over,
        }
        where = sites or self.sites
        if not where:
            where = cfg.MODEL.GN.SITES if isinstance(cfg, CfgNode) else "default"
        names = {where} if isinstance(where, str) else {*where}
        if isinstance(cfg, CfgNode) and names & {"default", "ALL", "backbone"}:
            warn_of_bn_weights(cfg)
        with_gn(self, where, **configured | {k: v for k, v in given.items() if v is not None})
