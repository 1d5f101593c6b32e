"""Files of weights for timm's models."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import timm
import torch
from support.timm_models import BN, of_every_family
from torch import nn

from gn_det import InputError
from gn_det.modeling import TimmBackbone


@of_every_family
def test_a_file_of_the_classifier_is_what_the_backbone_starts_from(
    name: str, tmp_path: Path
) -> None:
    classifier = timm.create_model(name, num_classes=7).eval()
    for module in classifier.modules():
        if isinstance(module, BN):
            module.running_mean.normal_(0, 0.1)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(name, weights=str(tmp_path / "weights.pth")).eval()
    x = torch.rand(1, 3, 64, 64)
    wanted = classifier.forward_features(x)
    conv_head = name.startswith(("tf_efficientnet", "mobilenet", "hrnet"))
    # Their last map is before the head's convolutions; all but these are in the file.
    if not conv_head:
        last = backbone(x)["res5"]
        wanted = nn.functional.relu(wanted) if name.startswith("densenet") else wanted
        last = nn.functional.relu(last) if name.startswith("densenet") else last
        torch.testing.assert_close(last, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        next(backbone.parameters()).detach(), next(classifier.parameters()).detach()
    )


# timm gives their parts other names where they are backbones.
RENAMED = ("resnet10t", "ese_vovnet19b_slim_dw", "repvgg_a0", "resnetv2_18")


@pytest.mark.parametrize("name", RENAMED)
def test_a_file_of_the_body_is_what_the_backbone_starts_from(name: str, tmp_path: Path) -> None:
    source = TimmBackbone(name)
    for tensor in source.state_dict().values():
        tensor.normal_().abs_()  # variances are
    torch.save(source.body.state_dict(), tmp_path / "body.pth")
    backbone = TimmBackbone(name, weights=str(tmp_path / "body.pth"))
    for key, tensor in source.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], tensor), key


@pytest.mark.parametrize("lacking", ["layer1.0.bn1.running_mean", "running_var", "bias"])
def test_a_tensor_that_lacks_is_told_though_another_has_its_values(
    lacking: str, tmp_path: Path
) -> None:
    state = timm.create_model("resnet18").state_dict()  # whose biases and means are zeros alone
    torch.save({k: v for k, v in state.items() if not k.endswith(lacking)}, tmp_path / "part.pth")
    with pytest.raises(InputError, match=rf"it lacks \d+ of \d+ tensors \(\S*{lacking}"):
        TimmBackbone("resnet18", weights=str(tmp_path / "part.pth"))


def test_weights_that_lack_a_part_of_the_model_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({k: v for k, v in state.items() if "blocks.3" not in k}, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"it lacks \d+ of \d+ tensors \(blocks.3"):
        TimmBackbone("tf_efficientnet_lite0", weights=str(tmp_path / "part.pth"))


class DoesNotLoad:
    """Of code."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ({}, "holds no weights, but nothing; save"),
        (b"<html>", "it is no file that torch.save wrote"),
        ({"net": {"conv1.weight": torch.zeros(1)}}, "holds no weights, but net; save the state"),
        ([1, 2], "holds no weights that can be read"),
        ({"conv1.weight": DoesNotLoad()}, "Unsupported globals: .*DoesNotLoad"),
        ({"conv1.weight": torch.zeros(1)}, "timm cannot build resnet18"),
    ],
)
def test_files_without_the_weights_are_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(InputError, match=message):
        TimmBackbone("resnet18", weights=str(file))


@pytest.mark.parametrize(
    ("file_of", "name"),
    [
        ("resnet34", "resnet18"),
        ("seresnet33ts", "resnet33ts"),
        ("tf_efficientnet_lite1", "tf_efficientnet_lite0"),
    ],
)
def test_weights_of_a_larger_relative_are_refused(file_of: str, name: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(file_of).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"tensors have no place in it .*of another model\?"):
        TimmBackbone(name, weights=str(tmp_path / "weights.pth"))


PREFIXES = ["model.", "backbone.", "body.", "module.", "encoder.", "model.backbone."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "backbone.bottom_up.body."])
@pytest.mark.parametrize("name", ["resnet18", "hrnet_w18_small"])
def test_a_name_before_all_names_is_no_matter(name: str, prefix: str, tmp_path: Path) -> None:
    state = timm.create_model(name, num_classes=3).state_dict()
    held = {prefix + key: value for key, value in state.items()}
    torch.save({"state_dict": {**held, "loss.weight": torch.ones(3)}}, tmp_path / "x.pth")
    body = TimmBackbone(name, weights=str(tmp_path / "x.pth")).body
    assert torch.equal(body.conv1.weight, state["conv1.weight"])


def test_weights_that_hold_the_model_twice_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    torch.save(
        {f"{p}.{k}": v for p in ("net", "old") for k, v in state.items()}, tmp_path / "x.pth"
    )
    with pytest.raises(InputError, match=r"the model twice, as net\.\* and as old\.\*"):
        TimmBackbone("resnet18", weights=str(tmp_path / "x.pth"))


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1_000_000)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as archive,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in archive.infolist():
            small.writestr(entry.filename, archive.read(entry))
    with pytest.raises(InputError, match=r"small\.pth is refused: \d+ bytes would unpack to 4\d+"):
        TimmBackbone("resnet18", weights=str(tmp_path / "small.pth"))


def test_numbers_that_are_none_are_told(tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    state["layer4.1.conv2.weight"][0] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"1 of \d+ tensors have infinite or no .*layer4.1.conv2"):
        TimmBackbone("resnet18", weights=str(tmp_path / "x.pth"))


def test_variances_below_zero_are_told(tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    state["layer1.0.bn1.running_var"][3] = -1e-3
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"are negative in layer1\.0\.bn1\.running_var; is it"):
        TimmBackbone("resnet18", weights=str(tmp_path / "w.pth"))
