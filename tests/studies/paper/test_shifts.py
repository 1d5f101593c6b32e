"""BN's two kinds of statistics, and GN, on shifted pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from support.plots import lines_of
from torch import nn
from torch.utils.data import Dataset

from gn_det.classification.networks import build_classifier
from gn_det.studies.paper.shifts import (
    SHIFTS,
    batch_statistics,
    gap_csv,
    gap_table,
    plot_gap,
    shifted_errors,
)


class Pictures(Dataset):
    """Noise, each with a label at random."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, 8, 8, generator=generator) * 255
        return {"image": image, "label": index % 2, "file_name": str(index)}


def test_batch_statistics_are_the_training_mode_of_bn_alone_and_leave_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = 3 + 2 * torch.randn(4, 3, 5, 5)
    with batch_statistics(model):
        y = model(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert torch.equal(model(x), x / (1 + 1e-5) ** 0.5)
    assert not any(module.training for module in model.modules()) and model[0].momentum == 0.1
    running = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    assert all(torch.equal(value, state[key]) for key, value in running.items())


def test_gn_computes_the_same_in_both_modes_and_at_any_batch_size() -> None:
    torch.manual_seed(0)
    errors = shifted_errors(build_classifier("resnet10", "GN", 2), Pictures(), [1, 5, 12, 100])
    for shift in SHIFTS:
        assert len({errors[shift, n] for n in (None, 1, 5, 12, 100)}) == 1


def test_bn_differs_where_its_averages_are_not_the_batch() -> None:
    torch.manual_seed(0)
    classifier = build_classifier("resnet10", "BN", 2)
    for norm in classifier.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean)
    nn.init.normal_(classifier.backbone.linear.weight)
    pictures = torch.stack([Pictures()[i]["image"] for i in range(4)])
    classifier.eval()
    averages = classifier.scores(pictures)
    with batch_statistics(classifier):
        batch = classifier.scores(pictures)
    assert not torch.allclose(averages, batch, atol=0.1)


def test_where_bn_is_undefined_the_table_says_so(tmp_path: Path, figures: list[Figure]) -> None:
    classifier = build_classifier("resnet18", "BN", 2)
    errors = {"resnet18 with BN": shifted_errors(classifier, Large(), [1, 3, 4])}
    assert errors["resnet18 with BN"]["none", 1] is None
    assert errors["resnet18 with BN"]["none", 4] is not None
    # A fourth picture alone in its batch leaves nothing undefined.
    assert errors["resnet18 with BN"]["none", 3] is not None
    assert "undefined" in gap_table(errors)
    assert "resnet18 with BN,none,batch statistics,1,\n" in gap_csv(errors)
    plot_gap(errors, tmp_path / "gap.png")
    axes = figures[0].axes[0]
    assert axes.get_title() == "no shift" and len(figures[0].axes) == len(SHIFTS)
    places = [place for place, _ in lines_of(axes)["resnet18 with BN"]]
    assert places == [3, 4]  # 1 is undefined


def test_a_model_without_bn_has_no_line_of_running_averages(
    tmp_path: Path, figures: list[Figure]
) -> None:
    errors = {
        "BN": {(shift, n): 2.0 if n is None else 9.0 for shift in SHIFTS for n in (None, 2)},
        "GN": {(shift, n): 3.0 for shift in SHIFTS for n in (None, 2)},
    }
    plot_gap(errors, tmp_path / "gap.png")
    dashed = [name for name in lines_of(figures[0].axes[-1]) if "running averages" in name]
    assert dashed == ["BN, running averages"]


class Large(Pictures):
    """Pictures whose features at ResNet-18's end are single values."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index), "image": torch.rand(3, 32, 32) * 255}


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_change_pictures_and_do_so_the_same_way_each_time(name: str) -> None:
    pictures = torch.rand(2, 3, 8, 8) * 255
    shifted = SHIFTS[name](pictures, [3, 4])
    assert shifted.shape == pictures.shape
    assert torch.equal(SHIFTS[name](pictures[1:], [4]), shifted[1:])
    assert torch.equal(shifted, pictures) == (name == "none")
