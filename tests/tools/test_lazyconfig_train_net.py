"""tools/lazyconfig_train_net.py end to end, on a tiny set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN
from support.programs import ROOT, folder_flags, run_program

from gn_det import InputError
from gn_det.config import load_lazy_config

CONFIG = ["--config-file", ROOT / "configs/small/quickstart.py"]
TOOL = "tools/lazyconfig_train_net.py"


def tiny(output: Path) -> list[str]:
    return [
        f"train.output_dir={output}", "train.max_iter=2", "train.eval_period=0",
        "train.log_period=1", "dataloader.train.num_workers=0", "dataloader.test.num_workers=0",
    ]  # fmt: skip


def test_trains_evaluates_resumes_and_evaluates_again(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    run = tmp_path / "run"
    flags = [*CONFIG, *folder_flags(shapes)]
    call_main(TOOL, *flags, *tiny(run))
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    assert (run / "config.yaml").exists() and (run / "inference").is_dir()

    with pytest.raises(InputError, match=r"holds a run already.*another output folder"):
        call_main(TOOL, *flags, *tiny(run))
    call_main(TOOL, *flags, "--resume", *tiny(run), "train.max_iter=3")
    checkpoint = torch.load(run / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 2
    weights = f"train.init_checkpoint={run}/model_final.pth"
    call_main(TOOL, *flags, "--eval-only", *tiny(run), weights)


@pytest.mark.slow
def test_a_run_resumed_from_its_middle_ends_with_the_same_weights(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    run = tmp_path / "run"
    flags = [*CONFIG, *folder_flags(shapes)[:3]]
    options = [*tiny(run), "train.max_iter=4", "train.checkpointer.period=2"]
    call_main(TOOL, *flags, *options, "+train.accumulate_steps=2", "train.seed=-1")
    whole = torch.load(run / "model_final.pth", weights_only=True)["model"]
    (run / "model_final.pth").unlink()
    (run / "last_checkpoint").write_text("model_0000001.pth")
    call_main(TOOL, *flags, "--resume", *options, "+train.accumulate_steps=2", "train.seed=-1")
    resumed = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


def test_a_loader_of_ones_own_is_left_alone_and_its_first_batch_is_a_warning(
    shapes: Path, tmp_path: Path, call_main: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "own.py"
    config.write_text(
        "from detectron2.data import build_detection_train_loader\n"
        "from gn_det.config import get_config\n"
        "config = get_config('small/quickstart.py')\n"
        "model, dataloader, optimizer = config.model, config.dataloader, config.optimizer\n"
        "lr_multiplier, train = config.lr_multiplier, config.train\n"
        "def own(**kwargs):\n"
        "    return build_detection_train_loader(**kwargs)\n"
        "dataloader.train._target_ = own\n"
    )
    run = tmp_path / "run"
    flags = ["--config-file", config, *folder_flags(shapes)[:3]]
    call_main(TOOL, *flags, *tiny(run), "train.max_iter=1")
    call_main(TOOL, *flags, "--resume", *tiny(run))
    assert "starts from its first batch" in capfd.readouterr().out


def test_the_classes_of_the_folder_reach_the_model(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    run = tmp_path / "run"
    call_main(TOOL, *CONFIG, *folder_flags(shapes)[:3], *tiny(run))
    weights = torch.load(run / "model_final.pth", weights_only=True)["model"]
    assert weights["roi_heads.box_predictor.cls_score.weight"].shape[0] == 4  # and background
    assert not (run / "results.json").exists()  # there was no held-out split


def test_the_schedule_of_images_per_gpu_is_printed_and_kept(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    call_main(
        TOOL, *CONFIG, *folder_flags(shapes)[:3], *tiny(run),
        "+train.ims_per_gpu=1", "+train.channels_last=True",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"images per step +2 +1 = 1 x 1 GPUs", printed)
    assert re.search(r"iterations +2 +4", printed)
    cfg = yaml.unsafe_load((run / "config.yaml").read_text())  # it names classes
    assert cfg["dataloader"]["train"]["total_batch_size"] == 1
    assert (cfg["train"]["ims_per_gpu"], cfg["train"]["max_iter"]) == (0, 4)
    assert cfg["optimizer"]["lr"] == 0.02
    checkpoint = torch.load(run / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 3
    weight = checkpoint["model"]["backbone.bottom_up.res2.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_hand_over_from_frozen_bn_ends_in_gn(
    shapes: Path, tmp_path: Path, call_main: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    cfg = load_lazy_config(CONFIG[1], ["train.device=cpu"])
    cfg.model._target_ = GeneralizedRCNN
    bn = instantiate(cfg.model).state_dict()
    for value in (value for key, value in bn.items() if key.endswith("running_var")):
        value.uniform_(0.5, 2)  # as a BN that has trained has it
    torch.save(bn, tmp_path / "bn.pth")
    flags = [*CONFIG, *folder_flags(shapes)[:3], *tiny(tmp_path / "run"), "+model.hand_over=True"]
    weights = f"train.init_checkpoint={tmp_path}/bn.pth"
    call_main(TOOL, *flags, weights, "+train.hand_over_steps=1")
    handed = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    name = "backbone.bottom_up.res5.1.conv2.norm"
    assert f"{name}.running_mean" in bn and f"{name}.running_mean" not in handed
    # Fitted to BN's outputs: γ is neither that of BN nor 1.
    assert not torch.allclose(handed[f"{name}.weight"], bn[f"{name}.weight"], atol=1e-3)


def test_a_checkpoint_needs_no_file_of_timms_weights(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    config = tmp_path / "timm.py"
    config.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from detectron2.modeling.backbone import FPN\n"
        "from gn_det.config import load_lazy_config\n"
        "from gn_det.modeling import TimmBackbone\n"
        f"base = load_lazy_config({str(ROOT / 'configs/small/quickstart.py')!r})\n"
        "model, train, optimizer = base.model, base.train, base.optimizer\n"
        "lr_multiplier, dataloader = base.lr_multiplier, base.dataloader\n"
        "model.input_format, model.pixel_mean = 'RGB', [123.675, 116.28, 103.53]\n"
        "model.pixel_std = [58.395, 57.12, 57.375]\n"
        "body = L(TimmBackbone)(name='resnet10t', norm='GN', weights='')\n"
        "model.backbone = L(FPN)(\n"
        "    bottom_up=body, in_features=['res2', 'res3', 'res4', 'res5'], out_channels=64,\n"
        "    top_block=model.backbone.top_block,\n"
        ")\n"
    )
    flags = ["--config-file", config, *folder_flags(shapes), *tiny(tmp_path / "run")]
    call_main(TOOL, *flags)
    gone = f"model.backbone.bottom_up.weights={tmp_path}/gone.pth"
    trained = f"train.init_checkpoint={tmp_path}/run/model_final.pth"
    (tmp_path / "again").mkdir()
    call_main(TOOL, "--eval-only", *flags, gone, trained, f"train.output_dir={tmp_path}/again")
    with pytest.raises(InputError, match=r"gone\.pth: no such file"):
        call_main(TOOL, *flags, gone, f"train.output_dir={tmp_path}/anew")
    weights = tmp_path / "body.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), weights)
    resumed = [*flags, f"model.backbone.bottom_up.weights={weights}"]
    resumed.append(f"train.output_dir={tmp_path}/resumed")
    call_main(TOOL, *resumed)
    weights.unlink()
    call_main(TOOL, "--resume", *resumed, "train.max_iter=3")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+train.hand_over_steps=2"], "no norm of the model was built for it"),
        (["+model.hand_over=True"], r"nothing hands over to GN: set train\.hand_over_steps"),
        (["+train.hand_over_steps=3"], r"hand_over_steps 3 is above train\.max_iter 2"),
        (["+train.hand_over_steps=-1"], "at least 0"),
        (
            ["+model.hand_over=True", "+train.hand_over_steps=2", "train.compile_backbone=True"],
            "torch.compile cannot be combined",
        ),
    ],
)
def test_half_a_hand_over_is_an_error(
    shapes: Path, tmp_path: Path, call_main: Callable, overrides: list[str], message: str
) -> None:
    flags = [*CONFIG, *folder_flags(shapes)[:3], *tiny(tmp_path / "run")]
    with pytest.raises(InputError, match=message):
        call_main(TOOL, *flags, *overrides)


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ("mask_rcnn_R_50_FPN_gn_1x", "backbone.bottom_up"),
        ("mask_rcnn_R_50_C4_gn_1x", "backbone"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_start_from_scratch_with_frozen_layers_is_refused(
    flags: list[str], recipe: str, part: str, tmp_path: Path, call_main: Callable
) -> None:
    config = ["--config-file", ROOT / f"configs/coco/{recipe}.py"]
    overrides = [*tiny(tmp_path / "run"), "train.init_checkpoint="]
    with pytest.raises(InputError, match=r"FREEZE_AT 2 freezes random .*train\.init_checkpoint"):
        call_main(TOOL, *config, *flags, *overrides)
    # What comes next: the data, which is not there.
    with pytest.raises(InputError, match="DETECTRON2_DATASETS"):
        call_main(TOOL, *config, *flags, *overrides, f"model.{part}.freeze_at=0")
    with pytest.raises(InputError, match="DETECTRON2_DATASETS"):
        call_main(TOOL, *config, *flags, "--eval-only", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_on_the_cpu_over_gloo(shapes: Path, tmp_path: Path) -> None:
    done = run_program(
        TOOL, *CONFIG, *folder_flags(shapes), "--num-gpus", 2, "--dist-url", "auto",
        *tiny(tmp_path / "run"), "train.device=cpu", "+train.ims_per_gpu=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 = 2 x 2 GPUs" in done.stdout
    cfg = yaml.unsafe_load((tmp_path / "run" / "config.yaml").read_text())
    assert cfg["dataloader"]["train"]["total_batch_size"] == 4 and cfg["train"]["max_iter"] == 1
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.py"], r"nowhere\.py does not exist"),
        ([*CONFIG, "train.maxiter=3"], r"did you mean train\.max_iter"),
        ([*CONFIG, "train.device=cuda:99"], r"cuda:99.*train\.device=cpu"),
        ([*CONFIG, "train.init_checkpoint=nowhere.pth"], r"weights nowhere\.pth do not exist"),
        (CONFIG, r"instances_train2017\.json; .* DETECTRON2_DATASETS"),
    ],
)
def test_bad_settings_are_refused(
    call_main: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        call_main(TOOL, *arguments)
    assert list(tmp_path.rglob("*.txt")) == []
