"""Weights with BN in a model with GN are loaded, and said."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable

import pytest
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import nn

import gn_det
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.backbone_file import write_backbone
from gn_det.checkpoint.resnet_layouts import build_resnet, to_detectron
from gn_det.modeling.with_gn import with_gn


class Nothing:
    """A trainer without a state."""

    def state_dict(self) -> dict:
        return {}


def resnet(norm: str) -> ResNet:
    return build_resnet({"DEPTH": 18, "NORM": norm, "RES2_OUT_CHANNELS": 64})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], str]:
    """The file of a ResNet's weights, by its norm and whether its statistics are folded."""

    @functools.cache
    def write(norm: str, folded: bool) -> str:
        weights = {
            key: value / 2 if ".norm.weight" in key else value
            for key, value in resnet(norm).state_dict().items()
        }
        file = tmp_path_factory.mktemp("weights") / ("fair.pkl" if folded else "ours.pth")
        write_backbone(file, to_detectron(weights) if folded else weights, {})
        return str(file)

    return write


def mixed() -> nn.Module:
    """FrozenBN in the backbone, GN in a head."""
    return nn.ModuleDict({"backbone": resnet("FrozenBN"), "head": BasicStem(3, 64, norm="GN")})


@pytest.mark.parametrize(
    ("norm", "model", "freeze_at", "told"),
    [
        ("FrozenBN", "gn", 2, "20 GN layers took γ and β of BN .*, and 5 of them are frozen"),
        (
            "FrozenBN",
            "gn",
            0,
            "20 GN layers took γ and β of BN [^,]*, without its statistics. Name",
        ),
        ("FrozenBN", "injected", 2, "20 GN layers took γ and β of BN .*, and 5 of them are frozen"),
        ("GN", "gn", 2, None),
        ("FrozenBN", "bn", 2, None),
        ("FrozenBN", "mixed", 0, None),
        ("FrozenBN", "handed_over", 0, None),
    ],
)
@pytest.mark.parametrize("folded", [False, True])
def test_gn_that_took_bns_parameters_is_said(
    folded: bool,
    norm: str,
    model: str,
    freeze_at: int,
    told: str | None,
    written: Callable[[str, bool], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if model == "mixed":
        module = mixed()
    else:
        backbone = resnet({"gn": "GN"}.get(model, "FrozenBN"))
        module = nn.ModuleDict({"backbone": backbone.requires_grad_(True).freeze(freeze_at)})
        if model == "handed_over":
            with_gn(module, "default", hand_over=True)
    if model == "injected":
        gn_det.fuse(gn_det.inject(module))
    with caplog.at_level(logging.WARNING, "gn_det"):
        checkpointer = Checkpointer(module, trainer=Nothing())
        checkpointer.load(written(norm, folded), checkpointables=[])
    said = [m for m in map(logging.LogRecord.getMessage, caplog.records) if "of BN" in m]
    assert len(said) == (told is not None)
    if told:
        assert re.search(told, said[0])
    if model == "injected":
        assert all(row.of_bn for row in gn_det.audit(module).rows)
