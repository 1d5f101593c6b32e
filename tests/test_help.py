"""What help() says of the public names: its examples run, and its lists are complete."""

from __future__ import annotations

import inspect
import re
import textwrap

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

import gn_det
from gn_det.injection.sites import DEFAULT_SITES

# Everything that has a docstring of its own; revert is unfuse.
DOCUMENTED = {
    name: getattr(gn_det, name) for name in gn_det.__all__ if callable(getattr(gn_det, name))
}
DOCUMENTED.pop("revert")


@pytest.fixture
def names() -> dict[str, object]:
    """What the examples have at hand: Detectron2's Mask R-CNN, and what every reader imports."""
    cfg = gn_det.get_config("small/mask_rcnn_R_18_FPN_gn.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "GeneralizedRCNN"
    return {"gn_det": gn_det, "torch": torch, "nn": nn, "model": build_model(cfg)}


def run_block(doc: str, title: str, names: dict[str, object]) -> None:
    """Run the indented block behind a line that ends with a title."""
    block = re.search(rf"{re.escape(title)}\n\n((?:[ ]+.*\n|\n)+)", doc + "\n")
    assert block, f"there is no block behind {title!r}"
    exec(textwrap.dedent(block[1]), names)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_of_every_public_name_runs(name: str, names: dict[str, object]) -> None:
    run_block(inspect.getdoc(DOCUMENTED[name]), "Example::", names)


def test_the_example_of_the_package_runs(
    names: dict[str, object], capsys: pytest.CaptureFixture
) -> None:
    run_block(gn_det.__doc__, "in place::", names)
    assert "GN+add+ReLU" in capsys.readouterr().out


def test_the_package_names_everything_public() -> None:
    words = set(re.findall(r"\w+", gn_det.__doc__))
    assert {name for name in gn_det.__all__ if name != "__version__"} <= words


def test_inject_lists_every_site_with_a_phrase() -> None:
    doc = inspect.getdoc(gn_det.inject)
    listed = re.search(r"\nSites:\n(.+?)\n\n", doc, re.DOTALL)[1]
    assert re.findall(r"^    ([\w.]+): \w", listed, re.MULTILINE) == list(gn_det.SITES)


def test_inject_says_which_sites_are_the_default() -> None:
    doc = " ".join(inspect.getdoc(gn_det.inject).split())
    listed = re.search(r'"default" means (.+?): the sites', doc)[1]
    assert re.split(", | and ", listed) == list(DEFAULT_SITES)
