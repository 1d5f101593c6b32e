"""Names of timm's models, of their classifiers and of their modules."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from gn_det.text import nearest

__all__ = ["classifiers_of", "flat_name", "timm_name_problem"]

_HOLDER = re.compile(r"^(model|body)\.")  # that some models are in


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


def flat_name(name: str) -> str:
    """The name of a module or tensor as in models with features_only.

    timm joins the parts of some names by "_" there, and holds some models in one of its own.
    """
    return _HOLDER.sub("", name).replace(".", "_")


def classifiers_of(timm_model: Any) -> tuple[str, ...]:
    """What the names of a timm model's classifiers begin with, such as ``head.fc.``."""
    names = timm_model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
