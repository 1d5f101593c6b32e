"""tools/convert_bn_to_gn.py on detectors and classifiers, and its results in train_net.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from support.models import lite0_weights
from support.programs import ROOT, TINY, folder_flags

from gn_det import FusedGroupNorm, InputError
from gn_det.checkpoint import Checkpointer
from gn_det.classification.training import ClassifierRecipe, train_classifier
from gn_det.config import load_config

distillation = sys.modules["gn_det.injection.distill"]  # which a function of that name hides
PROGRAM = "tools/convert_bn_to_gn.py"
TRAIN_NET = "tools/train_net.py"
BN = ["--config-file", ROOT / "configs/compare/bn.yaml"]
FROZEN = ["--config-file", ROOT / "configs/compare/frozenbn.yaml"]


def small(output: Path, weights: Path | str) -> list[object]:
    return [
        "--output",
        output,
        "--distill",
        0,
        "MODEL.WEIGHTS",
        weights,
        "DATALOADER.NUM_WORKERS",
        0,
    ]


def weights_of(config: Path, path: Path) -> Path:
    """Weights of the config's model, whose norms are no identities."""
    torch.manual_seed(0)
    model = build_model(load_config(config, ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]))
    for name, tensor in model.state_dict().items():
        if name.endswith(("norm.weight", "running_var")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("norm.bias", "running_mean")):
            tensor.uniform_(-0.5, 0.5)
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def bn_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of(BN[1], tmp_path_factory.mktemp("bn") / "weights.pth")


@pytest.fixture(scope="module")
def frozen_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of(FROZEN[1], tmp_path_factory.mktemp("frozen") / "weights.pth")


@pytest.mark.slow
def test_a_frozenbn_detector_is_converted_evaluated_fine_tuned_and_trains_on(
    frozen_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable, capsys
) -> None:
    output = tmp_path / "converted"
    call_main(
        PROGRAM, *FROZEN, *folder_flags(shapes), "--calibration-images", 3, "--fine-tune", 2,
        *small(output, frozen_weights),
    )  # fmt: skip
    read = json.loads((output / "report.json").read_text())
    assert list(read["stages"]) == ["BN", "copied", "calibrated", "fine-tuned"]
    assert read["metric"] == "mask AP" and read["seed"] == 0
    assert read["stages"]["BN"] == read["results"]["BN"]["segm"]["AP"]
    rows = read["calibration"]["rows"]
    assert len(rows) == 20 and all(row["values"] > 0 for row in rows)
    assert read["calibration"]["calibrated"] < 0.9 * read["calibration"]["copied"]
    assert "| fine-tuned" in (output / "report.md").read_text()
    assert "(conversion.png)" in (output / "report.md").read_text()
    assert (output / "conversion.png").exists()
    assert f"{output}: model_gn.pth, config.yaml" in capsys.readouterr().out

    # The config beside the weights: strictly loaded, frozen where FREEZE_AT says, convolutions kept
    cfg = load_config(output / "config.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "GNGeneralizedRCNN"
    assert cfg.MODEL.GN.SITES == ["backbone"]
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    norms = [m for m in model.modules() if isinstance(m, FusedGroupNorm)]
    assert len(norms) == 20
    assert sum(not norm.weight.requires_grad for norm in norms) == 5
    before = torch.load(frozen_weights, weights_only=True)["model"]
    for name, tensor in model.state_dict().items():
        if "norm" not in name:
            assert torch.equal(tensor, before[name]), name
    tuned = torch.load(output / "fine_tuned" / "model_final.pth", weights_only=True)["model"]
    frozen, trained = "backbone.bottom_up.stem.conv1", "backbone.bottom_up.res5.1.conv2"
    assert torch.equal(tuned[f"{frozen}.norm.weight"], norms[0].weight)
    assert not torch.equal(tuned[f"{trained}.weight"], before[f"{trained}.weight"])

    # ... evaluates to what the report says of the calibrated model, and trains.
    config = ["--config-file", output / "config.yaml"]
    call_main(TRAIN_NET, *config, "--eval-only")
    predicted = "inference/coco_instances_results.json"
    again, stage = (
        [r["score"] for r in json.loads((output / part / predicted).read_text())]
        for part in ("run/evaluation", "evaluation/2")
    )
    assert again == pytest.approx(stage, rel=1e-3, abs=1e-5)
    call_main(TRAIN_NET, *config, *TINY)
    assert (output / "run" / "model_final.pth").exists()


@pytest.mark.slow
def test_bn_in_every_head_is_fitted_on_boxes_that_both_models_get(
    bn_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "converted"
    call_main(
        PROGRAM, *BN, *folder_flags(shapes)[:3], "--calibration-images", 2,
        *small(output, bn_weights),
    )  # fmt: skip
    read = json.loads((output / "report.json").read_text())
    assert read["stages"] == {} and read["metric"] == ""
    rows = read["calibration"]["rows"]
    assert {row["site"] for row in rows} == {"backbone", "fpn", "box_head", "mask_head"}
    assert all(row["values"] > 0 and row["calibrated"] is not None for row in rows)
    cfg = load_config(output / "config.yaml")
    assert cfg.MODEL.GN.SITES == ["backbone", "fpn", "box_head", "mask_head"]
    Checkpointer(build_model(cfg)).load(cfg.MODEL.WEIGHTS)
    assert "By stage" not in (output / "report.md").read_text()
    assert not (output / "evaluation").exists()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(
    frozen_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    flags = [*FROZEN, *folder_flags(shapes)[:3], "--calibration-images", 2]
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        call_main(PROGRAM, *flags, *small(tmp_path / name, frozen_weights), "SEED", seed)
    one, again, other = (
        torch.load(tmp_path / name / "model_gn.pth", weights_only=True)["model"]
        for name in ("one", "again", "other")
    )
    norm = "backbone.bottom_up.stem.conv1.norm.weight"
    assert torch.equal(one[norm], again[norm]) and not torch.equal(one[norm], other[norm])


def test_groups_are_those_of_the_config(
    frozen_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    call_main(
        PROGRAM, *FROZEN, *folder_flags(shapes)[:3], "--calibration-images", 1,
        *small(tmp_path / "out", frozen_weights), "MODEL.GN.CHANNELS_PER_GROUP", 16,
    )  # fmt: skip
    read = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["channels"] // row["num_groups"] for row in read["calibration"]["rows"]} == {16}
    model = build_model(load_config(tmp_path / "out" / "config.yaml"))
    assert model.backbone.bottom_up.stem.conv1.norm.num_groups == 4


def test_a_model_without_bn_is_an_error_and_leaves_no_folder(
    frozen_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    config = ["--config-file", ROOT / "configs/compare/gn.yaml"]
    with pytest.raises(InputError, match="GNGeneralizedRCNN has no BN, SyncBN or FrozenBN layer"):
        call_main(PROGRAM, *config, *folder_flags(shapes), *small(tmp_path / "out", frozen_weights))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.WEIGHTS", ""], "there are no weights to convert: set MODEL.WEIGHTS"),
        (["MODEL.GN.WEIGHT_STANDARDIZATION", "True"], "would change what the convolutions"),
        (["DATASETS.TRAIN", "()"], "no data set is given"),
    ],
)
def test_what_could_not_be_converted_is_an_error_at_once(
    options: list[str], message: str, frozen_weights: Path, shapes: Path, tmp_path: Path,
    call_main: Callable,
) -> None:  # fmt: skip
    flags = [] if "DATASETS.TRAIN" in options else folder_flags(shapes)
    with pytest.raises(InputError, match=message):
        call_main(PROGRAM, *FROZEN, *flags, *small(tmp_path / "out", frozen_weights), *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", ["model_gn.pth", "last_checkpoint", "fine_tuned"])
def test_what_is_there_is_kept(
    there: str, frozen_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(InputError, match="exists and is no empty folder; name another"):
        call_main(PROGRAM, *FROZEN, *folder_flags(shapes), *small(tmp_path, frozen_weights))
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


@pytest.mark.slow
def test_a_fine_tuning_that_diverges_leaves_weights_and_report(
    frozen_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "converted"
    with pytest.raises(InputError, match="diverged"):
        call_main(
            PROGRAM, *FROZEN, *folder_flags(shapes)[:3], "--calibration-images", 1,
            "--fine-tune", 6, *small(output, frozen_weights), "SOLVER.BASE_LR", "1e20",
            "SOLVER.CLIP_GRADIENTS.ENABLED", "False", "SOLVER.WARMUP_ITERS", 0,
        )  # fmt: skip
    Checkpointer(build_model(load_config(output / "config.yaml"))).load(
        str(output / "model_gn.pth")
    )
    assert (output / "report.md").exists()


def test_a_number_of_pictures_below_one_is_an_error(call_main: Callable) -> None:
    with pytest.raises(InputError, match="--calibration-images 0: at least 1"):
        call_main(PROGRAM, *FROZEN, "--calibration-images", 0)


def trained(folder: Path, norm: str, data: Path) -> Path:
    folder.mkdir()
    recipe = ClassifierRecipe(str(data), "resnet18", norm, size=32, epochs=1, ims_per_gpu=4)
    train_classifier(recipe, folder, quiet=True)
    return folder


def test_what_is_converted_is_calibrated_fine_tuned_and_a_detectors_backbone(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    source = trained(tmp_path / "bn", "BN", shapes)
    output = tmp_path / "gn"
    call_main(
        PROGRAM, "--classifier", source, "--output", output, "--calibration-images", 8,
        "--distill", 0, "--fine-tune", 1, "--device", "cpu",
    )  # fmt: skip
    assert "calibrated" in capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert list(report["stages"]) == ["BN", "copied", "calibrated", "fine-tuned"]
    own = json.loads((source / "results.json").read_text())["val_error"]
    assert report["stages"]["BN"] == pytest.approx(own)
    assert report["calibration"]["calibrated"] < report["calibration"]["copied"]
    assert "By stage" in (output / "report.md").read_text()
    assert (output / "conversion.png").exists()

    before = torch.load(source / "backbone.pth", weights_only=True)["model"]
    after = torch.load(output / "backbone.pth", weights_only=True)["model"]
    convs = [key for key in after if "norm" not in key]
    assert len(convs) == 20 and all(torch.equal(after[key], before[key]) for key in convs)
    both = tmp_path / "both.yaml"
    both.write_text(f"_BASE_: [{ROOT}/configs/compare/gn.yaml, gn/backbone.yaml]\n")
    cfg = load_config(both)
    model = build_model(cfg)
    Checkpointer(model, trainer=torch.optim.SGD(model.parameters(), lr=1.0)).load(
        cfg.MODEL.WEIGHTS, checkpointables=[]
    )
    body = model.backbone.bottom_up.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in body.items())
    with pytest.raises(InputError, match="gn exists and is no empty folder"):
        call_main(PROGRAM, "--classifier", source, "--output", output)


def test_a_classifier_learns_from_the_one_with_bn(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    source, output = trained(tmp_path / "bn", "BN", shapes), tmp_path / "gn"
    call_main(
        PROGRAM, "--classifier", source, "--output", output, "--calibration-images", 8,
        "--distill", 5, "--device", "cpu",
    )  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert list(report["stages"]) == ["BN", "copied", "calibrated", "distilled"]
    assert list(report["levels"]) == ["copied", "calibrated", "distilled"]
    assert list(report["levels"]["distilled"]) == ["res2", "res3", "res4", "res5", "linear"]
    assert len(report["distillation_losses"]) == 5
    text = (output / "report.md").read_text()
    assert "| res5    |" in text and "in 5 steps of 32 training images" in text
    weights = torch.load(output / "backbone.pth", weights_only=True)["model"]
    whole = torch.load(output / "model_gn.pth", weights_only=True)["model"]
    assert all(torch.equal(value, whole[f"backbone.{key}"]) for key, value in weights.items())


@pytest.mark.slow
def test_a_detectors_backbone_learns_from_the_one_with_bn(
    frozen_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "converted"
    call_main(
        PROGRAM, *FROZEN, *folder_flags(shapes)[:3], "--calibration-images", 2, "--distill", 4,
        "--output", output, "MODEL.WEIGHTS", frozen_weights, "DATALOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert [*report["levels"]["distilled"]] == ["p2", "p3", "p4", "p5", "p6"]
    assert len(report["distillation_losses"]) == 4 and (output / "distillation.png").exists()
    cfg = load_config(output / "config.yaml")
    Checkpointer(build_model(cfg)).load(cfg.MODEL.WEIGHTS)


def test_what_cannot_be_converted_is_an_error(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    source = trained(tmp_path / "gn", "GN", shapes)
    convert = [PROGRAM, "--output", tmp_path / "out", "--calibration-images", 2, "--classifier"]
    with pytest.raises(InputError, match="has no BN, SyncBN or FrozenBN layer"):
        call_main(*convert, source)
    with pytest.raises(InputError, match=r"--calibration-images 9999: from 1 to"):
        call_main(*convert, source, "--calibration-images", 9999)
    with pytest.raises(InputError, match="no finished classifier"):
        call_main(*convert, tmp_path / "nowhere")
    with pytest.raises(InputError, match="their flags and overrides go with --config-file"):
        call_main(*convert, source, "SOLVER.BASE_LR", 1)
    with pytest.raises(InputError, match="--num-groups, --lr: a detector's config says it"):
        call_main(PROGRAM, *BN, "--output", tmp_path / "out", "--num-groups", 8, "--lr", 0.1)
    assert not (tmp_path / "out").exists()


def interrupted(monkeypatch: pytest.MonkeyPatch, convert: Callable[[], None]) -> None:
    """Call a function, and interrupt it in its second step of distillation."""
    levels, steps = distillation.level_loss, []

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        steps.append(torch.is_grad_enabled())
        if len(steps) > 6:
            raise KeyboardInterrupt
        return levels(*tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distillation, "level_loss", loss)
        convert()


@pytest.mark.slow
@pytest.mark.parametrize("of", ["detector", "classifier"])
def test_an_interrupted_conversion_goes_on_to_the_same_weights(
    of: str, frozen_weights: Path, shapes: Path, tmp_path: Path, call_main: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if of == "detector":
        keys = ["MODEL.WEIGHTS", frozen_weights, "DATALOADER.NUM_WORKERS", 0, "SEED", 3]
        asked = [*FROZEN, *folder_flags(shapes), "--calibration-images", 2, "--distill", 3]
    else:
        keys = []
        source = trained(tmp_path / "bn", "BN", shapes)
        asked = ["--classifier", source, "--calibration-images", 2, "--distill", 3]

    def convert(name: str) -> None:
        call_main(PROGRAM, *asked, "--output", tmp_path / name, *keys)

    convert("whole")
    interrupted(monkeypatch, lambda: convert("broken"))
    assert (tmp_path / "broken/distillation.checkpoint").exists()
    with pytest.raises(InputError, match="other settings: calibration_images is 2 in the run"):
        call_main(
            PROGRAM, *asked, "--output", tmp_path / "broken", "--calibration-images", 4, *keys
        )
    convert("broken")
    for name in ("model_gn.pth", "report.json"):
        one, other = (tmp_path / folder / name for folder in ("whole", "broken"))
        if name.endswith(".json"):
            one, other = (json.loads(file.read_text()) for file in (one, other))
            assert one["distillation_losses"] == other["distillation_losses"]
        else:
            one, other = (torch.load(file)["model"] for file in (one, other))
            assert all(torch.equal(value, other[key]) for key, value in one.items())
    with pytest.raises(InputError, match="broken exists and is no empty folder"):
        convert("broken")


@pytest.fixture
def lite0(tmp_path: Path) -> Path:
    return lite0_weights(tmp_path / "lite0.pth")


PHOTOS = ["--backbone", ROOT / "configs/compare/photos/gn_distilled.yaml"]


@pytest.mark.slow
def test_a_timm_backbone_alone_becomes_weights_of_its_recipe(
    edit_shapes: Callable, tmp_path: Path, lite0: Path, call_main: Callable
) -> None:
    shapes = edit_shapes(lambda dataset: None)
    output = tmp_path / "converted"
    asked = [
        PROGRAM, *PHOTOS, "--output", output, "--distill", 2, "--calibration-images", 2,
        *folder_flags(shapes), "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64,
        # That of a run, whose config may be given, is of a whole detector.
        "MODEL.WEIGHTS", lite0, "MODEL.TIMM.WEIGHTS", lite0, "SEED", -1,
    ]  # fmt: skip
    call_main(*asked)
    report = (output / "report.md").read_text()
    assert "| level   |   copied |   calibrated |   distilled |" in report
    assert (output / "distillation.png").exists() and (output / "calibrated.pth").exists()
    made = torch.load(output / "distilled.pth")["state_dict"]
    assert not torch.equal(made["bn1.weight"], torch.load(lite0)["bn1.weight"])
    model = build_model(
        load_config(PHOTOS[1], ["MODEL.TIMM.WEIGHTS", str(output / "distilled.pth")])
    )
    norm = model.backbone.bottom_up.body.bn1
    assert norm.num_groups == 1
    assert torch.equal(norm.weight.cpu(), made["bn1.weight"])

    # Interrupted at the end of the distillation, it goes on; with other settings it is refused.
    (output / "distilled.pth").unlink()
    call_main(*asked)
    again = torch.load(output / "distilled.pth")["state_dict"]
    assert all(torch.equal(value, again[key]) for key, value in made.items())
    with pytest.raises(InputError, match=r"other settings: .*num_groups.*, or remove that"):
        call_main(*asked, "MODEL.GN.NUM_GROUPS", 4)
    edit_shapes(lambda dataset: dataset["annotations"].pop())
    with pytest.raises(InputError, match="custom_train is another than the run began with"):
        call_main(*asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--distill", 0], "--distill 0: a backbone alone learns"),
        (["--fine-tune", 1], "--fine-tune: a backbone alone is trained with its detector"),
        (["MODEL.GN.HAND_OVER_STEPS", 9], "hands over from BN .* needs no converted weights"),
        (["--lr", 0.1], "--lr: a detector's config says it"),
        (["MODEL.TIMM.WEIGHTS", ""], "no weights to convert: set MODEL.TIMM.WEIGHTS"),
        (["MODEL.BACKBONE.NAME", "build_resnet_backbone"], "build_resnet_backbone is no backbone"),
    ],
)
def test_a_backbone_alone_that_cannot_be_converted_is_an_error(
    change: list, message: str, shapes: Path, tmp_path: Path, lite0: Path, call_main: Callable
) -> None:
    output = tmp_path / "converted"
    keys = [] if change[0].startswith("--") else change
    flags = change if not keys else []
    with pytest.raises(InputError, match=message):
        call_main(
            PROGRAM, *PHOTOS, "--output", output, *flags, *folder_flags(shapes),
            "MODEL.TIMM.WEIGHTS", lite0, *keys,
        )  # fmt: skip
    assert not output.exists()
