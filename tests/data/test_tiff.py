"""A TIFF is read right by its tags, or refused by what they say."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_det.data.bad_images import image_problem
from gn_det.data.pictures import PictureError, is_deep, is_turned, picture_size, read_picture

WIDTH, HEIGHT = 16, 10
RAMP = np.tile(np.linspace(0, 1, WIDTH), (HEIGHT, 1))
CHANNELS = np.stack([RAMP, RAMP[:, ::-1] / 2, RAMP[::-1] ** 2, 0.5 + RAMP / 2], -1)
GRAY, RGB, CMYK = 1, 2, 5
FORMATS = {"u": 1, "i": 2, "f": 3}


def tiff(values: np.ndarray, order: str = "<", **tags: int) -> bytes:
    """An uncompressed TIFF of (H, W, C) values, with further tags by their number."""
    height, width, channels = values.shape
    kind = values.dtype
    in_planes = tags.get("t284") == 2
    planes = [values[..., c] for c in range(channels)] if in_planes else [values]
    data = [np.ascontiguousarray(p.astype(kind.newbyteorder(order))).tobytes() for p in planes]
    entries = {256: [width], 257: [height], 258: [kind.itemsize * 8] * channels, 259: [1]}
    entries |= {262: [RGB if channels > 2 else GRAY], 273: data, 277: [channels], 278: [height]}
    entries |= {279: [len(part) for part in data], 339: [FORMATS[kind.kind]] * channels}
    entries |= {int(name[1:]): [value] for name, value in tags.items()}
    sizes = {tag: len(of) * 4 for tag, of in entries.items() if len(of) > 1}
    start = 8 + 2 + 12 * len(entries) + 4
    places = np.cumsum([start + sum(sizes.values()), *map(len, data)]).tolist()
    entries[273] = places[:-1]
    table = far = b""
    for tag in sorted(entries):
        numbers = struct.pack(f"{order}{len(entries[tag])}I", *entries[tag])
        table += struct.pack(f"{order}HHI", tag, 4, len(entries[tag]))  # all are LONG
        table += numbers if len(numbers) == 4 else struct.pack(f"{order}I", start + len(far))
        far += numbers if len(numbers) > 4 else b""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(entries))
    return head + table + bytes(4) + far + b"".join(data)


def ranged(kind: str) -> tuple[float, float]:
    if kind.startswith("f"):
        return 0, 1
    limits = np.iinfo(kind)
    return max(limits.min, -limits.max), limits.max


def written(kind: str, channels: int) -> np.ndarray:
    low, high = ranged(kind)
    return (CHANNELS[..., :channels] * (high - low) + low).astype(kind)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize("channels", [1, 3])
def test_values_of_every_kind_are_read_in_their_range(
    kind: str, channels: int, order: str, tmp_path: Path
) -> None:
    path = tmp_path / "picture.tif"
    path.write_bytes(tiff(written(kind, channels), order))
    read = read_picture(path, "RGB", ranged(kind))
    assert np.abs(read - CHANNELS[..., :channels] * 255).max() <= 1
    assert picture_size(path) == (WIDTH, HEIGHT)
    assert is_deep(path) == (kind != "u1")
    assert image_problem(path, HEIGHT, WIDTH, ranged(kind)) is None


REFUSED = {
    "1 channel of int8": ("i1", 1, {}),
    "3 channels of int8": ("i1", 3, {}),
    "1 channel of float16": ("f2", 1, {}),
    "1 channel of uint64": ("u4", 1, {"t258": 64}),
    "1 channel of uint12": ("u2", 1, {"t258": 12}),
    "1 channel of SampleFormat 4 of bits 16": ("u2", 1, {"t339": 4}),
    "2 channels of uint16": ("u2", 2, {}),
    "3 channels of uint16 (gray)": ("u2", 3, {"t262": GRAY}),
    "4 channels of uint16 (CMYK)": ("u2", 4, {"t262": CMYK}),
    "3 channels of uint16 in separate planes": ("u2", 3, {"t284": 2}),
    "4 channels of uint16 in separate planes": ("u2", 4, {"t284": 2}),
    "3 channels of float32 in separate planes": ("f4", 3, {"t284": 2}),
    "2 channels of uint8 in separate planes": ("u1", 2, {"t284": 2, "t338": 2}),
    "4 channels of uint8 in separate planes": ("u1", 4, {"t284": 2, "t338": 1}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_library_reads_right_is_refused_by_its_tags(what: str, tmp_path: Path) -> None:
    kind, channels, tags = REFUSED[what]
    path = tmp_path / "picture.tif"
    path.write_bytes(tiff(written(kind, channels), **tags))
    problem = image_problem(path, HEIGHT, WIDTH, (0, 1000))
    assert problem.startswith(f"has {what}")
    assert problem.endswith("a kind of TIFF that is not read; convert it to PNG or JPEG")


def test_channels_of_eight_bits_are_read_from_separate_planes(tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    path.write_bytes(tiff(written("u1", 3), t284=2))
    assert np.array_equal(read_picture(path, "RGB"), written("u1", 3))


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize(("extra", "alpha"), [(0, "none"), (1, "premultiplied"), (2, "straight")])
def test_the_fourth_channel_is_what_its_tag_says(
    kind: str, extra: int, alpha: str, tmp_path: Path
) -> None:
    colours, part = CHANNELS[..., :3], CHANNELS[..., 3:]
    stored = colours * part if alpha == "premultiplied" else colours
    values = np.concatenate([stored, part], -1) * np.iinfo(kind).max
    path = tmp_path / "picture.tif"
    path.write_bytes(tiff(np.round(values).astype(kind), t338=extra))
    seen = colours if alpha == "none" else colours * part + 1 - part
    assert np.abs(read_picture(path, "RGB") - seen * 255).max() <= 2


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i2", "f4"])
def test_a_negative_is_read_as_the_picture(kind: str, order: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    path.write_bytes(tiff(written(kind, 1), order, t262=0))
    read = read_picture(path, "RGB", ranged(kind))
    assert np.abs(read - (1 - CHANNELS[..., :1]) * 255).max() <= 1
    if kind == "u2":  # of 12 bits
        path.write_bytes(tiff((CHANNELS[..., :1] * 4095).astype("u2"), order, t262=0))
        assert np.array_equal(read_picture(path, "RGB", (0, 4095)), read)


@pytest.mark.parametrize("kind", ["u2", "i2", "f4"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_tag_turns_deep_values_once(kind: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    values = written(kind, channels)
    path.write_bytes(tiff(values))
    upright = read_picture(path, value_range=ranged(kind))
    path.write_bytes(tiff(np.rot90(values), t274=6))
    assert is_turned(path) and is_deep(path)
    assert picture_size(path) == (WIDTH, HEIGHT)
    assert np.array_equal(read_picture(path, value_range=ranged(kind)), upright)
    stored = read_picture(path, value_range=ranged(kind), size=(HEIGHT, WIDTH))
    assert np.array_equal(stored, np.rot90(upright))


def test_deep_values_that_only_pillow_decompresses_are_read(tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    Image.fromarray(written("u2", 1)[..., 0]).save(path, compression="lzma")
    assert np.abs(read_picture(path, "RGB") - CHANNELS[..., :1] * 255).max() <= 1
    Image.fromarray(written("f4", 1)[..., 0]).save(path, compression="lzma")
    with pytest.raises(PictureError, match="float32 .gray., compressed as OpenCV does not know"):
        read_picture(path)


@pytest.mark.parametrize(("kind", "channels"), [("u2", 1), ("u2", 3), ("f4", 3)])
def test_a_truncated_tiff_is_told_in_one_line(
    kind: str, channels: int, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / "picture.tif"
    path.write_bytes(tiff(written(kind, channels))[:-90])
    with pytest.raises(PictureError, match=r"picture\.tif is damaged"):
        read_picture(path)
    assert "ERROR" not in capfd.readouterr().err
