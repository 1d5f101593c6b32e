"""Sizes of pictures: where that in the JSON is not the file's, what the objects were drawn on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gn_det.data.bad_images import find_bad_images
from gn_det.data.coco.findings import Findings
from gn_det.data.coco.frames import drawn_as_stored, drawn_at_another_scale
from gn_det.data.pictures import PictureError, is_turned, picture_size

__all__ = ["Settled", "settle_sizes"]

BadImages = list[tuple[dict[str, Any], str]]
Sizes = dict[int, tuple[int, int]]  # (width, height) by the id of the picture


class Settled(NamedTuple):
    """What :func:`settle_sizes` found.

    Attributes:
        bad_images: (picture, what is wrong) for each that cannot be used.
        as_stored: whether objects were drawn on stored pictures, which a tag turns, or on turned
            ones; None where no object tells.
        undecided: whether there are such pictures, and nothing tells.
        file_sizes: sizes that pictures get when their objects are scaled to them.
    """

    bad_images: BadImages
    as_stored: bool | None
    undecided: bool
    file_sizes: Sizes


def settle_sizes(
    dataset: dict[str, Any],
    image_root: str | Path,
    findings: Findings,
    value_range: Sequence[float] = (),
    as_stored: bool | None = None,
) -> Settled:
    """Look at the files of a data set, and give its pictures the sizes of these, in place.

    A picture that a tag turns by a quarter keeps its stored size where its objects were drawn so.
    One whose objects were drawn at another scale keeps the size in the JSON, which they are of.

    Args:
        dataset: with pictures as :func:`gn_det.data.coco.normalise_images` leaves them.
        image_root: the folder that their file_name is relative to.
        findings: told of every size that is not that of the JSON.
        value_range: see :func:`gn_det.data.pictures.read_picture`.
        as_stored: what another split of the set said of turned pictures, if objects do not tell.
    """
    images = dataset["images"]
    bad = find_bad_images(images, image_root, value_range)
    sizes = _other_sizes(bad, image_root, value_range)
    bad = [(image, problem) for image, problem in bad if image["id"] not in sizes]
    written = {i["id"]: (i["width"], i["height"]) for i in images if i["id"] in sizes}
    swapped = [i for i in images if written.get(i["id"]) == sizes.get(i["id"], ())[::-1]]
    turned = {i["id"] for i in swapped if is_turned(Path(image_root) / i["file_name"])}
    told = drawn_as_stored({n: written[n] for n in turned}, sizes, dataset["annotations"])
    keeps = told if told is not None else as_stored
    if turned and keeps is not False:
        what = "images are turned by a tag, and annotated as they are stored: they are not turned"
        findings.add("warned", what, f"image {min(turned)}", count=len(turned))
        sizes = {number: size for number, size in sizes.items() if number not in turned}
    scaled = drawn_at_another_scale(
        {n: size for n, size in written.items() if n in sizes}, sizes, dataset["annotations"]
    )
    of_files = sizes.keys() - scaled
    for image in images:
        if image["id"] in of_files:
            image["width"], image["height"] = size = sizes[image["id"]]
            what = "images have another size than the JSON says: that of the file is used"
            value = f"{size[0]}x{size[1]}, not {'x'.join(map(str, written[image['id']]))}"
            findings.add("warned", what, f"image {image['id']}", text=value)
            findings.changed = True
    undecided = bool(turned) and keeps is None
    return Settled(bad, told, undecided, {number: sizes[number] for number in scaled})


def _other_sizes(
    bad: list[tuple[dict[str, Any], str]], root: str | Path, value_range: Sequence[float] = ()
) -> dict[int, tuple[int, int]]:
    """Pictures with which nothing is wrong but that their size is another than the JSON says.

    Args:
        bad: (picture, what is wrong) as :func:`gn_det.data.bad_images.find_bad_images` returned it.
        root: the folder.
        value_range: see :func:`gn_det.data.pictures.read_picture`.

    Returns:
        (width, height) of their files by the id of the picture.
    """
    resized = []
    for image, _ in bad:
        try:
            width, height = picture_size(Path(root) / image["file_name"])
        except PictureError:
            continue
        resized.append({**image, "width": width, "height": height})
    still_bad = {image["id"] for image, _ in find_bad_images(resized, root, value_range)}
    return {i["id"]: (i["width"], i["height"]) for i in resized if i["id"] not in still_bad}
