"""Weights by file, address and catalog name."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from support.programs import ROOT

from gn_det import InputError
from gn_det.checkpoint import Checkpointer, check_weights_exist
from gn_det.checkpoint.download import kept_at
from gn_det.checkpoint.weights_file import weights_address
from gn_det.config import load_config

R50_GN = "catalog://ImageNetPretrained/FAIR/R-50-GN"
R50_GN_ADDRESS = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47261647/R-50-GN.pkl"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of downloads, and no network."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    return tmp_path / "cache"


def test_no_weights_are_none_and_a_file_must_be_there(tmp_path: Path) -> None:
    check_weights_exist("")
    (tmp_path / "here.pth").touch()
    check_weights_exist(str(tmp_path / "here.pth") + "?matching_heuristics=True")
    with pytest.raises(InputError, match=r"weights .*nowhere\.pth do not exist"):
        check_weights_exist(str(tmp_path / "nowhere.pth"))


def test_names_of_detectron2_stand_for_addresses() -> None:
    assert weights_address(R50_GN) == R50_GN_ADDRESS
    assert weights_address("detectron2://ImageNetPretrained/MSRA/R-50.pkl") == (
        "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    )
    assert weights_address("local.pth") == "local.pth"
    with pytest.raises(InputError, match="catalog://nothing are not in Detectron2's catalog"):
        weights_address("catalog://nothing")


@pytest.mark.parametrize(
    "name", [R50_GN, "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "https://a.org/w.pkl"]
)
def test_without_a_network_the_error_has_the_address_and_both_ways(cache: Path, name: str) -> None:
    address = weights_address(name)
    place = kept_at(address)
    assert cache in place.parents
    with pytest.raises(InputError) as caught:
        check_weights_exist(name)
    message = str(caught.value)
    assert "\n" not in message and "Network is unreachable" in message
    assert f"Download {address} " in message and "MODEL.WEIGHTS" in message
    assert f"or put it at {place}," in message


def caffe2_name(key: str) -> str:
    """What Detectron calls a tensor of a ResNet, as FAIR's weights do."""
    key = re.sub(r"^stem\.conv1", "conv1", key)
    key = re.sub(r"^(res\d)\.(\d+)\.shortcut", r"\1_\2_branch1", key)
    for conv, branch in (("conv1", "2a"), ("conv2", "2b"), ("conv3", "2c")):
        key = re.sub(rf"^(res\d)\.(\d+)\.{conv}", rf"\1_\2_branch{branch}", key)
    for ours, theirs in ((".norm.weight", "_gn_s"), (".norm.bias", "_gn_b"), (".weight", "_w")):
        key = key.replace(ours, theirs)
    return key


@pytest.mark.parametrize("way", ["file", "kept"])
def test_a_recipe_trains_from_a_copy_of_fairs_weights(cache: Path, way: str) -> None:
    cfg = load_config(ROOT / "configs/coco/mask_rcnn_R_50_FPN_gn_1x.yaml", ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.WEIGHTS == R50_GN
    model = build_model(cfg)
    body = model.backbone.bottom_up
    expected = {key: torch.rand_like(value) for key, value in body.state_dict().items()}
    copy = kept_at(R50_GN_ADDRESS)
    copy.parent.mkdir(parents=True)
    blobs = {caffe2_name(key): value.numpy() for key, value in expected.items()}
    copy.write_bytes(pickle.dumps({"blobs": blobs}))
    trainer = torch.optim.SGD(model.parameters(), lr=0.1)
    Checkpointer(model, trainer=trainer).load(
        R50_GN if way == "kept" else str(copy), checkpointables=[]
    )
    assert all(torch.equal(value, expected[key]) for key, value in body.state_dict().items())


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(InputError, match="pipe.pth are no file, but a folder, device, pipe or soc"):
        check_weights_exist(str(tmp_path / "pipe.pth"))
