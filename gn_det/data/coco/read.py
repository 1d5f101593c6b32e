"""Reading a COCO-format JSON: its encoding, its lists, and no number that is none."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gn_det.data.coco.findings import Findings
from gn_det.errors import InputError
from gn_det.files import check_regular_file
from gn_det.text import printable, shortened

__all__ = ["SECTIONS", "check_finite", "read_coco"]

SECTIONS = ("images", "annotations", "categories")
_ARCHIVES = (b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")


def read_coco(
    json_file: str | Path, sections: Sequence[str] = SECTIONS, findings: Findings | None = None
) -> dict[str, Any]:
    """Read a JSON in COCO format.

    Args:
        json_file: in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.
        sections: lists of objects that it must have.
        findings: told where the encoding is not the one that others read, UTF-8 without a mark.

    Returns:
        The parsed JSON.

    Raises:
        InputError: no such file, no JSON, no such lists, an infinity anywhere, or NaN in a list.
            NaN as the value of a key, which is what pandas writes for what is missing, becomes
            null.
    """
    check_regular_file(json_file, "annotation file")
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    try:
        content = Path(json_file).read_bytes()
        if content.startswith(_ARCHIVES):
            raise InputError(f"{json_file} is a compressed archive; unpack it")
        encoding = json.detect_encoding(content)
        text = content.decode(encoding, "surrogatepass")
        del content
        with _without_collection():
            dataset = json.loads(text, parse_constant=constant)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{json_file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{json_file} is not text in UTF-8 or UTF-16: {error.reason} at byte {error.start}; "
            "save it in UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{json_file} is not JSON: {printable(error)}") from error
    if not isinstance(dataset, dict):
        raise InputError(f"{json_file} is not in COCO format: it has no list {sections[0]!r}")
    for section in sections:
        entries = dataset.get(section)
        if not isinstance(entries, list):
            raise InputError(f"{json_file} is not in COCO format: it has no list {section!r}")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise InputError(
                    f"{json_file} is not in COCO format: {section}[{index}] is "
                    f"{type(entry).__name__}, no object"
                )
    if constants:
        _take_nan_as_null(dataset, findings)
        check_finite(dataset, json_file)
    if findings is not None and encoding != "utf-8":
        name = "UTF-8 with a byte order mark" if encoding == "utf-8-sig" else encoding.upper()
        findings.add("mended", "files in another encoding than UTF-8", "the whole file", text=name)
    return dataset


@contextmanager
def _without_collection() -> Iterator[None]:
    """Millions of new objects, none of them garbage, which Python would search again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _take_nan_as_null(dataset: dict[str, Any], findings: Findings | None) -> None:
    for section, entries in dataset.items():
        for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if isinstance(value, float) and math.isnan(value):
                    entry[key] = None
                    if findings is not None:
                        what = "NaN in place of a value: taken as none"
                        findings.add("mended", what, f"{section}[{index}]", text=key)


def check_finite(dataset: dict[str, Any], json_file: str | Path) -> None:
    """Raise an InputError that names the numbers of a data set that are NaN or infinite."""
    places = list(_not_finite(dataset))
    if places:
        raise InputError(
            f"{json_file} has {len(places)} numbers that are NaN or infinite: "
            f"{shortened(places, 3)}"
        )


def _not_finite(dataset: dict[str, Any]) -> Iterator[str]:
    """Where NaN and infinities are: annotation 7, segmentation: nan."""
    for section, entries in dataset.items():
        if not isinstance(entries, list):
            entries = [entries]
        for index, entry in enumerate(entries):
            known = isinstance(entry, dict) and "id" in entry and section in SECTIONS
            place = f"{section.rstrip('s')} {entry['id']!r}" if known else f"{section}[{index}]"
            items = entry.items() if isinstance(entry, dict) else [("", entry)]
            for key, value in items:
                for number in _numbers(value):
                    if not math.isfinite(number):
                        yield printable(f"{place}, {key}: {number}")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
