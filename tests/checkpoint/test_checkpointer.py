"""Weights that do not fit are refused, with how many keys and which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gn_det import InputError
from gn_det.checkpoint import Checkpointer, check_weights_exist


def model(classes: int = 3, width: int = 4) -> nn.Module:
    parts = {"body": nn.Linear(2, width), "box_predictor": nn.Linear(width, classes)}
    return nn.ModuleDict(parts)


def save(path: Path, state: dict[str, torch.Tensor]) -> str:
    torch.save({"model": state}, path)
    return str(path)


class Trainer:
    """Something to checkpoint beside the model."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


def test_saved_weights_and_trainer_come_back(tmp_path: Path) -> None:
    saved, trainer = model(), Trainer()
    trainer.step = 7
    Checkpointer(saved, str(tmp_path), trainer=trainer).save("model_final")

    resumed, other = model(), Trainer()
    Checkpointer(resumed, str(tmp_path), trainer=other).resume_or_load("", resume=True)
    assert other.step == 7
    assert torch.equal(resumed["body"].weight, saved["body"].weight)
    inference = model()
    Checkpointer(inference).load(str(tmp_path / "model_final.pth"))
    assert torch.equal(inference["body"].weight, saved["body"].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("body.bias"), r"1 missing \(body\.bias\)"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 unknown to the model \(extra\)"),
        (
            lambda s: s.update({"box_predictor.bias": torch.ones(81)}),
            r"1 of another shape \(box_predictor\.bias is \(81,\) in the file, \(3,\) in the model",
        ),
    ],
)
def test_inference_demands_every_tensor_and_no_other(
    tmp_path: Path, change: object, message: str
) -> None:
    state = model().state_dict()
    change(state)
    with pytest.raises(InputError, match=message):
        Checkpointer(model()).load(save(tmp_path / "weights.pth", state))


def test_inference_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"set MODEL\.WEIGHTS"):
        Checkpointer(model()).load("")


def test_training_starts_from_a_backbone_and_says_what_is_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(
        tmp_path / "body.pth", {"body.weight": torch.ones(4, 2), "fc.weight": torch.ones(1)}
    )
    start = model()
    Checkpointer(start, trainer=Trainer()).resume_or_load(path, resume=False)
    assert torch.equal(start["body"].weight, torch.ones(4, 2))
    assert "1 of 4 tensors come from" in caplog.text
    assert "body.bias 1, box_predictor.bias 1, box_predictor.weight 1" in caplog.text
    assert "Not used: fc.weight 1" in caplog.text


def test_training_starts_the_layers_anew_that_follow_the_number_of_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "coco.pth", model(classes=81).state_dict())
    Checkpointer(model(), trainer=Trainer()).resume_or_load(path, resume=False)
    assert "2 of 4 tensors come from" in caplog.text


def test_training_refuses_weights_of_another_architecture(tmp_path: Path) -> None:
    path = save(tmp_path / "wide.pth", model(width=8).state_dict())
    with pytest.raises(InputError, match=r"body\.weight is \(8, 2\) in the file, \(4, 2\)"):
        Checkpointer(model(), trainer=Trainer()).resume_or_load(path, resume=False)


def test_training_refuses_weights_of_which_nothing_fits(tmp_path: Path) -> None:
    path = save(tmp_path / "other.pth", {"encoder.weight": torch.ones(1)})
    with pytest.raises(InputError, match="4 missing .* 1 unknown to the model"):
        Checkpointer(model(), trainer=Trainer()).resume_or_load(path, resume=False)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 truncated"])
def test_a_file_that_holds_no_weights_is_refused_in_one_line(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pth cannot be read as weights") as caught:
        Checkpointer(model()).load(str(tmp_path / "weights.pth"))
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    save(path, model().state_dict())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read as weights"):
        Checkpointer(model()).load(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": {"a": torch.ones(1)}, "meta": {}},
            "holds no weights .* but state_dict, meta",
        ),
        ([torch.ones(1)], "cannot be read as weights|holds no weights"),
    ],
)
def test_checkpoints_of_other_programs_are_told_apart(
    tmp_path: Path, content: object, message: str
) -> None:
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(InputError, match=message):
        Checkpointer(model()).load(str(tmp_path / "foreign.pth"))


def test_detectron2s_matching_heuristics_can_be_asked_for(tmp_path: Path) -> None:
    saved, loaded = model(), model()
    path = save(tmp_path / "weights.pth", saved.state_dict())
    Checkpointer(loaded).load(f"{path}?matching_heuristics=True")
    assert torch.equal(loaded["body"].weight, saved["body"].weight)


def test_weights_must_exist(tmp_path: Path) -> None:
    check_weights_exist("")
    with pytest.raises(InputError, match=r"nowhere\.pth do not exist"):
        check_weights_exist(str(tmp_path / "nowhere.pth"))
    with pytest.raises(InputError, match=r"cannot be fetched.*download them elsewhere"):
        check_weights_exist("http://127.0.0.1:9/weights.pkl")
