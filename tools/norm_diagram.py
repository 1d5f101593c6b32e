"""Draw which values BN, LN, IN and GN normalize together (Wu & He 2018, figure 2).

That is measured on the layers themselves: one value of the input is changed, and the outputs that
change with it share its mean and variance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from gn_det.engine.command import run_command

import numpy as np
import torch
from torch import Tensor, nn

from gn_det import FusedGroupNorm
from gn_det.plots.figures import check_new_png, new_figure, save_figure

IMAGES, CHANNELS, PLACES = 4, 6, 5  # N, C and H×W of the drawn tensor


def main() -> None:
    png = parse_arguments().output
    check_new_png(png)
    layers = {
        "Batch Norm": nn.BatchNorm1d(CHANNELS),
        "Layer Norm": FusedGroupNorm(CHANNELS, 1),
        "Instance Norm": FusedGroupNorm(CHANNELS, CHANNELS),
        "Group Norm": FusedGroupNorm(CHANNELS, 2),
    }
    figure = new_figure(13, 3.6)
    for place, (name, layer) in enumerate(layers.items(), start=1):
        axes = figure.add_subplot(1, len(layers), place, projection="3d")
        together = normalized_together(layer)
        colors = np.where(together, "tab:blue", "white")
        # Axes of the figure: N to the back, C to the right, H and W upwards.
        axes.voxels(
            np.ones((CHANNELS, IMAGES, PLACES)),
            facecolors=colors.transpose(1, 0, 2),
            edgecolor="gray",
            linewidth=0.4,
        )
        axes.set_title(name)
        for label, text in (
            (axes.set_xlabel, "C"),
            (axes.set_ylabel, "N"),
            (axes.set_zlabel, "HW"),
        ):
            label(text, labelpad=-12)
        axes.set(xticks=[], yticks=[], zticks=[])
        axes.set_aspect("equal")
        axes.view_init(elev=22, azim=-52)
        print(f"{name}: {together.sum()} of {together.size} values together")
    save_figure(figure, png)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    return parser.parse_args()


@torch.no_grad()
def normalized_together(layer: Callable[[Tensor], Tensor]) -> np.ndarray:
    """(N, C, HW) bool: which values share the statistics of the first image's first value.

    Args:
        layer: from an (N, C, HW) tensor to its normalized values.
    """
    x = torch.randn(
        IMAGES, CHANNELS, PLACES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    changed = x.clone()
    changed[0, 0, 0] += 1
    layer = layer.double()
    return (layer(x) != layer(changed)).numpy()


if __name__ == "__main__":
    run_command(main)
