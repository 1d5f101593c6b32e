"""Classifiers whose backbone a detector starts from, with every norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import NaiveSyncBatchNorm, batch_norm
from torch import nn

from gn_det import FusedGroupNorm, InputError, revert
from gn_det.classification.networks import NETWORKS, NORMS, build_classifier

KINDS = {
    "none": type(None),
    "BN": nn.BatchNorm2d,
    "SyncBN": NaiveSyncBatchNorm,
    "LN": FusedGroupNorm,
    "IN": FusedGroupNorm,
    "GN": FusedGroupNorm,
}
COUNTS = {
    "resnet10": 12,
    "resnet18": 20,
    "resnet34": 36,
    "resnet50": 53,
    "resnet101": 104,
    "vgg16": 13,
}


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "network",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("resnet34", "resnet101") else ())
        for n in NETWORKS
    ],
)
def test_every_network_takes_every_norm(network: str, norm: str) -> None:
    classifier = build_classifier(network, norm, num_classes=3)
    found = norms(classifier)
    assert len(found) == (0 if norm == "none" else COUNTS[network])
    assert all(isinstance(each, KINDS[norm]) for each in found)
    samples = [{"image": torch.rand(3, 64, 64) * 255, "label": label} for label in (0, 2)]
    loss = classifier(samples)["loss_cls"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in classifier.parameters())


def test_ln_and_in_are_the_ends_of_gn() -> None:
    x = torch.randn(2, 64, 5, 4)
    ends = {
        "LN": (F.layer_norm(x, x.shape[1:]), 1),
        "IN": (F.instance_norm(x), 64),
    }
    for norm, (expected, groups) in ends.items():
        layer = build_classifier("resnet18", norm, 3).backbone.stem.conv1.norm
        assert layer.num_groups == groups
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_groups_are_said_in_either_way() -> None:
    by_count = build_classifier("vgg16", "GN", 3, num_groups=8)
    assert {norm.num_groups for norm in norms(by_count)} == {8}
    by_width = build_classifier("vgg16", "GN", 3, channels_per_group=16)
    assert [norm.num_groups for norm in norms(by_width)][:3] == [4, 4, 8]


def test_statistics_of_several_processes_are_exact_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One process stands for two that have the same pictures."""
    monkeypatch.setattr(batch_norm.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(batch_norm.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(batch_norm, "differentiable_all_reduce", lambda tensor: 2 * tensor)
    norm = build_classifier("resnet18", "SyncBN", 3).backbone.stem.conv1.norm
    x = (100 + torch.randn(2, 64, 20, 20)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    expected = F.batch_norm(x.float(), None, None, training=True)
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_a_block_starts_as_its_shortcut(network: str, norm: str) -> None:
    stage = build_classifier(network, norm, 3).backbone.res2
    block = stage[1]
    x = torch.rand(2, 64 if network == "resnet18" else 256, 6, 6)
    torch.testing.assert_close(block(x), x)


def test_bottlenecks_have_their_stride_where_fairs_gn_models_have_it() -> None:
    assert build_classifier("resnet50", "GN", 3).backbone.res3[0].conv2.stride == (2, 2)


def test_fusion_changes_no_score() -> None:
    fused = build_classifier("vgg16", "GN", 3).eval()
    pictures = torch.rand(1, 3, 32, 32) * 255
    expected = fused.scores(pictures)
    torch.testing.assert_close(revert(fused).scores(pictures), expected, atol=1e-5, rtol=1e-4)


def test_pictures_are_normalized_as_a_detectors() -> None:
    classifier = build_classifier("resnet10", "GN", 3)
    seen = []
    classifier.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    classifier.scores(torch.tensor([103.53, 116.28, 123.675]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 8, 8), atol=1e-6, rtol=0)


def test_pictures_that_are_too_small_for_vgg16_are_an_error() -> None:
    with pytest.raises(InputError, match=r"needs 32 pixels, not \(8, 40\); give --size 32"):
        build_classifier("vgg16", "BN", 3).scores(torch.zeros(1, 3, 8, 40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "resnet20"}, "network 'resnet20'.*resnet10, resnet18"),
        ({"norm": "gn"}, "norm 'gn'.*none, BN, SyncBN"),
        ({"norm": "BN", "num_groups": 8}, "num_groups 8 .* are of GN, and the norm is BN"),
        ({"num_groups": 8, "channels_per_group": 4}, "two ways to say the same"),
    ],
)
def test_what_cannot_be_built_is_an_error(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_classifier(**{"network": "resnet10", "norm": "GN", "num_classes": 3, **arguments})
