"""Reading config files: the shipped ones by name, YAML without running code, errors in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gn_det.config.constraints import check_config, check_lazy_config
from gn_det.config.defaults import add_gn_config
from gn_det.errors import InputError
from gn_det.files import check_regular_file
from gn_det.text import nearest

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from omegaconf import DictConfig

__all__ = ["dump_config", "get_config", "load_config", "load_lazy_config"]


def get_config(name: str) -> CfgNode | DictConfig:
    """Read a config file that ships with gn_det.

    Args:
        name: path relative to ``configs/``, such as ``"small/quickstart.yaml"``.

    Returns:
        A CfgNode for a .yaml file, see :func:`load_config`; a DictConfig for a .py file, see
        :func:`load_lazy_config`.

    Raises:
        InputError: there is no such file; the message suggests the nearest name.

    Example::

        from detectron2.modeling import build_model

        detector = build_model(gn_det.get_config("small/quickstart.yaml"))
    """
    root = _configs_root()
    path = root / name
    if not path.is_file():
        shipped = [p.relative_to(root).as_posix() for p in root.rglob("*.*")]
        raise InputError(f"gn_det ships no config {name!r}{nearest(name, shipped)}")
    return load_lazy_config(path) if path.suffix == ".py" else load_config(path)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a YAML config over Detectron2's and gn_det's defaults.

    The safe YAML loader is used for every file and ``_BASE_`` outside the installed Detectron2
    package, so a config cannot run code. MODEL.DEVICE defaults to "auto" here, and "auto" becomes
    "cuda" where there is a GPU, else "cpu".

    Args:
        path: the config file; None for the defaults alone.
        overrides: KEY VALUE KEY VALUE ..., applied last; a ``--`` before them is ignored.

    Raises:
        InputError: a file that is missing or no YAML, a key that does not exist (with the nearest
            one), a value of another type or one that cannot work, an odd number of overrides.
    """
    from detectron2.config import get_cfg

    from gn_det.config.safe_yaml import SafeCfgNode

    defaults = get_cfg()
    add_gn_config(defaults)
    cfg = SafeCfgNode(defaults)
    cfg.MODEL.DEVICE = "auto"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [], [], ""  # what is not said
    if path is not None:
        check_regular_file(path, "config file")
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        if Path(path).suffix == ".py" or re.search(r"^ *_target_:", text, re.MULTILINE):
            raise InputError(
                f"{path} is no YAML config, but a LazyConfig, which tools/lazyconfig_train_net.py "
                "takes; elsewhere take the YAML recipe of the same model, with the weights of the "
                "run in MODEL.WEIGHTS"
            )
        with _one_line_errors(cfg, str(path)):
            cfg.merge_from_file(str(path))
    with _one_line_errors(cfg, "the overrides"):
        overrides = _checked(overrides)
        if len(overrides) % 2:
            raise InputError(f"the overrides are KEY VALUE pairs, and {overrides[-1]} has no value")
        cfg.merge_from_list(overrides)
    cfg.MODEL.DEVICE = _resolve_device(cfg.MODEL.DEVICE)
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    _set_input(cfg, defaults)
    check_config(cfg)
    return cfg


def _set_input(cfg: CfgNode, defaults: CfgNode) -> None:
    """Give a config the mean, deviation and colours that it does not say.

    They are those of the backbone of timm, where the config has one, else Detectron2's.
    """
    mean, std, colours = defaults.MODEL.PIXEL_MEAN, defaults.MODEL.PIXEL_STD, defaults.INPUT.FORMAT
    if name := cfg.MODEL.TIMM.NAME:
        from gn_det.modeling.timm_backbone import timm_input, timm_name_problem

        if not timm_name_problem(name):  # else check_config says what is wrong
            mean, std, colours = timm_input(name)
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_MEAN or mean
    cfg.MODEL.PIXEL_STD = cfg.MODEL.PIXEL_STD or std
    cfg.INPUT.FORMAT = cfg.INPUT.FORMAT or colours


def dump_config(cfg: CfgNode) -> str:
    """YAML of a whole config, which :func:`load_config` reads on any machine.

    A MODEL.DEVICE that this machine would choose by itself is written as "auto".
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.DEVICE == _resolve_device("auto"):
        cfg.MODEL.DEVICE = "auto"
    return cfg.dump()


def load_lazy_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Run a LazyConfig (.py) file and apply overrides.

    The file is Python and is executed. A train.device of "auto" becomes "cuda" where there is a
    GPU, else "cpu".

    Args:
        path: the .py file; YAML dumps of LazyConfigs, which could run code unseen, are refused.
        overrides: key=value ...; ``+key=value`` adds a key that is not there yet.

    Raises:
        InputError: no such .py file, or an override of a key that does not exist (with the
            nearest one).
    """
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    if Path(path).suffix != ".py" or not Path(path).is_file():
        raise InputError(f"LazyConfig file {path} does not exist, or is no .py file")
    try:
        cfg = LazyConfig.load(str(path))
    except SyntaxError as error:
        raise InputError(f"{path} is no Python: {_reason_of_syntax(error)}") from error
    overrides = _checked(overrides)
    absent = object()
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise InputError(f"override {override!r} is not of the form key=value")
        if not key.startswith("+") and OmegaConf.select(cfg, key, default=absent) is absent:
            raise InputError(f"no config key {key}{nearest(key, list(_keys(cfg)))}")
    with _one_line_errors(cfg, "the overrides"):
        LazyConfig.apply_overrides(cfg, overrides)
    if "train" in cfg:  # a file may hold a model alone
        cfg.train.device = _resolve_device(cfg.train.device)
        if isinstance(cfg.train.get("output_dir"), str):
            cfg.train.output_dir = os.path.expanduser(cfg.train.output_dir)
    check_lazy_config(cfg)
    return cfg


def _reason_of_syntax(error: SyntaxError) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error  # the parser's
    return f"{cause.msg}" + (f" in line {cause.lineno}" if cause.lineno else "")


def _resolve_device(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _checked(overrides: Sequence[str]) -> list[str]:
    """Overrides without the ``--`` that may end the flags before them."""
    overrides = list(overrides[1:] if overrides and overrides[0] == "--" else overrides)
    for override in overrides:
        if str(override).startswith("--"):
            raise InputError(f"{override} stands after the config overrides; flags come first")
    return overrides


def _configs_root() -> Path:
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


@contextmanager
def _one_line_errors(cfg: CfgNode, source: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever yacs, fvcore, omegaconf and hydra make of a wrong value
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        missing = re.search(r"Non-existent (?:config )?key: (\S+)", message)
        mismatch = re.search(
            r"Type mismatch \(<class '([\w.]+)'> vs\. <class '([\w.]+)'>\) "
            r"with values \(.* vs\. (.*)\) for config key: (\S+)",
            message,
            re.DOTALL,
        )
        if missing:
            key = missing.group(1)
            message = f"no config key {key}{nearest(key, list(_keys(cfg)))}"
        elif mismatch:
            kind, given, value, key = mismatch.groups()
            if kind.endswith("CfgNode"):
                raise InputError(f"{source}: {key} is a section; set {key}.KEY") from error
            hint = f"; write {value}.0" if (kind, given) == ("float", "int") else ""
            message = f"{key} is {value}, of the type {given}, and has to be a {kind}{hint}"
        raise InputError(f"{source}: {' '.join(message.split())}") from error


def _keys(cfg: CfgNode | DictConfig, prefix: str = "") -> Iterator[str]:
    for key in cfg:
        yield prefix + key
        value = dict.__getitem__(cfg, key) if isinstance(cfg, dict) else cfg._get_node(key)
        if isinstance(value, type(cfg)):
            yield from _keys(value, f"{prefix}{key}.")
