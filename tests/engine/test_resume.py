"""A run goes on with what it began with, or says what is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig
from detectron2.solver import build_lr_scheduler
from omegaconf import DictConfig
from support.programs import ROOT
from torch import nn

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.config import dump_config, load_config, load_lazy_config
from gn_det.engine.command import RunOptions
from gn_det.engine.loop import fit
from gn_det.engine.resume import begin_or_resume
from gn_det.engine.run_data import RunData, check_data
from gn_det.engine.step import AccumulatingTrainer

YAML = ROOT / "configs/small/quickstart.yaml"
LAZY = ROOT / "configs/small/quickstart.py"
RESUMED = RunOptions(resume=True)


def data_of(folder: Path) -> RunData:
    train = str(folder / "train.json"), str(folder / "images")
    return check_data(RunOptions(train=train), [], [])


@pytest.fixture
def begun(edit_shapes: Callable, tmp_path: Path) -> tuple[Path, RunData]:
    """A run's folder with a checkpoint, and its data."""
    data = data_of(edit_shapes(lambda dataset: None))
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = load_config(YAML)
    begin_or_resume(cfg, folder, data, RESUMED)
    (folder / "config.yaml").write_text(dump_config(cfg))
    (folder / "model_0000003.pth").touch()
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    return folder, data


# What was done to a file of the run, and what is said; None for a word, and the run goes on.
TAMPERED = {
    "last_checkpoint removed": (lambda f: (f / "last_checkpoint").unlink(), None),
    "last_checkpoint empty": (lambda f: (f / "last_checkpoint").write_text(""), "names '', which"),
    "last_checkpoint of another": (
        lambda f: (f / "last_checkpoint").write_text("model_0000009.pth"),
        "names 'model_0000009.pth', which is no file .*: model_0000003.pth",
    ),
    "last_checkpoint binary": (
        lambda f: (f / "last_checkpoint").write_bytes(b"\xff\xfe\x00"),
        "last_checkpoint cannot be read",
    ),
    "last_checkpoint a folder": (
        lambda f: [(f / "last_checkpoint").unlink(), (f / "last_checkpoint").mkdir()],
        "last_checkpoint cannot be read",
    ),
    "config.yaml removed": (lambda f: (f / "config.yaml").unlink(), None),
    "config.yaml empty": (lambda f: (f / "config.yaml").write_text(""), "holds no config keys"),
    "config.yaml binary": (lambda f: (f / "config.yaml").write_bytes(b"\xff\xfe"), "is no YAML"),
    "config.yaml of a newer version": (
        lambda f: (f / "config.yaml").write_text("MODEL: {GN: {NEW: 1}}"),
        "no config key MODEL.GN.NEW",
    ),
    "run.json removed": (lambda f: (f / "run.json").unlink(), None),
    "run.json empty": (lambda f: (f / "run.json").write_text(""), r"run\.json is damaged"),
    "run.json of nothing": (lambda f: (f / "run.json").write_text("[]"), r"run\.json is damaged"),
    "run.json of other data": (
        lambda f: (f / "run.json").write_text('{"processes": 1, "data": {}}'),
        "custom_train is another than the run began with: no such set then, 6 images",
    ),
    "nothing": (lambda f: None, ""),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_folder_is_refused_or_said(
    case: str, begun: tuple[Path, RunData], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = begun
    tamper, message = TAMPERED[case]
    tamper(folder)
    if message:
        with pytest.raises(InputError, match=message) as raised:
            begin_or_resume(load_config(YAML), folder, data, RESUMED)
        assert "\n" not in str(raised.value)
    else:
        begin_or_resume(load_config(YAML), folder, data, RESUMED)
        assert ("is missing" in capsys.readouterr().out) == (message is None)


# Overrides of a resumed run, and whether they take effect or are refused.
OVERRIDES = [
    ("SOLVER.BASE_LR 0.001", True),
    ("SOLVER.STEPS (3,)", True),
    ("SOLVER.MAX_ITER 9000", True),
    ("SOLVER.WEIGHT_DECAY 0.5", True),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE 0.25", True),
    ("SOLVER.CHECKPOINT_PERIOD 7", True),
    ("TEST.EVAL_PERIOD 7", True),
    ("DATALOADER.NUM_WORKERS 0", True),
    ("MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.3", True),
    ("MODEL.GN.RECOMPUTE True", True),
    ("MODEL.GN.NUM_GROUPS 16", False),
    ("MODEL.RESNETS.DEPTH 34", False),
    ("MODEL.ROI_HEADS.NUM_CLASSES 5", False),
    ("MODEL.WEIGHTS other.pth", False),
    ("MODEL.BACKBONE.FREEZE_AT 1", False),
    ("SOLVER.IMS_PER_BATCH 1", False),
    ("SOLVER.ACCUMULATE_STEPS 2", False),
    ("INPUT.MIN_SIZE_TRAIN (64,)", False),
    ("INPUT.FORMAT RGB", False),
    ("DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler", False),
]


def assert_told_or_refused(
    cfg: CfgNode | DictConfig,
    key: str,
    may_change: bool,
    begun: tuple[Path, RunData],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, data = begun
    if may_change:
        begin_or_resume(cfg, folder, data, RESUMED)
        assert key in capsys.readouterr().out
    else:
        with pytest.raises(InputError, match=f"{key} is .* in the run, .* in the config"):
            begin_or_resume(cfg, folder, data, RESUMED)


@pytest.mark.parametrize(("override", "may_change"), OVERRIDES)
def test_what_can_change_is_told_and_what_cannot_is_refused(
    override: str, may_change: bool, begun: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    key, value = override.split()
    cfg = load_config(YAML, [key, value])
    assert_told_or_refused(cfg, key, may_change, begun, capsys)


@pytest.mark.parametrize(
    ("override", "may_change"),
    [
        ("optimizer.lr=0.001", True),
        ("train.max_iter=9000", True),
        ("dataloader.test.num_workers=0", True),
        ("model.backbone.out_channels=32", False),
        ("dataloader.train.total_batch_size=1", False),
    ],
)
def test_a_lazy_config_is_compared_alike(
    override: str, may_change: bool, begun: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = begun
    LazyConfig.save(load_lazy_config(LAZY), str(folder / "config.yaml"))
    begin_or_resume(load_lazy_config(LAZY), folder, data, RESUMED)
    assert capsys.readouterr().out == ""
    key = override.partition("=")[0]
    assert_told_or_refused(load_lazy_config(LAZY, [override]), key, may_change, begun, capsys)


CHANGES = {
    "an object less": lambda dataset: dataset["annotations"].pop(),
    "an image less": lambda dataset: dataset.update(
        images=dataset["images"][1:],
        annotations=[a for a in dataset["annotations"] if a["image_id"] != 1],
    ),
    "another class": lambda dataset: dataset["categories"][0].update(name="other"),
    "a moved box": lambda dataset: dataset["annotations"][0]["bbox"].__setitem__(0, 3.5),
    "another file": lambda dataset: dataset["images"][0].update(
        file_name=dataset["images"][1]["file_name"]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changed_are_refused_with_what_they_were(
    change: str, begun: tuple, edit_shapes: Callable
) -> None:
    folder, _ = begun
    data = data_of(edit_shapes(CHANGES[change]))
    with pytest.raises(InputError, match="6 images, .* then, [56] images, .* now"):
        begin_or_resume(load_config(YAML), folder, data, RESUMED)


def test_data_in_another_order_are_the_same(begun: tuple, edit_shapes: Callable) -> None:
    folder, _ = begun
    in_reverse = edit_shapes(lambda d: [d["images"].reverse(), d["annotations"].reverse()])
    begin_or_resume(load_config(YAML), folder, data_of(in_reverse), RESUMED)


def test_another_number_of_processes_is_said(
    begun: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = begun
    begin_or_resume(load_config(YAML), folder, data, RunOptions(resume=True, num_gpus=2))
    assert "began with 1 processes and goes on with 2" in capsys.readouterr().out


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(torch.stack(batch)).mean()}


def train(folder: Path, *overrides: object, resume: bool = True, split: bool = True) -> list[float]:
    """Train a line by the schedule of a config; the learning rates of the steps."""
    cfg = load_config(YAML, ["SOLVER.WARMUP_ITERS", "0", *map(str, overrides)])
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = Loss()
    groups = [[model.layer.weight], [model.layer.bias]] if split else [[*model.parameters()]]
    optimizer = torch.optim.SGD(
        [{"params": group, "weight_decay": cfg.SOLVER.WEIGHT_DECAY} for group in groups],
        lr=cfg.SOLVER.BASE_LR,
        momentum=0.9,
    )
    trainer = AccumulatingTrainer(model, [[torch.ones(2)]] * 100, optimizer)
    rates: list[float] = []
    trainer.after_backward = lambda: rates.append(optimizer.param_groups[0]["lr"])
    fit(
        trainer,
        Checkpointer(model, str(folder), trainer=trainer),
        build_lr_scheduler(cfg, optimizer),
        cfg.SOLVER.MAX_ITER,
        weights="",
        resume=resume,
        checkpoint_period=2,
    )
    train.decay = optimizer.param_groups[0]["weight_decay"]
    return rates


STEPS = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(3,)")


def test_the_learning_rate_of_a_resumed_run_is_that_of_its_config(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *STEPS, "SOLVER.BASE_LR", 1.0, "SOLVER.MAX_ITER", 6)
    assert whole == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1])
    folder = tmp_path / "run"
    assert train(folder, *STEPS, "SOLVER.BASE_LR", 1.0, "SOLVER.MAX_ITER", 2) == [1, 1]
    resumed = train(
        folder, *STEPS, "SOLVER.BASE_LR", 0.5, "SOLVER.MAX_ITER", 6, "SOLVER.WEIGHT_DECAY", 0.25
    )
    assert resumed == pytest.approx([0.5, 0.05, 0.05, 0.05]) and train.decay == 0.25


def test_unchanged_settings_give_the_bits_of_the_run_in_one_piece(tmp_path: Path) -> None:
    settings = ("SOLVER.BASE_LR", 0.3)
    train(tmp_path / "whole", *settings, "SOLVER.MAX_ITER", 6)
    train(tmp_path / "parts", *settings, "SOLVER.MAX_ITER", 6)
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000003.pth")
    assert len(train(tmp_path / "parts", *settings, "SOLVER.MAX_ITER", 6)) == 2
    ours, theirs = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_that_is_past_its_end_says_so(tmp_path: Path) -> None:
    train(tmp_path, "SOLVER.MAX_ITER", 6)
    with pytest.raises(InputError, match="has done 6 iterations already, and SOLVER.MAX_ITER"):
        train(tmp_path, "SOLVER.MAX_ITER", 4)


def test_other_groups_of_parameters_are_refused(tmp_path: Path) -> None:
    train(tmp_path, "SOLVER.MAX_ITER", 2)
    with pytest.raises(InputError, match=r"groups of \[1, 1\] parameters, this one of \[2\]"):
        train(tmp_path, "SOLVER.MAX_ITER", 4, split=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("trainer"), "is no checkpoint of a training, as it has no trainer"),
        (lambda c: c["trainer"].pop("optimizer"), "state of the training in it cannot be used"),
        (lambda c: c["trainer"].update(iteration="three"), "state of the training .* cannot be"),
        (lambda c: c["trainer"].update(optimizer=3), "state of the training .* cannot be used"),
        (lambda c: c["model"].pop("layer.bias"), "does not fit the model: 1 missing"),
        (lambda c: c["model"].update(other=torch.ones(1)), "1 unknown to the model"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused(
    change: Callable, message: str, tmp_path: Path
) -> None:
    train(tmp_path, "SOLVER.MAX_ITER", 2)
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "model_final.pth")
    with pytest.raises(InputError, match=message) as raised:
        train(tmp_path, "SOLVER.MAX_ITER", 4)
    assert "\n" not in str(raised.value)


def test_an_error_in_training_is_told_without_a_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match="not finite"):
        train(tmp_path, "SOLVER.MAX_ITER", 4, "SOLVER.BASE_LR", "1e38", resume=False)
    assert "Exception during training" not in caplog.text
