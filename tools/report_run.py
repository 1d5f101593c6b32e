"""Show what a finished run reached: AP table, loss and AP curves, predictions beside truth."""

from __future__ import annotations

import argparse
from pathlib import Path

from gn_det.engine.command import run_command

from gn_det.config import load_config
from gn_det.errors import InputError
from gn_det.files import read_json
from gn_det.plots.contact_sheet import contact_sheet
from gn_det.plots.curves import plot_curves
from gn_det.text import table


def main() -> None:
    output_dir = parse_arguments().run
    results = read_results(output_dir)
    cfg = load_config(output_dir / "config.yaml")
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(
            f"{output_dir} was evaluated on {len(cfg.DATASETS.TEST)} data sets, and the report is "
            f"of one; the results are in {output_dir / 'results.json'}"
        )
    places = {
        "weights": output_dir / "model_final.pth",
        "resolved config": output_dir / "config.yaml",
        "losses and AP by iteration": output_dir / "metrics.json",
        "TensorBoard events": output_dir,
        "predictions of the held-out split": output_dir / "inference",
        "loss and AP curves": output_dir / "curves.png",
    }
    plot_curves(output_dir / "metrics.json", output_dir / "curves.png")
    folders = {name: paths for name, *paths in cfg.DATASETS.COCO_FOLDERS}
    predictions = output_dir / "inference" / "coco_instances_results.json"
    if cfg.DATASETS.TEST[0] in folders and predictions.exists():
        places["predictions beside ground truth"] = output_dir / "contact_sheet.png"
        contact_sheet(
            *folders[cfg.DATASETS.TEST[0]],
            predictions,
            output_dir / "contact_sheet.png",
            value_range=cfg.INPUT.VALUE_RANGE,
        )
    print("\n" + ap_table(results) + "\n")
    there = [(what, path) for what, path in places.items() if path.exists()]
    print(table(there, tablefmt="plain"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of a run of train_net.py, to write to")
    return parser.parse_args()


def read_results(output_dir: Path) -> dict[str, dict[str, float]]:
    """Metrics by task, as the evaluation returned them; InputError where there are none."""
    try:
        return read_json(output_dir / "results.json", dict)
    except OSError as error:
        raise InputError(
            f"{output_dir} has no results.json: the run there is not finished, or had nothing to "
            "evaluate on; continue it with train_net.py --resume"
        ) from error


def ap_table(results: dict[str, dict[str, float]]) -> str:
    """A row for each task."""
    titles = {"bbox": "box", "segm": "mask"}
    columns = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    rows = [
        [titles.get(task, task)] + [metrics.get(column) for column in columns]
        for task, metrics in results.items()
    ]
    return table(rows, headers=["", *columns], floatfmt=".1f", missingval="-")


if __name__ == "__main__":
    run_command(main)
