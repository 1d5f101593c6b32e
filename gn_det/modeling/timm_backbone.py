"""timm's models as backbones: any that timm can build with features_only, by its name."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.injection.eval_mode import eval_mode
from gn_det.modeling.timm_weights import check_gn_of_weights, classifiers_of
from gn_det.modeling.with_gn import (
    gn_options_from_config,
    inject_options_from_config,
    puts_gn_into_the_backbone,
    with_gn,
)
from gn_det.utils import nearest, reason_of, some

__all__ = [
    "FrozenBatchNorm1d",
    "FrozenBatchNormAct2d",
    "TimmBackbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_timm_retinanet_fpn_backbone",
    "check_timm_input",
    "timm_input",
    "timm_name_problem",
]

_STRIDES = (4, 8, 16, 32)  # of the levels that FPN takes
# Levels that timm's HRNet names by what is no module of it.
_MODULES_OF_LEVELS = {"stem": "act2", "stage1": "layer1"}
_HOLDER = re.compile(r"^(model|body)\.")  # that some models are in
# Mean and deviation of the pictures, and their colours.
Input = tuple[Sequence[float], Sequence[float], str | None]
# Where the config says no mean, deviation and colours, it has Detectron2's.
_DETECTRON2_INPUT = ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "BGR")


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


class TimmBackbone(Backbone):
    """A model of timm that returns its feature maps, named by their strides.

    The map of stride 4 is ``res2``, that of stride 8 ``res3``, and so on, as in Detectron2's
    ResNets. Parts of the model that no map comes from do not train.

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
        options: those of :func:`gn_det.inject` and ``recompute``, for norm "GN".

    Attributes:
        name, weights: as given.
        body: the model of timm.

    Raises:
        InputError: timm is not installed or knows no such model, there is no such feature map, two
            have the same stride, weights cannot be read, lack tensors of the model, have others for
            its parts or were converted for other GN, the model takes pictures of one size alone or
            gives maps of other sizes than its strides say, or timm does not tell where stage
            freeze_at ends.

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
        if norm not in ("FrozenBN", "BN", "GN"):
            raise InputError(f"the norm of a timm backbone is {norm!r}, not FrozenBN, BN or GN")
        if not isinstance(freeze_at, int) or freeze_at > 5:
            raise InputError(
                f"MODEL.BACKBONE.FREEZE_AT (freeze_at) is {freeze_at}, and has to be a whole "
                "number of stages, up to 5"
            )
        body = _create(name, tuple(out_indices), weights)
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
        self._size_divisibility = max(level["reduction"] for level in info.info)
        features = _try(name, self)
        # DistributedDataParallel waits for the gradient of every parameter that trains.
        used = _parameters_behind(features.values())
        for parameter in self.parameters():
            if parameter not in used:
                parameter.requires_grad = False
        frozen = _first_stages(
            name, body, freeze_at, dict(zip(strides, features.values(), strict=True))
        )
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False
        _freeze_batch_norms(body, body.modules() if norm == "FrozenBN" else frozen)
        if norm == "GN":
            with_gn(self, "backbone", **options)
            _freeze_batch_norms(body, body.modules())
            if weights:
                check_gn_of_weights(
                    weights, body, options, hands_over=bool(options.get("hand_over"))
                )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps by name of (N, 3, H, W) pictures, each (N, C, H / stride, W / stride)."""
        features = self.body(x)
        if str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC"):
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return dict(zip(self._out_features, features, strict=True))

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The model MODEL.TIMM.NAME of timm, for C4-like models.

    Raises:
        InputError: see :class:`TimmBackbone`; MODEL.TIMM.NAME is empty, MODEL.PIXEL_MEAN,
            MODEL.PIXEL_STD or INPUT.FORMAT is not that of timm's weights, or these were converted
            for other norms than those of the config.
    """
    keys = cfg.MODEL.TIMM
    if not keys.NAME:
        raise InputError(f"{cfg.MODEL.BACKBONE.NAME} needs the name of a model in MODEL.TIMM.NAME")
    if cfg.MODEL.WEIGHTS.startswith("detectron2://"):
        raise InputError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} is of Detectron2's own models, which have no "
            f"{keys.NAME} of timm, and takes the place of MODEL.TIMM.WEIGHTS {keys.WEIGHTS!r}; set "
            'MODEL.WEIGHTS to ""'
        )
    # MODEL.WEIGHTS are those of the whole detector, the backbone included.
    weights = "" if cfg.MODEL.WEIGHTS else keys.WEIGHTS
    there = tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT
    _check_input(keys.NAME, there, starts_from_weights=bool(weights or cfg.MODEL.WEIGHTS))
    backbone = TimmBackbone(
        keys.NAME,
        out_indices=keys.OUT_INDICES,
        weights=weights,
        norm=keys.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        **gn_options_from_config(cfg),
    )
    if weights and keys.NORM != "GN":
        check_gn_of_weights(
            weights,
            backbone.body,
            inject_options_from_config(cfg) if puts_gn_into_the_backbone(cfg) else None,
            hands_over=cfg.MODEL.GN.HAND_OVER_STEPS > 0,
        )
    if cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        _check_heads_on_map(cfg, backbone)
    return backbone


def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's FPN, with one level more, on the model MODEL.TIMM.NAME of timm.

    FPN takes the levels MODEL.FPN.IN_FEATURES, or all where that is empty. The level that pooling
    adds is P6 behind res5.

    Raises:
        InputError: see :func:`build_timm_backbone`; a level is not there, or the last is not read.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    in_features = _in_features(cfg, bottom_up)
    top_block = LastLevelMaxPool()
    top_block.in_feature = in_features[-1].replace("res", "p")
    return _fpn(cfg, bottom_up, in_features, top_block)


def build_timm_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's FPN for RetinaNet, with two levels more, on the model MODEL.TIMM.NAME of timm.

    Raises:
        InputError: see :func:`build_timm_fpn_backbone`.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    in_features = _in_features(cfg, bottom_up)
    last = in_features[-1]
    channels = bottom_up.output_shape()[last].channels
    top_block = LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, last)
    return _fpn(cfg, bottom_up, in_features, top_block)


def _in_features(cfg: CfgNode, bottom_up: TimmBackbone) -> list[str]:
    """The levels that FPN takes."""
    there = bottom_up.output_shape()
    in_features = list(cfg.MODEL.FPN.IN_FEATURES) or [*there]
    absent = [name for name in in_features if name not in there]
    if absent:
        raise InputError(
            f"MODEL.FPN.IN_FEATURES has {', '.join(absent)}, and {cfg.MODEL.TIMM.NAME} gives "
            f"{', '.join(f'{name} (stride {shape.stride})' for name, shape in there.items())}; "
            "name some of these, or set MODEL.TIMM.OUT_INDICES"
        )
    _check_last_is_read(bottom_up, "MODEL.FPN.IN_FEATURES", in_features)
    return in_features


def _check_last_is_read(backbone: TimmBackbone, keys: str, read: Collection[str]) -> None:
    """Refuse stages that would run for nothing, and whose parameters would wait for a gradient."""
    names, indices = [*backbone.output_shape()], backbone.body.feature_info.out_indices
    end = max(place for place, name in enumerate(names) if name in read) + 1
    if end < len(names):
        raise InputError(
            f"{backbone.name} gives {', '.join(names)}, and {keys} "
            f"{'end' if ' ' in keys else 'ends'} at {names[end - 1]}: set MODEL.TIMM.OUT_INDICES "
            f"to {list(indices[:end])}"
        )


def _check_heads_on_map(cfg: CfgNode, backbone: TimmBackbone) -> None:
    """Check what reads the maps of a backbone without FPN, as far as it is Detectron2's."""
    if not cfg.MODEL.META_ARCHITECTURE.endswith("RCNN"):
        return
    there, heads = backbone.output_shape(), cfg.MODEL.ROI_HEADS
    read = {*cfg.MODEL.RPN.IN_FEATURES, *heads.IN_FEATURES}
    if not read <= there.keys():
        return  # Detectron2 names those that are not there
    _check_last_is_read(backbone, "MODEL.RPN.IN_FEATURES and MODEL.ROI_HEADS.IN_FEATURES", read)
    channels, wanted = there[heads.IN_FEATURES[0]].channels, 4 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    if heads.NAME == "Res5ROIHeads" and channels != wanted:
        raise InputError(
            f"Res5ROIHeads takes {wanted} channels (4 · MODEL.RESNETS.RES2_OUT_CHANNELS), and "
            f"{heads.IN_FEATURES[0]} of {backbone.name} has {channels}: take "
            "build_timm_fpn_backbone with StandardROIHeads"
            + (f", or set RES2_OUT_CHANNELS to {channels // 4}" if channels % 4 == 0 else "")
        )


def _fpn(
    cfg: CfgNode, bottom_up: TimmBackbone, in_features: list[str], top_block: nn.Module
) -> FPN:
    fpn = FPN(
        bottom_up,
        in_features,
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    if cfg.MODEL.TIMM.NORM == "GN":
        with_gn(fpn, "fpn", **gn_options_from_config(cfg))
    return fpn


def timm_name_problem(name: str) -> str:
    """What is wrong with the name of a timm model, and the nearest names; empty where nothing is.

    Names of files and of repositories (``local-dir:``, ``hf-hub:``) are left to timm.
    """
    if importlib.util.find_spec("timm") is None:
        return "the name of a model of timm, which is not installed: pip install timm"
    import timm

    if ":" in name:
        return ""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return f"the name of a model of timm{nearest(architecture, timm.list_models())}"
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        return f"the name of a model of timm{nearest(name, known)}"
    return ""


def timm_input(name: str) -> tuple[list[float], list[float], str]:
    """Mean and standard deviation of the pictures that a timm model takes, and their colours.

    Args:
        name: of the model.

    Returns:
        Mean and deviation of each channel, of values from 0 to 255, and "RGB".

    Raises:
        InputError: timm does not know the name, or cannot reach the repository that it names.
    """
    wrong = timm_name_problem(name)
    if wrong:
        raise InputError(f"MODEL.TIMM.NAME is {name!r}, and has to be {wrong}")
    import timm

    if ":" in name:
        try:
            config = timm.create_model(name, pretrained=False).pretrained_cfg
        except Exception as error:  # of folders and of the network
            raise InputError(
                f"MODEL.TIMM.NAME {name!r}: timm cannot build it: {reason_of(error)}"
            ) from error
    else:
        config = timm.get_pretrained_cfg(name).to_dict()
    mean, std = ([round(255 * x, 3) for x in config[key]] for key in ("mean", "std"))
    return mean, std, "RGB"


def check_timm_input(model: nn.Module, *, starts_from_weights: bool) -> None:
    """Check that a detector gives its timm backbones what their weights take.

    Weights that were converted for GN, in a backbone without it, are warned of.

    Args:
        model: built from a LazyConfig; the builders of YAML configs check by themselves.
        starts_from_weights: whether it loads weights of the whole detector.

    Raises:
        InputError: model.pixel_mean, pixel_std or input_format is not that of timm's weights.
    """
    for backbone in [module for module in model.modules() if isinstance(module, TimmBackbone)]:
        if backbone.weights and not any(isinstance(m, nn.GroupNorm) for m in backbone.modules()):
            check_gn_of_weights(backbone.weights, backbone.body, None, hands_over=False)
        if hasattr(model, "pixel_mean") and hasattr(model, "pixel_std"):
            mean, std = (  # as they were before they became float32
                tuple(round(value, 3) for value in x.flatten().tolist())
                for x in (model.pixel_mean, model.pixel_std)
            )
            there = mean, std, getattr(model, "input_format", None)
            weights = starts_from_weights or bool(backbone.weights)
            _check_input(backbone.name, there, starts_from_weights=weights)


def _check_input(name: str, there: Input, *, starts_from_weights: bool) -> None:
    mean, std, colours = timm_input(name)
    same = there[2] in (colours, None) and all(  # some models do not say their colours
        len(ours) == len(theirs)
        and all(abs(a - b) <= 0.5 for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(there, (mean, std), strict=False)
    )
    log = logging.getLogger(__name__)
    if same:
        log.info(f"{name} takes {colours}, mean {mean}, deviation {std}")
    elif there == _DETECTRON2_INPUT and not starts_from_weights:
        log.info(f"{name} starts at random, with Detectron2's colours and means")
    else:
        advice = (
            "write timm's values there. Weights that have learnt with others need a folder whose "
            "config.json has these (MODEL.TIMM.NAME local-dir:FOLDER)"
        )
        if len(there[0]) != 3 or len(there[1]) != 3:
            advice = "a backbone of timm takes pictures of 3 channels here"
        elif max(there[0]) <= 1:
            advice = "these are for pixels from 0 to 1, and a detector's go to 255"
        raise InputError(
            f"{name} of timm takes INPUT.FORMAT {colours}, MODEL.PIXEL_MEAN {mean} and "
            f"MODEL.PIXEL_STD {std} (of a LazyConfig: input_format, pixel_mean and pixel_std of "
            f"the model), and the config says {there[2]}, {list(there[0])} and {list(there[1])}; "
            f"{advice}"
        )


def _create(name: str, out_indices: tuple[int, ...], weights: str) -> Any:
    """timm's model with its features, on the CPU."""
    wrong = timm_name_problem(name)
    if wrong:
        raise InputError(f"timm backbone {name!r}: it has to be {wrong}")
    import timm

    state = _read_state(weights) if weights not in ("", "timm") else None
    try:
        flags, body = _of_any_size(name)
        levels = [level["reduction"] for level in body.feature_info.info]
        out_indices = out_indices or tuple(i for i, s in enumerate(levels) if s in _STRIDES)
        if not out_indices:
            raise InputError(
                f"{name} has feature maps of strides {levels}, and none of {some(_STRIDES, 4)}"
            )
        if not all(-len(levels) <= index < len(levels) for index in out_indices):
            raise InputError(
                f"MODEL.TIMM.OUT_INDICES (out_indices) {list(out_indices)}: {name} has "
                f"{len(levels)} feature maps, 0 to {len(levels) - 1}, of strides {levels}"
            )
        out_indices = tuple(sorted(index % len(levels) for index in out_indices))
        flags |= {"features_only": True, "out_indices": out_indices}
        if state is None:
            body = timm.create_model(name, pretrained=bool(weights), **flags)
        else:
            body = timm.create_model(name, **flags)
            with torch.random.fork_rng(devices=[]):
                whole = timm.create_model(name)
            state = _without_prefix(state, {*body.state_dict(), *whole.state_dict()})
            fits = _fits(body, state)
            _check_none_left(whole, body, state, weights, by_name=fits)
            if fits:
                body.load_state_dict(state, strict=False)
            else:  # names of the whole model, or of another version of it, which timm translates
                source = {"pretrained_cfg_overlay": {"state_dict": state}}
                body = timm.create_model(name, pretrained=True, **flags, **source)
    except InputError:
        raise
    except Exception as error:  # of timm's many models, and of the network
        what = f" with the weights {weights}" if weights else ""
        advice = "; MODEL.TIMM.WEIGHTS can name a file" if weights == "timm" else ""
        reason = " ".join(str(error).split())[:300] or reason_of(error)
        raise InputError(f"timm cannot build {name}{what}: {reason}{advice}") from error
    if state is not None:
        _check_all_loaded(body, state, weights)
    source_of = weights or "none, a random start"
    logging.getLogger(__name__).info(f"timm {name}: weights {source_of}")
    return body


def _of_any_size(name: str) -> tuple[dict[str, bool], Any]:
    """The model at a random start, and the argument by which it takes pictures of any size.

    Transformers have one, by one of two names. Convolutional models know neither.
    """
    import timm

    for flags in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        with suppress(TypeError):
            return flags, timm.create_model(name, features_only=True, **flags)
    return {}, timm.create_model(name, features_only=True)


def _read_state(file: str) -> dict[str, Tensor]:
    from timm.models import load_state_dict

    file = str(Path(file).expanduser())
    if not Path(file).is_file():
        raise InputError(
            f"MODEL.TIMM.WEIGHTS (weights of TimmBackbone) {file}: no such file; name one, or "
            '"timm" for those that timm downloads. tools/convert_bn_to_gn.py --backbone makes what '
            "recipes call calibrated and distilled, and `make weights/lite0.pth` the others"
        )
    try:
        state = load_state_dict(file, weights_only=True)
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # of pickles and archives that are none
        raise InputError(f"{file} holds no weights that can be read: {reason_of(error)}") from error
    if not tensors:
        raise InputError(f"{file} holds no weights")
    floats = {k: v.float() for k, v in tensors.items() if v.is_floating_point()}
    broken = [key for key, value in floats.items() if not value.isfinite().all()]
    if broken:
        raise InputError(
            f"{file}: {len(broken)} of {len(tensors)} tensors have infinite or no numbers "
            f"({some(broken, 3)})"
        )
    return tensors


def _without_prefix(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The weights of a model that others hold under a name of theirs, such as ``backbone.``."""
    if state.keys() & names:
        return state
    for prefix in dict.fromkeys(key.partition(".")[0] + "." for key in state):
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if inside.keys() & names:
            return inside
    return state


def _fits(body: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has each tensor of a model by the model's own name."""
    return all(
        key in state and state[key].shape == value.shape for key, value in _tensors(body).items()
    )


def _tensors(body: nn.Module) -> dict[str, Tensor]:
    """Those that weights have; the counters of BN are no part of some."""
    state = body.state_dict()
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _check_all_loaded(body: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    """timm loads what fits and says nothing of the rest."""
    values = {
        _fingerprint(value.float() if value.is_floating_point() else value)
        for value in state.values()
    }
    # With features, some classes join the parts of a name in another way. What timm fits to the
    # model, such as position biases, has another size in the file.
    sizes = {key.replace(".", "_"): value.numel() for key, value in state.items()}
    own = _tensors(body)
    missing = [
        key
        for key, value in own.items()
        if _fingerprint(value) not in values
        and sizes.get(_HOLDER.sub("", key).replace(".", "_"), value.numel()) == value.numel()
    ]
    if missing:
        raise InputError(
            f"{file} does not fit the timm model: it lacks {len(missing)} of {len(own)} tensors "
            f"({some(missing, 3)})"
        )


def _check_none_left(
    whole: Any, body: nn.Module, state: Mapping[str, Tensor], file: str, *, by_name: bool
) -> None:
    """Check that the parts of a model have no more tensors in a file than they can take.

    Files by other names than timm's now, which it translates, are not checked.
    """
    heads = {name.partition(".")[0] for name in classifiers_of(whole)}
    own = {key for key in _tensors(whole) if key.partition(".")[0] not in heads}
    if not by_name and not own <= state.keys():
        return
    known = {*whole.state_dict(), *body.state_dict()}
    parts = {key.partition(".")[0] for key in known} - heads
    left = [key for key in state if key not in known and key.partition(".")[0] in parts]
    if left:
        raise InputError(
            f"{file} does not fit the timm model: {len(left)} of its {len(state)} tensors have no "
            f"place in it ({some(left, 3)}); is it of another model?"
        )


def _fingerprint(tensor: Tensor) -> tuple[int, float]:
    return tensor.numel(), tensor.double().sum().item()


def _try(name: str, backbone: TimmBackbone) -> dict[str, Tensor]:
    """Its feature maps of a small picture, with the graph that leads to them."""
    least = backbone.size_divisibility
    device = next(backbone.parameters()).device
    for times in (2, 8):  # some have no padding, and little is too small for them
        height, width = times * least, (times + 1) * least
        try:
            with eval_mode(backbone), torch.enable_grad():
                features = backbone(torch.zeros(1, 3, height, width, device=device))
            break
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = reason_of(error)
    else:
        raise InputError(
            f"timm's {name} does not take pictures of any size, as a detector needs it: {reason}"
        )
    for key, shape in backbone.output_shape().items():
        found, wanted = features[key].shape[2:], (height // shape.stride, width // shape.stride)
        if found != wanted:
            raise InputError(
                f"timm's {name} gives a map of {found[0]}x{found[1]} for a picture of "
                f"{height}x{width}, and a detector takes one of {wanted[0]}x{wanted[1]} at stride "
                f"{shape.stride}"
            )
    return features


def _parameters_behind(tensors: Iterable[Tensor]) -> set[Tensor]:
    """The parameters that tensors come from."""
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, found = {*nodes}, set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(node.variable)
        before = {function for function, _ in node.next_functions if function is not None} - seen
        seen |= before
        nodes += before
    return found


def _first_stages(
    name: str, body: Any, freeze_at: int, features: Mapping[int, Tensor]
) -> list[nn.Module]:
    """Modules up to stage freeze_at, which ends at the feature map of stride 2^freeze_at.

    Args:
        name: of the model.
        body: it.
        freeze_at: the stage; 0 for none.
        features: maps by stride, with the graph that leads to them.
    """
    if freeze_at <= 0:
        return []
    modules = [*body.modules()]  # in the order in which they run
    # timm joins the parts of some names by "_", and holds some models in one of its own.
    names = [_HOLDER.sub("", key).replace(".", "_") for key, _ in body.named_modules()]
    info = body.feature_info
    levels = {level["module"].replace(".", "_"): level["reduction"] for level in info.info}
    levels = dict(list(levels.items())[: max(info.out_indices) + 1])  # the model ends there
    levels = {k if k in names else _MODULES_OF_LEVELS.get(k, k): s for k, s in levels.items()}
    last = 2**freeze_at
    inside = [key for key, stride in levels.items() if stride <= last]
    if len(inside) == len(levels):
        return modules
    if not levels.keys() <= {*names}:
        behind = _parameters_behind(y for stride, y in features.items() if stride <= last)
        if not behind:
            raise InputError(
                f"MODEL.BACKBONE.FREEZE_AT (freeze_at) {freeze_at}: timm does not tell where this "
                f"stage of {name} ends; set 0, or at least {int(math.log2(min(features)))}"
            )
        return [m for m in modules if behind & {*m.parameters(recurse=False)}]
    if not inside:  # the stem leads to the first map, whose stride is larger
        return modules[: names.index(next(iter(levels)))]
    end = max(i for i, key in enumerate(names) if f"{key}_".startswith(f"{inside[-1]}_"))
    return modules[: end + 1]


def _freeze_batch_norms(body: nn.Module, among: Iterable[nn.Module]) -> None:
    """Exchange the BN layers among some modules of a model for frozen ones.

    Detectron2's own conversion would drop the activation that timm's BN layers hold.
    """
    chosen = {
        module
        for module in among
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, FrozenBatchNorm1d)
    }
    for parent in [*body.modules()]:
        for name, child in [*parent.named_children()]:
            if child in chosen:
                setattr(parent, name, _frozen(child))


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
