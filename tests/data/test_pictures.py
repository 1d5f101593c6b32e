"""Every kind of picture is read as a person sees it, or refused by name."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngImageFile

from gn_det.data.bad_images import image_problem
from gn_det.data.pictures import (
    PictureError,
    is_deep,
    is_turned,
    picture_size,
    read_picture,
    read_suffixes,
)

WIDTH, HEIGHT = 64, 40
RAMP = np.tile(np.linspace(0, 1, WIDTH), (HEIGHT, 1))
GRAY = np.round(RAMP * 255).astype(np.uint8)
RGB = np.stack([GRAY, GRAY[:, ::-1], np.full_like(GRAY, 77)], -1)
COLOURS = Image.fromarray(RGB)
GRAYS = np.repeat(GRAY[..., None], 3, -1)
# Transparent to the left.
SEEN_ON_WHITE = np.round(255 + (RGB.astype(float) - 255) * RAMP[..., None]).astype(np.uint8)


def translucent() -> Image.Image:
    image = COLOURS.convert("RGBA")
    image.putalpha(Image.fromarray(GRAY))
    return image


def pillow(image: Image.Image, **options: object):
    return lambda path: image.save(path, **options)


def opencv(values: np.ndarray):
    return lambda path: path.write_bytes(cv2.imencode(path.suffix, values)[1].tobytes())


def deep(values: np.ndarray):
    return pillow(Image.fromarray(values))


# Suffix, how it is written, what is seen, and by how much a value may differ.
PICTURES = {
    "gray": (".png", pillow(Image.fromarray(GRAY)), GRAYS, 0),
    "gray JPEG": (".jpg", pillow(Image.fromarray(GRAY), quality=95), GRAYS, 4),
    "colour": (".png", pillow(COLOURS), RGB, 0),
    "colour JPEG": (".jpg", pillow(COLOURS, quality=98, subsampling=0), RGB, 8),
    "progressive JPEG": (".jpg", pillow(COLOURS, quality=98, progressive=True), RGB, 30),
    "BMP": (".bmp", pillow(COLOURS), RGB, 0),
    "GIF": (".gif", pillow(Image.fromarray(GRAY)), GRAYS, 0),
    "PPM": (".ppm", pillow(COLOURS), RGB, 0),
    "TIFF": (".tif", pillow(COLOURS), RGB, 0),
    "TIFF with LZW": (".tif", pillow(COLOURS, compression="tiff_lzw"), RGB, 0),
    "WEBP": (".webp", pillow(COLOURS, lossless=True), RGB, 0),
    "JPEG 2000": (".jp2", pillow(COLOURS), RGB, 1),
    "AVIF": (".avif", pillow(COLOURS, quality=100), RGB, 12),
    "TGA": (".tga", pillow(COLOURS), RGB, 0),
    "palette": (".png", pillow(Image.fromarray(GRAY).convert("P")), GRAYS, 0),
    "opaque alpha": (".png", pillow(COLOURS.convert("RGBA")), RGB, 0),
    "alpha": (".png", pillow(translucent()), SEEN_ON_WHITE, 1),
    "alpha WEBP": (".webp", pillow(translucent(), lossless=True, exact=True), SEEN_ON_WHITE, 1),
    "alpha TIFF": (".tif", pillow(translucent()), SEEN_ON_WHITE, 1),
    "gray and alpha": (".png", pillow(COLOURS.convert("L").convert("LA")), None, 0),
    "transparent colour": (".png", pillow(Image.fromarray(GRAY), transparency=0), None, 0),
    "transparent palette": (".png", pillow(COLOURS.quantize(16), transparency=0), None, 0),
    "one bit": (
        ".png",
        pillow(Image.fromarray(GRAY > 127)),
        np.repeat(((GRAY > 127) * 255).astype(np.uint8)[..., None], 3, -1),
        0,
    ),
    "CMYK TIFF": (".tif", pillow(COLOURS.convert("CMYK")), RGB, 2),
    "CMYK JPEG": (".jpg", pillow(COLOURS.convert("CMYK"), quality=98), RGB, 20),
    "16 bits PNG": (".png", deep((RAMP * 65535).astype(np.uint16)), GRAYS, 1),
    "16 bits TIFF": (".tif", deep((RAMP * 65535).astype(np.uint16)), GRAYS, 1),
    "16 bits big-endian TIFF": (".tif", deep((RAMP * 65535).astype(">u2")), GRAYS, 1),
    "16 bits PGM": (".pgm", opencv((RAMP * 65535).astype(np.uint16)), GRAYS, 1),
    "16 bits JPEG 2000": (".jp2", deep((RAMP * 65535).astype(np.uint16)), GRAYS, 1),
    "16 bits colour PNG": (".png", opencv(RGB[..., ::-1].astype(np.uint16) * 257), RGB, 0),
    "16 bits colour TIFF": (".tif", opencv(RGB[..., ::-1].astype(np.uint16) * 257), RGB, 0),
    "floats": (".tif", deep(RAMP.astype(np.float32)), GRAYS, 1),
    "colour floats": (".tif", opencv((RGB[..., ::-1] / 255).astype(np.float32)), RGB, 1),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_read_as_it_is_seen(kind: str, tmp_path: Path) -> None:
    suffix, write, seen, tolerance = PICTURES[kind]
    path = tmp_path / f"picture{suffix}"
    write(path)
    read = read_picture(path, "RGB")
    assert read.dtype == np.uint8 and read.shape == (HEIGHT, WIDTH, 3)
    if seen is not None:
        assert np.abs(read.astype(int) - seen).max() <= tolerance
    assert np.array_equal(read_picture(path), read[..., ::-1])
    assert image_problem(path, HEIGHT, WIDTH) is None
    assert picture_size(path) == (WIDTH, HEIGHT)


TWELVE = (RAMP * 4095).astype(np.uint16)


@pytest.mark.parametrize(
    ("suffix", "values", "value_range"),
    [
        (".png", TWELVE, (0, 4095)),
        (".tif", TWELVE, (0, 4095)),
        (".tif", (RAMP * 100000).astype(np.int32), (0, 100000)),
        (".tif", (RAMP * 255).astype(np.float32), (0, 255)),
        (".tif", (RAMP * 2000 - 1000).astype(np.float32), (-1000, 1000)),
        (".tif", np.repeat((RAMP * 4095).astype(np.uint16)[..., None], 3, -1), (0, 4095)),
    ],
)
def test_a_range_scales_what_has_more_than_eight_bits(
    suffix: str, values: np.ndarray, value_range: tuple, tmp_path: Path
) -> None:
    path = tmp_path / f"picture{suffix}"
    (opencv if values.ndim == 3 else deep)(values)(path)
    read = read_picture(path, "RGB", value_range)
    assert np.abs(read.astype(int) - GRAYS).max() <= 1
    plain = tmp_path / "gray.png"
    Image.fromarray(GRAY).save(plain)
    assert np.array_equal(read_picture(plain, "RGB", value_range), GRAYS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((RAMP * 100000).astype(np.int32), "integers from 0 to 100000, .*INPUT.VALUE_RANGE"),
        ((RAMP * 255).astype(np.float32), "values from 0 to 255, .*INPUT.VALUE_RANGE"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "values that are not finite"),
    ],
)
def test_values_without_a_range_are_refused(
    values: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "picture.tif"
    deep(values)(path)
    with pytest.raises(PictureError, match=f"picture.tif has {message}"):
        read_picture(path)
    assert image_problem(path, HEIGHT, WIDTH).startswith("has ")


STORE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORE)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_tag_turns_a_picture_once(suffix: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = STORE[orientation]
    stored = COLOURS if turn is None else COLOURS.transpose(turn)
    quality = {".jpg": {"quality": 98, "subsampling": 0}, ".webp": {"lossless": True}}
    stored.save(path, exif=exif, **quality.get(suffix, {}))
    assert np.abs(read_picture(path, "RGB").astype(int) - RGB).max() <= 8
    assert picture_size(path) == (WIDTH, HEIGHT)
    assert image_problem(path, HEIGHT, WIDTH) is None
    if orientation >= 5:  # one that is wanted as it is stored
        as_stored = read_picture(path, "RGB", size=(HEIGHT, WIDTH))
        assert np.abs(as_stored.astype(int) - np.asarray(stored)).max() <= 8
        assert image_problem(path, WIDTH, HEIGHT) == "64x40 where the JSON says 40x64"


@pytest.mark.parametrize("orientation", list(STORE)[1:])
def test_a_tag_turns_a_tiff_of_several_deep_channels_once(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.tif"
    values = np.asarray(COLOURS.transpose(STORE[orientation])).astype(np.uint16)[..., ::-1] * 257
    opencv(values)(path)
    # OpenCV writes no orientation: take the place of the tag that says what is the default.
    data, planar = bytearray(path.read_bytes()), b"\x1c\x01\x03\x00\x01\x00\x00\x00"
    place = data.index(planar)
    data[place : place + 2] = (274).to_bytes(2, "little")
    data[place + 8 : place + 10] = orientation.to_bytes(2, "little")
    path.write_bytes(data)
    assert np.array_equal(read_picture(path, "RGB"), RGB)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".bmp", ".gif", ".jpg", ".jp2"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
def test_a_truncated_picture_is_found_before_training(
    suffix: str, kept: float, tmp_path: Path
) -> None:
    path = tmp_path / f"picture{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert image_problem(path, HEIGHT, WIDTH) is not None
    with pytest.raises(PictureError, match=f"picture{suffix} is "):
        read_picture(path)


def test_a_picture_that_is_damaged_in_the_middle_is_found(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 100] = bytes(100)
    path.write_bytes(data)
    assert image_problem(path, HEIGHT, WIDTH).startswith("damaged")


@pytest.mark.parametrize("behind", [b"\0" * 9000, b"\0\0\0\x18ftypmp42" + bytes(range(255)) * 90])
def test_what_phones_put_behind_a_whole_jpeg_is_no_fault(behind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    COLOURS.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + behind)
    assert image_problem(path, HEIGHT, WIDTH) is None
    path.write_bytes(whole[:-300] + behind.replace(b"\xff\xd9", b"\xff\x00"))
    assert image_problem(path, HEIGHT, WIDTH) == "truncated"


def test_a_thumbnails_end_is_not_that_of_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    COLOURS.resize((640, 400)).save(path, exif=b"Exif\0\0thumbnail\xff\xd8\xff\xd9")
    assert image_problem(path, 400, 640) is None
    path.write_bytes(path.read_bytes()[:-200])
    assert image_problem(path, 400, 640) == "truncated"


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_the_first_picture_of_several_counts(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    frames = [Image.fromarray(GRAY[:, ::-1]).convert("RGB")]
    options = {"lossless": True} if suffix == ".webp" else {}
    first = Image.fromarray(GRAY).convert("RGB")
    first.save(path, save_all=True, append_images=frames, **options)
    assert np.abs(read_picture(path, "RGB").astype(int) - GRAYS).max() <= 4


FOREIGN = {
    "paper.jpg": (b"%PDF-1.7 ...", "is a PDF; convert it to PNG or JPEG"),
    "drawing.png": (b"<svg xmlns='...'></svg>", "is an SVG"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0", "is an HEIC picture"),
    "clip.jpg": (b"\0\0\0\x18ftypmp42\0\0\0\0", "is a video"),
    "broken.avif": (b"\0\0\0\x18ftypavif\0\0\0\0", "is an AVIF picture that is damaged"),
    "page.jpg": (b"<!DOCTYPE html>", "is an HTML page, as a failed download leaves"),
    "figure.jpg": (b"%!PS-Adobe-3.0\n", "is a PostScript file; convert it to PNG or JPEG"),
    "old.jpg": (
        b"\xd7\xcd\xc6\x9a\0\0" + b"\0" * 4 + b"\1" * 12 + b"\1\0\t\0",
        "is a Windows metafile",
    ),
    "weather.jpg": (b"GRIB\0\0\0\1", "is a GRIB file"),
    "film.jpg": (b"\0\0\1\xb3\x01\x00\x10\0", "is a video"),
    "text.jpg": (b"nothing at all", "is not an image"),
    "empty.jpg": (b"", "is empty"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_picture_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PictureError, match=f"{name} {message}"):
        read_picture(tmp_path / name)


def test_no_program_is_asked_to_read_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: ran.append(args))
    path = tmp_path / "picture.jpg"
    COLOURS.save(path, format="EPS")
    for reads in (read_picture, picture_size, is_deep, is_turned):
        with pytest.raises(PictureError, match=r"picture\.jpg is a PostScript file; convert it"):
            reads(path)
    assert image_problem(path, HEIGHT, WIDTH) == "a PostScript file; convert it to PNG or JPEG"
    assert not ran
    assert {".jpg", ".png", ".tif"} <= read_suffixes()
    assert read_suffixes().isdisjoint({".eps", ".ps", ".wmf", ".h5", ".mpg", ".pdf"})


EXIF = b"Exif\0\0II*\0\x08\0\0\0"
ODD_TAG = EXIF + b"\1\0\x12\1\2\0\4\0\0\0down\0\0\0\0"  # the orientation as text


@pytest.mark.parametrize("block", [b"Exif\0\0XXgarbage", EXIF[:-4], ODD_TAG])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_an_orientation_that_cannot_be_read_is_none(
    suffix: str, block: bytes, tmp_path: Path
) -> None:
    path = tmp_path / f"picture{suffix}"
    COLOURS.save(path, exif=block, **({"lossless": True} if suffix == ".webp" else {}))
    assert picture_size(path) == (WIDTH, HEIGHT)
    assert not is_turned(path) and not is_deep(path)
    assert image_problem(path, HEIGHT, WIDTH) is None
    assert np.abs(read_picture(path, "RGB").astype(int) - RGB).max() <= 40


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, SyntaxError])
def test_whatever_a_decoder_raises_is_a_damaged_picture(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error("in the decoder")

    COLOURS.save(path := tmp_path / "picture.png")
    for method in ("load", "getexif"):
        with monkeypatch.context() as patch:
            patch.setattr(PngImageFile, method, fail)
            for reads in (read_picture, picture_size):
                if method == "getexif" or reads is read_picture:
                    with pytest.raises(PictureError, match=r"picture\.png is damaged: .*decoder"):
                        reads(path)
            assert "damaged" in image_problem(path, HEIGHT, WIDTH)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_png_whose_end_is_zeros_is_damaged(share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(path := tmp_path / "picture.png")
    content = bytearray(path.read_bytes())
    start = int(share * len(content))
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)
    assert "damaged" in image_problem(path, 40, 60)
    for reads in (picture_size, read_picture):
        with pytest.raises(PictureError, match="is damaged"):
            reads(path)


def test_pipes_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("pipe.jpg", ""):
        with pytest.raises(PictureError, match="is not a file"):
            read_picture(tmp_path / name)
    with pytest.raises(PictureError, match=r"gone\.jpg is missing"):
        read_picture(tmp_path / "gone.jpg")


def test_a_damaged_tiff_that_no_library_opens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.tif"
    Image.new("RGB", (32, 24)).save(path)
    content = bytearray(path.read_bytes())
    for tag, value in ((0x0101, 0x02000018), (0x0115, 7)):  # the height, and the bands
        entry = next(
            place for place in range(8, len(content), 2)
            if content[place : place + 2] == tag.to_bytes(2, "little")
        )  # fmt: skip
        content[entry + 8 : entry + 12] = value.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(PictureError, match="not an image that Pillow or OpenCV reads"):
        read_picture(path)


def test_bands_that_are_no_colours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bands.tif"
    cv2.imwritemulti(str(path), [GRAY] * 5)  # pages: the first counts
    assert np.array_equal(read_picture(path, "RGB"), GRAYS)


def test_a_large_picture_is_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    COLOURS.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PictureError, match="is too large for Pillow to open"):
        read_picture(path)


@pytest.mark.parametrize("format", ["BGR", "RGB", "L", "YUV-BT.601"])
def test_formats_are_detectron2s(format: str, tmp_path: Path) -> None:
    from detectron2.data.detection_utils import read_image

    path = tmp_path / "picture.png"
    COLOURS.save(path)
    assert np.array_equal(read_picture(path, format), read_image(str(path), format))
