"""tools/train_classifier.py, and a detector that starts from what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from helpers import ROOT, folder_flags

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.config import load_config

PROGRAM = "tools/train_classifier.py"


def flags(shapes: Path, output: Path, norm: str) -> list[object]:
    return [
        output, "--norm", norm, *folder_flags(shapes),
        "--size", 32, "--batch-size", 4, "--lr", 0.01,
    ]  # fmt: skip


@pytest.mark.parametrize(("norm", "recipe"), [("BN", "frozenbn"), ("BN", "bn"), ("GN", "gn")])
def test_a_detector_starts_from_every_tensor_of_the_backbone(
    norm: str, recipe: str, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "weights.pth"
    call_main(PROGRAM, *flags(shapes, output, norm))
    model = build_model(load_config(ROOT / f"configs/compare/{recipe}.yaml"))
    Checkpointer(model, trainer=torch.optim.SGD(model.parameters(), lr=1.0)).load(
        str(output), checkpointables=[]
    )
    written = torch.load(output, weights_only=True)["model"]
    body = model.backbone.bottom_up.state_dict()
    assert body.keys() <= written.keys()
    assert all(torch.equal(value, written[key]) for key, value in body.items())
    settings = json.loads(output.with_suffix(".json").read_text())
    assert settings["norm"] == norm and 0 <= settings["held-out accuracy"] <= 1


def test_weights_that_are_there_are_kept(shapes: Path, tmp_path: Path, call_main: Callable) -> None:
    output = tmp_path / "weights.pth"
    output.write_text("mine")
    with pytest.raises(InputError, match=r"weights\.pth exists; remove it"):
        call_main(PROGRAM, *flags(shapes, output, "GN"))
    assert output.read_text() == "mine"
