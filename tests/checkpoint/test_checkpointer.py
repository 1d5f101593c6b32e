"""Weights that do not fit are refused, with how many keys and which."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.programs import ROOT
from torch import nn

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.checkpointer import last_checkpoint


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
            r"is \(81,\) in the file, \(3,\) in the model\)\. .* other classes .* --train as well",
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


def test_other_queries_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.pth", model().state_dict())
    with pytest.raises(InputError, match=r"\?heuristics=True is not known; \?matching_heuristics"):
        Checkpointer(model()).load(f"{path}?heuristics=True")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("missing", ["", "box_predictor.bias"])
def test_a_file_that_does_not_fit_leaves_every_tensor_as_it_was(
    tmp_path: Path, training: bool, missing: str
) -> None:
    other, kept = model(width=8), model()
    state = {**model().state_dict(), "body.weight": other.state_dict()["body.weight"]}
    state.pop(missing, None)
    path = save(tmp_path / "weights.pth", state)
    before = {key: value.clone() for key, value in kept.state_dict().items()}
    checkpointer = Checkpointer(kept, **({"trainer": Trainer()} if training else {}))
    with pytest.raises(InputError, match=r"body\.weight is \(8, 2\) in the file"):
        checkpointer.resume_or_load(path, resume=False)
    assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())
    checkpointer.resume_or_load(save(tmp_path / "good.pth", model().state_dict()), resume=False)
    assert not torch.equal(kept["body"].weight, before["body.weight"])


def test_names_that_fit_several_places_leave_every_tensor_as_it_was(tmp_path: Path) -> None:
    kept = nn.ModuleDict({"a": model(), "b": model()})
    before = {key: value.clone() for key, value in kept.state_dict().items()}
    path = save(tmp_path / "weights.pth", model().state_dict())
    with pytest.raises(InputError, match="one checkpoint key to multiple keys"):
        Checkpointer(kept).load(f"{path}?matching_heuristics=True")
    assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_symlink()}


@pytest.fixture
def good(tmp_path: Path) -> Checkpointer:
    """A checkpointer that has saved model_0000001.pth, and will save another model next."""
    Checkpointer(model(), str(tmp_path)).save("model_0000001")
    return Checkpointer(model(), str(tmp_path))


def test_a_full_disk_leaves_the_last_good_checkpoint(good: Checkpointer, tmp_path: Path) -> None:
    before = saved(tmp_path)
    (tmp_path / "model_0000002.pth.partial").symlink_to("/dev/full")
    message = (
        r"model_0000002\.pth cannot be written: No space left on device \(.* MiB free\); "
        r".*model_0000001\.pth is as it was, and a resumed run starts from it"
    )
    with pytest.raises(InputError, match=message):
        good.save("model_0000002")
    assert saved(tmp_path) == before
    assert not (tmp_path / "model_0000002.pth.partial").is_symlink()
    assert good.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")


def test_a_disk_that_is_full_for_the_tag_keeps_the_one_before(
    good: Checkpointer, tmp_path: Path
) -> None:
    (tmp_path / "last_checkpoint.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot be written"):
        good.save("model_0000002")
    assert good.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")


def test_a_folder_that_cannot_be_written_leaves_the_last_good_checkpoint(
    good: Checkpointer, tmp_path: Path
) -> None:
    before = saved(tmp_path)
    tmp_path.chmod(0o555)
    process = multiprocessing.get_context("fork").Process(target=save_as_nobody, args=(good,))
    process.start()
    process.join()
    tmp_path.chmod(0o755)
    assert process.exitcode == 0
    assert saved(tmp_path) == before


def save_as_nobody(checkpointer: Checkpointer) -> None:
    """Root may write anywhere."""
    folder = Path(checkpointer.save_dir)
    if os.getuid() == 0:
        for parent in (folder, *folder.parents[:2]):
            parent.chmod(parent.stat().st_mode | 0o055)
        os.setuid(65534)
    with pytest.raises(InputError, match=r"cannot be written: Permission denied"):
        checkpointer.save("model_0000002")


def test_weights_that_are_not_finite_are_not_saved(good: Checkpointer, tmp_path: Path) -> None:
    before = saved(tmp_path)
    with torch.no_grad():
        good.model["body"].bias[0] = torch.nan
    message = r"model_0000002 is not saved, as 1 of 4 tensors are not finite \(body\.bias\)"
    with pytest.raises(InputError, match=message):
        good.save("model_0000002")
    assert saved(tmp_path) == before


def test_a_state_that_is_no_tensor_is_saved_as_well_and_does_not_hinder_loading(
    tmp_path: Path,
) -> None:
    class Versioned(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"version": 1}

        def set_extra_state(self, state: dict) -> None:
            pass

    Checkpointer(Versioned(2, 2), str(tmp_path)).save("model_0000001")
    saved_model = torch.load(tmp_path / "model_0000001.pth")["model"]
    assert saved_model["_extra_state"] == {"version": 1}
    weights, loaded = nn.Linear(2, 2).state_dict(), Versioned(2, 2)
    path = save(tmp_path / "weights.pth", weights)
    Checkpointer(loaded, trainer=Trainer()).resume_or_load(path, resume=False)
    assert torch.equal(loaded.weight, weights["weight"])


def test_a_first_checkpoint_that_fails_says_that_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "model_0000001.pth.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match="there is no checkpoint yet"):
        Checkpointer(model(), str(tmp_path)).save("model_0000001")


SAVE_FOR_EVER = """
import sys, torch
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.checkpointer import last_checkpoint
checkpointer = Checkpointer(torch.nn.Linear(2000, 2000), sys.argv[1])
for number in range(1_000_000):
    checkpointer.save(f"model_{number % 2}")
"""


def bytes_written(folder: Path) -> int:
    """Of the checkpoint that is being written; -1 for none."""
    try:
        return max(path.stat().st_size for path in folder.glob("model_*.partial"))
    except (FileNotFoundError, ValueError):
        return -1


def test_a_process_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for size in (0, 1 << 20, 1 << 23):  # bytes that it has written when it is killed
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], cwd=ROOT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "last_checkpoint").exists() and bytes_written(tmp_path) > size:
                break
        process.kill()
        assert process.wait() == -signal.SIGKILL
        resumed = Checkpointer(nn.Linear(2000, 2000), str(tmp_path))
        resumed.resume_or_load("", resume=True)


@pytest.mark.parametrize(
    ("final", "numbers", "newest"),
    [
        (3, [1, 3], "model_final"), (3, [1, 3, 6], "model_0000006"), (9, [6], "model_final"),
        (None, [6], "model_0000006"), ("damaged", [6, 12], "model_0000012"), (3, [], "model_final"),
    ],
)  # fmt: skip
def test_without_last_checkpoint_the_one_of_the_most_iterations_is_the_last(
    final: int | str | None, numbers: list[int], newest: str, tmp_path: Path
) -> None:
    for number in numbers:
        torch.save({"model": {}, "iteration": number}, tmp_path / f"model_{number:07d}.pth")
    if final == "damaged":
        (tmp_path / "model_final.pth").write_bytes(b"PK")
    elif final is not None:
        torch.save({"model": {}, "iteration": final}, tmp_path / "model_final.pth")
    assert last_checkpoint(tmp_path) == tmp_path / f"{newest}.pth"


@pytest.mark.parametrize("name", ["../other/model.pth", "/etc/passwd", "gone.pth", "sub/m.pth"])
def test_last_checkpoint_names_a_file_of_its_folder(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in (tmp_path / "other", run / "sub"):
        folder.mkdir(parents=True)
    save(tmp_path / "other" / "model.pth", model().state_dict())
    save(run / "sub" / "m.pth", model().state_dict())
    (run / "last_checkpoint").write_text(name)
    with pytest.raises(InputError, match="last_checkpoint names .*, which is no file of that fold"):
        Checkpointer(model(), str(run)).resume_or_load("", resume=True)
