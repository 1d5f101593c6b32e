"""A backbone's file and fragment bring a detector to the backbone's features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from support.programs import ROOT

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.backbone_file import check_backbone_file, write_backbone
from gn_det.config import load_config

RECIPE = ROOT / "configs/small/quickstart.yaml"
CONFIG = {
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": (58.395, 57.12, 57.375),
    "INPUT.FORMAT": "RGB",
}


def body_of(cfg: CfgNode) -> torch.nn.Module:
    return build_model(cfg).backbone.bottom_up


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    state = body_of(load_config(RECIPE)).state_dict()
    return {key: torch.rand_like(value) for key, value in state.items()}


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".pkl"])
def test_a_config_of_recipe_and_fragment_trains_from_every_tensor(
    tmp_path: Path, weights: dict[str, torch.Tensor], ending: str
) -> None:
    file = tmp_path / "backbones" / f"r18{ending}"
    write_backbone(file, weights, CONFIG)
    config = tmp_path / "mine.yaml"
    config.write_text(f"_BASE_: [{RECIPE}, backbones/r18.yaml]\nSOLVER:\n  MAX_ITER: 7\n")
    cfg = load_config(config)
    assert (cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT, cfg.SOLVER.MAX_ITER) == (str(file), "RGB", 7)
    assert cfg.MODEL.RESNETS.DEPTH == load_config(RECIPE).MODEL.RESNETS.DEPTH
    assert list(cfg.MODEL.PIXEL_STD) == [58.395, 57.12, 57.375]

    for checkpointer in (Checkpointer, DetectionCheckpointer):
        if checkpointer is DetectionCheckpointer and ending == ".safetensors":
            continue  # which it does not read
        model = build_model(cfg)
        trainer = torch.optim.SGD(model.parameters(), lr=0.1)
        checkpointer(model, trainer=trainer).load(cfg.MODEL.WEIGHTS, checkpointables=[])
        loaded = model.backbone.bottom_up.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


def test_the_fragment_is_plain_yaml_that_detectron2_takes_alone(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_backbone(Path("out/r18.pth"), weights, CONFIG)
    text = Path("out/r18.yaml").read_text()
    assert text == (
        "# What a detector shares with r18.pth: _BASE_: [recipe.yaml, r18.yaml]\n"
        "MODEL:\n"
        "  RESNETS: {STRIDE_IN_1X1: false, NORM: BN}\n"
        "  PIXEL_MEAN: [123.675, 116.28, 103.53]\n"
        "  PIXEL_STD: [58.395, 57.12, 57.375]\n"
        "  WEIGHTS: out/r18.pth\n"
        "INPUT: {FORMAT: RGB}\n"
        "VERSION: 2\n"
    )
    assert yaml.safe_load(text)["MODEL"]["WEIGHTS"] == "out/r18.pth"
    cfg = get_cfg()
    cfg.merge_from_file("out/r18.yaml")
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert load_config("out/r18.yaml").INPUT.FORMAT == "RGB"


@pytest.mark.parametrize("there", ["r18.pth", "r18.yaml"])
def test_neither_file_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(InputError, match=f"{there} exists; remove it, or name another"):
        write_backbone(tmp_path / "r18.pth", {"stem.conv1.weight": torch.ones(1)}, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.parametrize("full", ["r18.pth", "r18.yaml"])
def test_a_full_disk_leaves_neither_file(tmp_path: Path, full: str) -> None:
    (tmp_path / f"{full}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match=rf"{full} cannot be written: No space left on device"):
        write_backbone(tmp_path / "r18.pth", {"stem.conv1.weight": torch.ones(1)}, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_other_endings_are_refused() -> None:
    with pytest.raises(InputError, match=r"w\.onnx ends in none of \.pth, \.safetensors, \.pkl"):
        check_backbone_file(Path("w.onnx"))


@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".pkl"])
def test_views_half_precision_and_gradients_are_written_as_values(
    tmp_path: Path, ending: str
) -> None:
    base = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    weights = {"stem.a": base.t(), "stem.b": base[0], "stem.c": base.bfloat16()}
    write_backbone(tmp_path / f"w{ending}", weights, {})
    model = torch.nn.Module()
    model.stem = torch.nn.Module()
    for name, shape in (("a", (3, 2)), ("b", (3,)), ("c", (2, 3))):
        model.stem.register_buffer(name, torch.zeros(shape))
    Checkpointer(model).load(str(tmp_path / f"w{ending}"))
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value.float())
