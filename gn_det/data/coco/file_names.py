"""Finding pictures whose names are written in another form than the folder has."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote

from tqdm import tqdm

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_EXTENSIONS = (*_JPEG, ".png", ".bmp", ".tif", ".tiff", ".webp")
_PATH_IN_QUERY = re.compile(r".*\?d=")  # of Label Studio's local files

__all__ = ["can_be_named", "find_files", "leaves_folder"]

_REWRITTEN = {
    "spaces or line ends around them": str.strip,
    "a URL's query": lambda name: _PATH_IN_QUERY.sub("", name).partition("?")[0],
    "backslashes": lambda name: name.replace("\\", "/"),
    "URL-quoted": unquote,
    "not URL-quoted": partial(quote, errors="surrogatepass"),
}


def leaves_folder(name: str, root: str | Path) -> bool:
    """Whether a file name, joined to a folder, is a place outside of it; links may lead there."""
    top = os.path.abspath(root)
    return os.path.commonpath([top, os.path.abspath(os.path.join(top, name))]) != top


def can_be_named(name: str) -> bool:
    """Whether a file can have a name: without a zero byte, and of whole characters."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


class Found(NamedTuple):
    """What :func:`find_files` found.

    Attributes:
        files: (name below the folder, what is different about its form) by the name in the JSON.
        several: the files that a name could be, by the name in the JSON.
    """

    files: dict[str, tuple[str, str]]
    several: dict[str, list[str]]


def find_files(names: Iterable[str], root: str | Path) -> Found:
    """Find files whose names are not as the folder has them.

    Tried are other slashes, URL-quoting, leading folders too many or too few, another case and
    another Unicode form, and what these give together. Then names without an extension are tried,
    and those with another one of JPEG. Two names that would be one file are not found.

    Args:
        names: of all files, as a JSON has them.
        root: the folder.

    Returns:
        What there is for each name that is not there as it is written.
    """
    names = dict.fromkeys(names)
    missing = [name for name in names if not _is_there(name, root)]
    absolute = {name: _below(name, root) for name in missing if _is_below(name, root)}
    missing = [name for name in missing if name not in absolute]
    found = {name: (below, *_leading(1)) for name, below in absolute.items()}
    if not missing:
        return Found(found, {})
    depth = max(name.count("/") + name.count("\\") for name in missing) + 3
    folder = _Folder(_files_below(str(root), depth))
    elsewhere = {name: match for name in missing if (match := folder.find(name))}
    there = [os.path.normpath(name) for name in names if name not in elsewhere]
    taken = Counter([*there, *(match for match, _ in elsewhere.values())])
    found |= {name: match for name, match in elsewhere.items() if taken[match[0]] == 1}
    several = {name: folder.several(name) for name in missing if name not in found}
    free = {name: [f for f in files if f not in taken] for name, files in several.items()}
    return Found(found, {name: files for name, files in free.items() if len(files) > 1})


def _is_there(name: str, root: str | Path) -> bool:
    return (
        can_be_named(name)
        and not os.path.isabs(name)
        and not leaves_folder(name, root)
        and os.path.isfile(os.path.join(root, name))
    )


def _is_below(name: str, root: str | Path) -> bool:
    """Whether a name is the whole path of a file in a folder."""
    return (
        can_be_named(name)
        and os.path.isabs(name)
        and not leaves_folder(name, root)
        and os.path.isfile(name)
    )


def _below(name: str, root: str | Path) -> str:
    return os.path.relpath(name, os.path.abspath(root))


def _files_below(root: str, depth: int) -> Iterator[str]:
    walk = os.walk(root, followlinks=True)
    for folder, folders, files in tqdm(walk, desc="looking for the images", unit="folder", delay=2):
        below = os.path.relpath(folder, root)
        if below.count("/") + 1 >= depth:  # links may lead round
            folders.clear()
        yield from (file if below == "." else f"{below}/{file}" for file in files)


class _Folder:
    """The files of a folder, by their names and by the ends of these, whatever the case."""

    def __init__(self, files: Iterable[str]) -> None:
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_last_part: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for file in files:
            self._by_name[_key(file)].append(file)
            self._by_last_part[_key(file.rpartition("/")[2])].append(file)
            self._by_stem[_key(os.path.splitext(file)[0])].append(file)

    def find(self, name: str) -> tuple[str, str] | None:
        """The file that a name is, and what is different about its form."""
        for rewritten, forms in _rewritings(name):
            parts = [p for p in PurePosixPath(rewritten).parts if p not in ("/", "//")]
            if not parts or ".." in parts:
                continue
            for skipped in range(len(parts)):
                wanted = "/".join(parts[skipped:])
                match = _only(self._by_name[_key(wanted)], wanted)
                if match:
                    return match, ", ".join([*forms, *_leading(skipped), *_letters(wanted, match)])
            wanted = "/".join(parts)
            longer = [f for f in self._by_last_part[_key(parts[-1])] if _ends(f, wanted)]
            match = _only(longer, wanted)
            if match:
                end = match[-len(wanted) :]
                return match, ", ".join(
                    [*forms, "a leading folder too few", *_letters(wanted, end)]
                )
        return self._with_extension(name)

    def _with_extension(self, name: str) -> tuple[str, str] | None:
        for rewritten, forms in _rewritings(name):
            stem, extension = os.path.splitext(rewritten)
            if extension.lower() not in _EXTENSIONS:
                stem, extension = rewritten, ""
            expected = _JPEG if extension else _EXTENSIONS
            files = [f for f in self._by_stem[_key(stem)] if f.lower().endswith(expected)]
            if extension.lower() in ("", *_JPEG) and len(files) == 1:
                return files[0], ", ".join([*forms, "another extension"])
        return None

    def several(self, name: str) -> list[str]:
        """The files of this name in folders below, or in another case."""
        wanted = name.strip().replace("\\", "/")
        files = self._by_last_part[_key(PurePosixPath(wanted).name)]
        return sorted(f for f in files if _ends(f, wanted) or _key(f) == _key(wanted))


def _rewritings(name: str) -> list[tuple[str, list[str]]]:
    """A name and what the forms make of it, alone and together; those of few forms first."""
    names: list[tuple[str, list[str]]] = [(name, [])]
    for form, rewrite in _REWRITTEN.items():
        names += [(rewrite(n), [*forms, form]) for n, forms in names if rewrite(n) != n]
    return sorted(names, key=lambda item: len(item[1]))


def _only(files: list[str], wanted: str) -> str | None:
    exact = [file for file in files if file.endswith(wanted)]
    return (exact or files)[0] if len(exact or files) == 1 else None


def _ends(file: str, wanted: str) -> bool:
    return _key(file).endswith("/" + _key(wanted))


def _leading(skipped: int) -> list[str]:
    return [] if not skipped else ["a leading folder too many"]


def _letters(wanted: str, match: str) -> list[str]:
    if wanted == match:
        return []
    same = unicodedata.normalize("NFC", wanted) == unicodedata.normalize("NFC", match)
    return ["another Unicode form" if same else "another case"]


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
