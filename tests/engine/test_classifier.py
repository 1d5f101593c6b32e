"""Classifiers whose backbone a detector starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gn_det import FusedGroupNorm, InputError
from gn_det.engine.classifier import accuracy, build_classifier, normalized, train_classifier


class Coloured(Dataset):
    """Pictures of one of two colours, which is their class."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        label = item[1] % 2
        return torch.full((3, 8, 8), 200.0 if label else 50.0), label


class Linear(nn.Module):
    """Scores from the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(3, 2)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return {"linear": self.scores(pictures.mean((2, 3)))}


def test_what_can_be_told_apart_is_learnt_and_again_the_same() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Linear()
        train_classifier(model, Coloured(), epochs=3, batch_size=4, lr=0.8)
        assert accuracy(model, Coloured(), batch_size=7) == 1.0
        weights.append(model.scores.weight)
    assert torch.equal(*weights)


def test_too_few_pictures_and_a_loss_that_is_not_finite_are_errors() -> None:
    with pytest.raises(InputError, match="40 objects do not make a batch of 64"):
        train_classifier(Linear(), Coloured(), epochs=1, batch_size=64)
    broken = Linear()
    nn.init.constant_(broken.scores.bias, torch.nan)
    with pytest.raises(InputError, match="the loss is nan at step 0"):
        train_classifier(broken, Coloured(), epochs=1, batch_size=4)


@pytest.mark.parametrize(("depth", "norms"), [(18, 20), (50, 53)])
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_the_networks_are_detectron2s_with_their_norm(depth: int, norms: int, norm: str) -> None:
    model = build_classifier(depth, norm, num_classes=3)
    kinds = [type(m) for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    assert len(kinds) == norms
    assert (kinds[0] is FusedGroupNorm) == (norm == "GN")
    assert model.eval()(torch.zeros(1, 3, 32, 32))["linear"].shape == (1, 3)
    if depth == 50:  # as FAIR's GN models have it
        assert model.res3[0].conv2.stride == (2, 2)


def test_pictures_are_normalised_as_a_detectors(tmp_path: Path) -> None:
    picture = torch.tensor([103.53, 116.28, 123.675]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(normalized(picture), torch.zeros(1, 3, 2, 2), atol=1e-6, rtol=0)
