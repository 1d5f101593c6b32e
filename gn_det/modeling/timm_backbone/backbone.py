"""timm's models as backbones: any that timm can build with features_only, by its name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from torch import Tensor

from gn_det.errors import InputError
from gn_det.injection.eval_mode import eval_mode
from gn_det.modeling.timm_backbone.converted import check_gn_of_weights
from gn_det.modeling.timm_backbone.create import create
from gn_det.modeling.timm_backbone.frozen_norm import freeze_batch_norms
from gn_det.modeling.timm_backbone.stages import first_stages, parameters_behind
from gn_det.modeling.with_gn import with_gn
from gn_det.text import reason_of

__all__ = ["TimmBackbone"]

_OPTIONS_OF_GN = {
    "num_groups",
    "channels_per_group",
    "min_channels_per_group",
    "weight_standardization",
    "recompute",
    "hand_over",
}


class TimmBackbone(Backbone):
    """A model of timm that returns its feature maps, named by their strides.

    The map of stride 4 is ``res2``, that of stride 8 ``res3``, and so on, as in Detectron2's
    ResNets. Parts of the model that no map comes from do not train. Pictures whose sides the model
    itself cannot take, as HRNet without its map of stride 32, are padded with zeros at the right
    and at the bottom, and the maps are cropped.

    Args:
        name: of a model that ``timm.create_model(name, features_only=True)`` builds.
        out_indices: which of its feature maps to return, by their place in timm's ``feature_info``.
            Default: those of strides 4, 8, 16 and 32.
        weights: "" for a random start, "timm" for the weights that timm downloads, or a file with
            the state dict of the model, with or without its classifier, or that of ``body``
            (.pth, .safetensors). Of a training with averaged weights (``state_dict_ema``,
            ``model_ema``) these are taken.
        norm: "FrozenBN" (default), "BN" or "GN": what the model's BN layers become. Frozen layers
            keep their activation. Where GN has no map to normalize, as in gates behind global
            pooling, "GN" freezes BN. Other norms, such as ConvNeXt's, stay.
        freeze_at: stages that do not train, and whose BN is frozen: 1 is the stem (all up to stride
            2), 2 adds what leads to ``res2``, up to 5 for all. Default: 0, for none.
        options: those of :func:`gn_det.inject`, ``recompute`` and ``hand_over``, for norm "GN".

    Attributes:
        name, weights: as given.
        body: the model of timm.

    Raises:
        InputError: an option is not known, or given for another norm than "GN", timm is not
            installed or knows no such model, there is no such feature map, two have the same
            stride, weights cannot be read, lack tensors of the model, have others for its parts or
            were converted for other GN, the model takes pictures of one size alone or gives maps of
            other sizes than its strides say, or timm does not tell where stage freeze_at ends.

    Example::

        backbone = TimmBackbone("resnet18", freeze_at=2)
        assert backbone(torch.zeros(1, 3, 64, 64))["res5"].shape == (1, 512, 2, 2)
    """

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int] = (),
        weights: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_arguments(out_indices, norm, freeze_at, options)
        body = create(name, tuple(out_indices), weights)
        info = body.feature_info
        strides = info.reduction()
        names = [f"res{int(math.log2(stride))}" for stride in strides]
        if len({*names}) < len(names):
            raise InputError(
                f"{name}: the feature maps {list(info.out_indices)} have strides {strides}, and a "
                "detector takes one of each; choose with MODEL.TIMM.OUT_INDICES (out_indices)"
            )
        self.name, self.weights = name, weights
        self.body = body
        self._out_features = names
        self._out_feature_strides = dict(zip(names, strides, strict=True))
        self._out_feature_channels = dict(zip(names, info.channels(), strict=True))
        self._multiple = 1  # of which the sides of what the body gets are
        picture, features = _try(name, self, [level["reduction"] for level in info.info])
        names_of = {parameter: key for key, parameter in self.named_parameters()}
        # By name: GN may take the place of the parameters.
        self._behind = {
            key: {names_of[parameter] for parameter in parameters_behind([feature])}
            for key, feature in features.items()
        }
        for key in {*names_of.values()} - set().union(*self._behind.values()):
            self.get_parameter(key).requires_grad = False
        frozen = first_stages(
            name, body, freeze_at, picture, dict(zip(strides, features.values(), strict=True))
        )
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False
        freeze_batch_norms(body, body.modules() if norm == "FrozenBN" else frozen)
        if norm == "GN":
            with_gn(self, "backbone", **options)
            freeze_batch_norms(body, body.modules())
            if weights:
                check_gn_of_weights(
                    weights, body, options, hands_over=bool(options.get("hand_over"))
                )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps by name of (N, 3, H, W) pictures, each (N, C, H / stride, W / stride)."""
        multiple = self._multiple
        if multiple == 1:
            return self._maps(x)
        height, width = x.shape[2:]
        if not height % multiple and not width % multiple:
            return self._maps(x)
        maps = self._maps(F.pad(x, (0, -width % multiple, 0, -height % multiple)))
        for key, stride in self._out_feature_strides.items():
            maps[key] = maps[key][..., : -(-height // stride), : -(-width // stride)]
        return maps

    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        if str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC"):
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self._out_features, features, strict=True))

    def freeze_unread(self, read: Collection[str]) -> None:
        """Freeze what leads only to maps that nothing reads.

        DistributedDataParallel waits for the gradient of every parameter that trains.

        Args:
            read: names of the maps that something reads.
        """
        behind = {name: keys for name, keys in self._behind.items() if name in read}
        unread = set().union(*self._behind.values()) - set().union(*behind.values())
        for key, parameter in self.named_parameters():
            if key in unread:
                parameter.requires_grad = False

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())


def _check_arguments(
    out_indices: Sequence[int], norm: str, freeze_at: int, options: Mapping[str, Any]
) -> None:
    if norm not in ("FrozenBN", "BN", "GN"):
        raise InputError(f"the norm of a timm backbone is {norm!r}, not FrozenBN, BN or GN")
    if type(freeze_at) is not int or freeze_at > 5:
        raise InputError(
            f"MODEL.BACKBONE.FREEZE_AT (freeze_at) is {freeze_at}, and has to be a whole number of "
            "stages, up to 5"
        )
    is_list = isinstance(out_indices, Sequence) and not isinstance(out_indices, str)
    if not is_list or not all(type(i) is int for i in out_indices):
        raise InputError(
            f"MODEL.TIMM.OUT_INDICES (out_indices) is {out_indices!r}, and has to be a list of "
            "whole numbers"
        )
    if unknown := options.keys() - _OPTIONS_OF_GN:
        raise InputError(
            f"a timm backbone has no option {', '.join(sorted(unknown))}: those of GN are "
            f"{', '.join(sorted(_OPTIONS_OF_GN))}"
        )
    if options and norm != "GN":
        raise InputError(f'{options} is for norm "GN", and the norm is {norm!r}')


def _try(
    name: str, backbone: TimmBackbone, strides: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A small picture and its feature maps, with the graph that leads to them.

    It is found out of which number the sides have to be multiples, where the model does not take
    others: the stride of the last map that is returned, of the last that there is, or twice that.

    Args:
        name: of the model.
        backbone: which is told.
        strides: of all maps that there are.
    """
    device = next(backbone.parameters()).device
    reason = ""
    for least in dict.fromkeys((backbone.size_divisibility, max(strides), 2 * max(strides))):
        said = ""
        for times in (2, 8):  # some have no padding, and little is too small for them
            picture = torch.zeros(1, 3, times * least, (times + 1) * least, device=device)
            try:
                with eval_mode(backbone), torch.enable_grad():
                    features = backbone(picture)
            except (AssertionError, RuntimeError, ValueError) as error:
                said = "does not take pictures of any size, as a detector needs it: "
                said += reason_of(error)
                continue
            said = _wrong_map(backbone, picture, features)
            if not said:
                backbone._multiple = 1 if _takes_any_size(backbone, picture) else least
                return picture, features
            break
        reason = reason or said
    raise InputError(f"timm's {name} {reason}")


@torch.no_grad()
def _takes_any_size(backbone: TimmBackbone, picture: Tensor) -> bool:
    """Whether the maps are right for sides that are multiples of the smallest stride alone."""
    least = min(backbone._out_feature_strides.values())
    odd = F.pad(picture, (0, least, 0, least))
    try:
        with eval_mode(backbone):
            return not _wrong_map(backbone, odd, backbone(odd))
    except (AssertionError, RuntimeError, ValueError):
        return False


def _wrong_map(backbone: TimmBackbone, picture: Tensor, features: dict[str, Tensor]) -> str:
    """What is wrong with the first map that has another size than its stride says."""
    height, width = picture.shape[2:]
    for key, shape in backbone.output_shape().items():
        found = tuple(features[key].shape[2:])
        wanted = -(-height // shape.stride), -(-width // shape.stride)
        if found != wanted:
            return (
                f"gives a map of {found[0]}x{found[1]} for a picture of {height}x{width}, and a "
                f"detector takes one of {wanted[0]}x{wanted[1]} at stride {shape.stride}"
            )
    return ""
