"""mmdetection's models, from its own configs, without mmcv's compiled operators.

As a program, in a process of its own with mmdetection on the path, it sweeps families of configs
and prints a line of JSON for each::

    PYTHONPATH=FOLDER:.:tests python -m support.mmdetection --list
    PYTHONPATH=FOLDER:.:tests python -m support.mmdetection FAMILY ...
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.machinery
import json
import logging
import re
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.following import called_alone, followed_and_called
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gn_det import InputError, fuse, inject
from gn_det.injection.fuse import fused_forms, why_not_fused
from gn_det.layers import FusedGroupNorm
from gn_det.ops.form import Form

# Folders of configs without a model of their own.
_NO_FAMILIES = {"_base_", "common", "dsdl"}
_SMALL = ("r18", "r50", "-t-", "-t_", "_t_", "tiny", "nano", "_s_", "-s_", "w18", "400MF", "b1")


class _Conv(nn.Conv2d):
    """In the place of deformable, masked and switchable convolutions: an ordinary one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        names = {*known, "groups", "bias"}
        super().__init__(*args, **{name: kwargs[name] for name in kwargs if name in names})

    def forward(self, x: Tensor, *sampling: Any) -> Tensor:
        return super().forward(x)


class _Carafe(nn.Module):
    """In the place of an upsampling by content: one by the nearest."""

    def __init__(self, channels: int, scale_factor: int, **kwargs: Any) -> None:
        super().__init__()
        self.scale_factor = scale_factor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=self.scale_factor)

    def init_weights(self) -> None:
        pass


class _Same(nn.Module):
    """In the place of what changes no shape: corner pooling, and what is never called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.embed_dims = kwargs.get("embed_dims", 256)
        self.num_heads = kwargs.get("num_heads", 8)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _Cell(nn.Module):
    """In the place of NAS-FPN's cells: the sum of two levels, and the convolution behind it."""

    def __init__(self, in_channels: int = 256, out_channels: int = 256, **kwargs: Any) -> None:
        from mmcv.cnn import ConvModule

        super().__init__()
        norm, act = kwargs.get("out_norm_cfg"), dict(kwargs.get("out_conv_cfg") or {})
        order = kwargs.get("out_conv_order", ("act", "conv", "norm"))
        self.out_conv = ConvModule(
            in_channels, out_channels, act.get("kernel_size", 3), padding=1, norm_cfg=norm,
            order=order,
        )  # fmt: skip

    def forward(self, left: Tensor, right: Tensor, size: tuple[int, int]) -> Tensor:
        left, right = (nn.functional.interpolate(each, size) for each in (left, right))
        return self.out_conv(left + right)


_STAND_INS = {
    **dict.fromkeys(("DeformConv2d", "ModulatedDeformConv2d", "MaskedConv2d"), _Conv),
    "CARAFEPack": _Carafe,
    **dict.fromkeys(("SumCell", "GlobalPoolingCell", "ConcatCell"), _Cell),
}
_REGISTERED = {
    **dict.fromkeys(("DCN", "DCNv2", "SAC"), _Conv),
    "carafe": _Carafe,
    "MMSyncBN": nn.BatchNorm2d,
    "MultiScaleDeformableAttention": _Same,
}


class _Operators(types.ModuleType):
    """mmcv.ops and the modules in it: classes of the right names, and functions never called."""

    __path__: list[str] = []  # noqa: RUF012 (that of a package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        kind = _STAND_INS.get(name, _Same)
        made = type(name, (kind,), {"__module__": self.__name__}) if name[0].isupper() else _unused
        setattr(self, name, made)
        return made


def _unused(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("an operator of mmcv's")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        ours = name == "mmcv.ops" or name.startswith("mmcv.ops.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Operators(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_mmdetection() -> None:
    """Import mmdetection without mmcv's operators, once and for this process."""
    sys.meta_path.insert(0, _Finder())
    import mmcv.ops
    from mmengine.registry import MODELS

    assert isinstance(mmcv.ops, _Operators)
    for name, kind in _REGISTERED.items():
        MODELS.register_module(name, module=kind)
    from mmdet.utils import register_all_modules

    register_all_modules()


def families() -> dict[str, Path]:
    """The smallest config of each folder of mmdetection's configs, by its name."""
    import mmdet

    found = {}
    for folder in sorted(Path(mmdet.__file__).parent.joinpath(".mim/configs").iterdir()):
        if folder.name not in _NO_FAMILIES and (configs := sorted(folder.glob("*.py"))):
            found[folder.name] = min(configs, key=lambda path: not _is_small(path.name))
    return found


def _is_small(name: str) -> bool:
    return any(part in name for part in _SMALL)


def build(config: Path) -> nn.Module:
    """The detector of a config, with random weights."""
    from mmdet.registry import MODELS
    from mmengine.config import Config

    model = Config.fromfile(config).model
    while "backbone" not in model:  # those of trackers and of semi-supervision hold another
        model = next(model[name] for name in ("detector", "student") if name in model)
    _drop_weights(model)
    for name in ("data_preprocessor", "teacher_config", "teacher_ckpt", "language_model"):
        model.pop(name, None)
    torch.manual_seed(0)
    built = MODELS.build(model)
    for module in built.modules():
        if type(module).__name__ == "TridentConv":  # holds whatever its memory held
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.01)
    return built


def _drop_weights(config: Any) -> None:
    for name in ("init_cfg", "pretrained") if isinstance(config, dict) else ():
        config.pop(name, None)
    for value in config.values() if isinstance(config, dict) else config:
        if isinstance(value, (dict, list, tuple)):
            _drop_weights(value)


class Run:
    """A call of all parts of a detector, of which some may not run here.

    Attributes:
        failed: why, by the name of the part.
    """

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}

    def __call__(self, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        results: list[Any] = []

        def call(name: str, part: Callable, *inputs: Any) -> Any:
            state = torch.get_rng_state()
            try:
                result = part(*inputs)
            except InputError:
                raise
            except Exception as error:
                torch.set_rng_state(state)
                self.failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
                return None
            results.append(result)
            return result

        size = 128 if "Hourglass" in type(model.backbone).__name__ else 64
        features: Any = call("backbone", model.backbone, torch.randn(2, 3, size, size))
        if features is None:
            return []
        if getattr(model, "neck", None) is not None:
            levels = call("neck", model.neck, features)
            features = features if levels is None else levels
        for name, head, inputs in _heads(model, features):
            call(name, head, *inputs)
        return [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]


def _heads(model: nn.Module, features: Any) -> Iterator[tuple[str, Callable, tuple]]:
    """Names of heads, what to call, and with what."""
    for name in ("rpn_head", "bbox_head", "mask_head", "panoptic_head", "semantic_head"):
        head = getattr(model, name, None)
        for part in ("mask_feature_head", "pixel_decoder"):
            if hasattr(head, part):
                yield f"{name}.{part}", getattr(head, part), (features,)
        if head is not None:
            yield name, head, (features,)
    roi_head = getattr(model, "roi_head", None)
    for name, head in roi_head.named_children() if roi_head is not None else ():
        if name in ("semantic_head", "glbctx_head"):
            yield f"roi_head.{name}", head, (features,)
        for number, each in enumerate(head if isinstance(head, nn.ModuleList) else [head]):
            if "extractor" in name or name in ("semantic_head", "glbctx_head"):
                continue
            convs = [m for m in each.modules() if isinstance(m, nn.Conv2d)]
            first = next(iter(convs), None)
            channels = getattr(each, "in_channels", first.in_channels if first else 256)
            size = getattr(each, "roi_feat_size", (14, 14))
            size = size if isinstance(size, (tuple, list)) else (size, size)
            yield f"roi_head.{name}.{number}", each, (torch.randn(2, channels, *size),)


def step(model: nn.Module, run: Run) -> list[Tensor | None]:
    """Results and gradients of a step in training."""
    model.train()
    results = run(model)
    losses = [each.square().mean() for each in results if each.requires_grad]
    model.zero_grad()
    if losses:  # else nothing ran that trains
        torch.stack(losses).sum().backward()
    return [*(each.detach() for each in results), *(p.grad for p in model.parameters())]


def sweep(model: nn.Module, compare: bool) -> dict[str, Any]:
    """What fuse does to a detector, and whether it changes a bit.

    Args:
        model: any detector of mmdetection. It is modified in place.
        compare: whether to run a step in training before and after.

    Returns:
        The numbers of norms, of those that ran, of those that a ReLU or an addition follows, of
        those of them that are not called alone after fuse; the names of those that are, though
        they are said to be fused; the reasons, where more than one of ten is not fused; what parts
        did not run; and equal, which is None without compare.
    """
    run = Run()
    model.eval()  # some of mmdetection's return nothing
    inject(model)
    norms = [name for name, m in model.named_modules() if isinstance(m, FusedGroupNorm)]
    following, ran = followed_and_called(model, run)
    plain = copy.deepcopy(model) if compare else None
    alone = called_alone(fuse(model), run)
    forms = fused_forms(model)
    fused_norms = {name for name, m in model.named_modules() if forms.get(m, Form()) != Form()}
    left = following & alone
    why: Counter[str] = Counter()
    if len(left) > 0.1 * len(following):
        reasons = why_not_fused(model)
        why.update(reasons.get(model.get_submodule(name), "said to be fused") for name in left)
    equal = None
    if plain is not None:
        pairs = zip(step(model, run), step(plain, run), strict=True)
        equal = all(a is b is None or torch.equal(a, b) for a, b in pairs)
    return {
        "norms": len(norms),
        "ran": len(ran),
        "followed": len(following),
        "fused": len(following - alone),
        "claimed": sorted(fused_norms & alone),
        "why": dict(why.most_common()),
        "failed": run.failed,
        "equal": equal,
    }


def _classes(model: nn.Module) -> set[str]:
    """The classes of a detector's backbone, neck and heads."""
    parts = {name: part for name, part in model.named_children() if "teacher" not in name}
    heads = parts.pop("roi_head", None)
    lists = [*parts.values(), *(heads.children() if heads is not None else ())]
    flat = [m for each in lists for m in (each if isinstance(each, nn.ModuleList) else [each])]
    return {type(each).__name__ for each in flat}


def main(chosen: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    import_mmdetection()
    configs = families()
    if chosen == ["--list"]:
        print(*configs)
        return
    seen: set[str] = set()
    for name in chosen:
        config = configs[name]
        line: dict[str, Any] = {"family": name, "config": config.name}
        try:
            model = build(config)
        except Exception as error:
            text = re.sub(r"\s+", " ", str(error))
            print(json.dumps({**line, "not_built": f"{type(error).__name__}: {text}"}), flush=True)
            continue
        anew = not _classes(model) <= seen
        seen |= _classes(model)
        print(json.dumps({**line, **sweep(model, anew)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
