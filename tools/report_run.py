"""Show what a finished run reached: AP table, loss and AP curves, predictions beside truth."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
from tabulate import tabulate

from gn_det.analysis.contact_sheet import contact_sheet
from gn_det.analysis.curves import plot_curves
from gn_det.config import load_config
from gn_det.engine.command import run_command
from gn_det.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of a run of train_net.py")
    output_dir = parser.parse_args().output_dir
    try:
        results = json.loads((output_dir / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{output_dir} has no results.json: the run there is not finished, or had nothing to "
            "evaluate on; go on with train_net.py --resume"
        ) from error
    cfg = load_config(output_dir / "config.yaml")
    pictures = {"loss and AP curves": output_dir / "curves.png"}
    plot_curves(output_dir / "metrics.json", pictures["loss and AP curves"])
    folders = {name: paths for name, *paths in cfg.DATASETS.COCO_FOLDERS}
    if cfg.DATASETS.TEST[0] in folders:
        pictures["predictions beside ground truth"] = output_dir / "contact_sheet.png"
        contact_sheet(
            *folders[cfg.DATASETS.TEST[0]],
            output_dir / "inference" / "coco_instances_results.json",
            output_dir / "contact_sheet.png",
        )
    print_table(results)
    print_places(output_dir, pictures)


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Print the AP of each task."""
    titles = {"bbox": "box", "segm": "mask"}
    columns = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    rows = [
        [titles.get(task, task)] + [metrics.get(column) for column in columns]
        for task, metrics in results.items()
    ]
    print("\n" + tabulate(rows, headers=["", *columns], floatfmt=".1f", missingval="-") + "\n")


def print_places(output_dir: Path, pictures: dict[str, Path]) -> None:
    """Print where everything of a run lies."""
    places = {
        "weights": output_dir / "model_final.pth",
        "resolved config": output_dir / "config.yaml",
        "losses and AP by iteration": output_dir / "metrics.json",
        "TensorBoard events": output_dir,
        "predictions of the held-out split": output_dir / "inference",
        **pictures,
    }
    print(tabulate(places.items(), tablefmt="plain"))


if __name__ == "__main__":
    run_command(main)
