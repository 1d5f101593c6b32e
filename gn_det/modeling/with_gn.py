"""What gn_det's entries in Detectron2's registries do with a module that Detectron2 has built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from detectron2.config import CfgNode, configurable
from torch import nn

from gn_det.injection import fuse, inject

__all__ = ["WithGN", "gn_options_from_config", "with_gn"]

Module = TypeVar("Module", bound=nn.Module)


def with_gn(module: Module, sites: str | Sequence[str], **options: int | None) -> Module:
    """inject, then fuse; the options of inject by name."""
    return fuse(inject(module, sites, **options))


def gn_options_from_config(cfg: CfgNode) -> dict[str, int]:
    """What MODEL.GN says of every site, as arguments of inject."""
    options = {"weight_standardization": cfg.MODEL.GN.WEIGHT_STANDARDIZATION}
    if cfg.MODEL.GN.CHANNELS_PER_GROUP > 0:
        return {**options, "channels_per_group": cfg.MODEL.GN.CHANNELS_PER_GROUP}
    return {**options, "num_groups": cfg.MODEL.GN.NUM_GROUPS}


class WithGN:
    """Builds the class that follows in the method resolution order, then injects GN and fuses.

    Built from a config, as Detectron2 does, or with explicit arguments, as LazyConfigs do.

    Args:
        args, kwargs: those of the Detectron2 class.
        num_groups, channels_per_group, weight_standardization: see :func:`gn_det.inject`.

    Raises:
        InputError: there is nothing to normalise.
    """

    sites: ClassVar[str]

    @configurable
    def __init__(
        self,
        *args: Any,
        num_groups: int | None = None,
        channels_per_group: int | None = None,
        weight_standardization: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        with_gn(
            self,
            self.sites,
            num_groups=num_groups,
            channels_per_group=channels_per_group,
            weight_standardization=weight_standardization,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().from_config(cfg, *args, **kwargs), **gn_options_from_config(cfg)}
