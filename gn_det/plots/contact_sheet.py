"""A contact sheet: predictions beside ground truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from gn_det.data.coco import read_coco
from gn_det.data.pictures import read_picture
from gn_det.errors import InputError
from gn_det.files import read_json
from gn_det.plots.figures import new_figure, save_figure
from gn_det.plots.overlay import draw_objects

__all__ = ["contact_sheet"]


def contact_sheet(
    json_file: str | Path,
    image_root: str | Path,
    results_file: str | Path,
    png: str | Path,
    num_images: int = 6,
    score_threshold: float = 0.5,
    value_range: Sequence[float] = (),
) -> None:
    """Draw some images of a split twice: with their annotations and with the predictions.

    Args:
        json_file: the split's instances JSON.
        image_root: its folder of images.
        results_file: predictions in COCO's results format, as the evaluation wrote them.
        png: file to write.
        num_images: how many, evenly spaced over the split.
        score_threshold: predictions below are left out.
        value_range: see :func:`gn_det.data.pictures.read_picture`.

    Raises:
        InputError: a file that cannot be read.
    """
    dataset = read_coco(json_file)
    try:
        results = read_json(Path(results_file), list)
    except OSError as error:
        raise InputError(f"{results_file} does not exist") from error
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    truths, predictions = defaultdict(list), defaultdict(list)
    for annotation in dataset["annotations"]:
        truths[annotation["image_id"]].append(annotation)
    for result in results:
        if result["score"] >= score_threshold:
            predictions[result["image_id"]].append(result)

    count = min(num_images, len(dataset["images"]))
    chosen = [dataset["images"][i * len(dataset["images"]) // count] for i in range(count)]
    rows = (count + 1) // 2
    figure = new_figure(16, 4 * rows)
    grid = figure.subplots(rows, 4, squeeze=False).reshape(-1, 2)
    for axes in grid.ravel():
        axes.axis("off")
    for image, (left, right) in zip(chosen, grid, strict=False):
        size = (image["width"], image["height"])
        pixels = read_picture(Path(image_root) / image["file_name"], "RGB", value_range, size)
        left.imshow(draw_objects(pixels, truths[image["id"]], names))
        left.set_title(f"{image['file_name']}: ground truth", fontsize=9)
        right.imshow(draw_objects(pixels, predictions[image["id"]], names))
        right.set_title(f"predictions, score ≥ {score_threshold:g}", fontsize=9)
    save_figure(figure, png, dpi=60)
