"""Weights files of every kind that Detectron2 reads, read without running anything."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import save_file
from support.hostile import REFUSED, write_hostile
from torch import nn

from gn_det import InputError
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.reading import read_weights

CONV = torch.arange(12.0).reshape(2, 3, 2, 1)
ENDINGS = (".pkl", ".pth", ".pyth", ".safetensors")


def model() -> nn.Module:
    """With the names that Detectron2 gives to res2_0_branch2a_w and its norm."""
    conv1 = nn.Conv2d(3, 2, (2, 1), bias=False)
    conv1.norm = nn.GroupNorm(1, 2)
    return nn.ModuleDict({"res2": nn.ModuleList([nn.ModuleDict({"conv1": conv1})])})


NAMES = {
    "res2.0.conv1.weight": "res2_0_branch2a_w",
    "res2.0.conv1.norm.weight": "res2_0_branch2a_gn_s",
    "res2.0.conv1.norm.bias": "res2_0_branch2a_gn_b",
}


def blobs(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """As Detectron has them, momentum included."""
    arrays = {NAMES[key]: value.numpy() for key, value in state.items()}
    return arrays | {f"{name}_momentum": array for name, array in arrays.items()}


def write(file: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    if kind == "zoo.pkl":
        arrays = {key: value.numpy() for key, value in state.items()}
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "theirs"}, 2))
    elif kind == "detector.pkl":
        content = {"blobs": blobs(state), "cfg": "NUM_GPUS: 8"}
        file.write_bytes(pickle.dumps(content, 2))
    elif kind == "imagenet.pkl":
        file.write_bytes(pickle.dumps(blobs(state), 2))
    elif kind == "pycls.pyth":
        torch.save({"model_state": {**state, "bn.num_batches_tracked": torch.tensor(1)}}, file)
    elif kind == "bare.pth":
        torch.save(state, file)
    elif kind == "checkpoint.pth":
        torch.save({"model": state, "iteration": 7}, file)
    else:
        save_file(state, file)


@pytest.mark.parametrize(
    "kind",
    [
        "zoo.pkl", "detector.pkl", "imagenet.pkl", "pycls.pyth", "bare.pth", "checkpoint.pth",
        "ours.safetensors",
    ],
)  # fmt: skip
def test_every_layout_loads_and_as_in_detectron2(tmp_path: Path, kind: str) -> None:
    saved, loaded, theirs = model(), model(), model()
    nn.init.normal_(saved["res2"][0]["conv1"].norm.weight)
    write(tmp_path / kind, saved.state_dict(), kind)
    Checkpointer(loaded).load(str(tmp_path / kind))
    checkpointers = [loaded]
    if kind != "ours.safetensors":  # which Detectron2 does not read
        DetectionCheckpointer(theirs).load(str(tmp_path / kind))
        checkpointers.append(theirs)
    for other in checkpointers:
        for key, value in saved.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)


def test_what_else_a_checkpoint_holds_is_kept(tmp_path: Path) -> None:
    torch.save({"model": {"w": CONV}, "iteration": 7}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")["iteration"] == 7


def test_metadata_of_safetensors_ask_for_the_matching_heuristics(tmp_path: Path) -> None:
    state = {"conv1.weight": torch.ones(2, 3, 2, 1)}
    save_file(state, tmp_path / "w.safetensors", {"matching_heuristics": "True"})
    loaded = model()
    trainer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    checkpointer = Checkpointer(loaded, trainer=trainer)
    checkpointer.load(str(tmp_path / "w.safetensors"), checkpointables=[])
    assert torch.equal(loaded["res2"][0]["conv1"].weight, state["conv1.weight"])

    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="does not fit the model: 3 missing"):
        checkpointer.load(str(tmp_path / "w.safetensors"), checkpointables=[])


def test_scalars_and_arrays_of_another_byte_order_are_tensors(tmp_path: Path) -> None:
    content = {"model": {"a": np.float32(2), "b": np.array([1, 2], ">f4")}, "__author__": "theirs"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    loaded = read_weights(tmp_path / "w.pkl")["model"]
    assert torch.equal(loaded["a"], torch.tensor(2.0))
    assert torch.equal(loaded["b"], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_hostile_file_is_refused_and_leaves_the_model_as_it_was(
    tmp_path: Path, ending: str
) -> None:
    file, mark, loaded = tmp_path / f"w{ending}", tmp_path / "mark", model()
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    write_hostile(file, mark, {"model": state, "model_state": state})
    refusal = "cannot be read as weights" if ending == ".safetensors" else REFUSED
    with pytest.raises(InputError, match=refusal) as caught:
        Checkpointer(loaded).load(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not mark.exists()
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pth")
    with pytest.raises(InputError, match="is a TorchScript archive, which is a program"):
        read_weights(tmp_path / "w.pth")


def test_an_object_of_a_class_is_named(tmp_path: Path) -> None:
    torch.save({"model": model()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"asks for torch\.nn\.modules\.container\.ModuleDict"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["zoo.pkl", "pycls.pyth", "bare.pth", "ours.safetensors"])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    file, loaded = tmp_path / kind, model()
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    write(file, {key: value + 1 for key, value in before.items()}, kind)
    whole = file.read_bytes()
    for size in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match="cannot be read as") as caught:
            Checkpointer(loaded).load(str(file))
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds no dict, but list"),
        ({"model": {"w": "text"}, "__author__": "x"}, "holds no weights .* but w;"),
        ({"model": {3: np.ones(2)}, "__author__": "x"}, "holds no weights .* but 3;"),
        ({"model": {"w": np.array(["text"])}, "__author__": "x"}, "w has no numbers, but <U4"),
        ({"model": 3, "__author__": "x"}, "holds no weights .* but int;"),
        ({"blobs": 3}, "holds no dict, but int"),
    ],
)
def test_pickles_of_other_things_are_told_apart(
    tmp_path: Path, content: object, message: str
) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / "w.pkl")


def test_a_pickle_of_a_state_dict_needs_no_author(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"w": np.ones(2, np.float32)}}))
    assert torch.equal(read_weights(tmp_path / "w.pkl")["model"]["w"], torch.ones(2))


def test_pyth_files_of_others_are_told_apart(tmp_path: Path) -> None:
    torch.save({"model": {"w": CONV}}, tmp_path / "w.pyth")
    with pytest.raises(InputError, match=r"w\.pyth has no 'model_state'"):
        read_weights(tmp_path / "w.pyth")


def records() -> dict[str, object]:
    """What programs keep beside the weights, by where it comes from."""
    import argparse
    import collections
    import types

    from mmengine.config import Config, ConfigDict
    from mmengine.logging import HistoryBuffer
    from omegaconf import OmegaConf
    from yacs.config import CfgNode

    counts = collections.defaultdict(list)
    counts["loss"].append(1.5)
    return {
        "numpy scalar": np.float64(0.5),
        "numpy integer": np.int64(5),
        "numpy array": np.ones(3),
        "Namespace": argparse.Namespace(lr=0.1, names=["a"], folder=Path("x")),
        "SimpleNamespace": types.SimpleNamespace(lr=0.1),
        "path": Path("some/where"),
        "defaultdict": counts,
        "OrderedDict": collections.OrderedDict(a=1),
        "OmegaConf": OmegaConf.create({"lr": 0.1, "steps": [1, 2], "name": "x", "on": True}),
        "yacs": CfgNode({"A": {"B": 1}}),
        "mmengine config": Config({"a": {"b": [1, 2]}}),
        "mmengine dict": ConfigDict({"a": {"b": [1, 2]}}),
        "mmengine log": {"train/loss": HistoryBuffer([1.0, 2.0], [1, 1])},
    }


@pytest.mark.parametrize("kind", list(records()))
def test_records_beside_the_weights_are_no_hindrance(kind: str, tmp_path: Path) -> None:
    content = {"model": {"a.weight": torch.ones(2)}, "epoch": 3, "record": records()[kind]}
    torch.save(content, tmp_path / "theirs.pth")
    for wrapped in (False, True):
        loaded = read_weights(tmp_path / "theirs.pth", wrapped=wrapped)
        assert loaded["model"].keys() == {"a.weight"}
        assert torch.equal(loaded["model"]["a.weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2).to(torch.float8_e4m3fn), "'w' is of torch.float8_e4m3fn; save weights of"),
        (torch.ones(2, dtype=torch.complex64), "'w' is of torch.complex64"),
        (torch.ones(2, device="meta"), "'w' is without values"),
    ],
)
def test_values_that_no_model_takes_are_refused(
    value: torch.Tensor, message: str, tmp_path: Path
) -> None:
    torch.save({"model": {"w": value}}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / "x.pth")


def test_variances_below_zero_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"bn.running_var": torch.tensor([1.0, -0.1])}}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"variances of BN are negative in bn\.running_var"):
        read_weights(tmp_path / "x.pth")
