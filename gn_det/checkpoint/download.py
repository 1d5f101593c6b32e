"""Files behind addresses: downloaded once, verified, and kept by the whole address."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from iopath.common.file_io import get_cache_dir
from tqdm import tqdm

from gn_det.errors import InputError
from gn_det.files import make_folder
from gn_det.text import reason_of

__all__ = ["fetch", "is_address", "kept_at"]

SECONDS = 30  # without an answer
LEAST_SPEED = 1000  # bytes a second, after a minute
MOST_BYTES = 20 * 10**9
_CHUNK = 1 << 20
_CHECKSUM_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.\w+$")  # digits alone: a date


def is_address(path: str) -> bool:
    """Whether a path has a scheme, such as https://."""
    return bool(re.match(r"[A-Za-z][\w+.-]*://", path))


def kept_at(address: str) -> Path:
    """Where the file behind an address is kept: its name, behind a hash of the whole address.

    Raises:
        InputError: not http(s), or a name that could lead out of the folder.
    """
    parts = urlsplit(address)
    path = PurePosixPath(unquote(parts.path))
    if parts.scheme not in ("http", "https"):
        raise InputError(f"{address}: addresses begin with https:// or http://")
    if ".." in path.parts or not re.fullmatch(r"[\w+-][\w.+-]*", path.name):
        raise InputError(f"{address}: the address has .., or no plain file name at its end")
    number = hashlib.sha256(parts._replace(fragment="").geturl().encode()).hexdigest()[:16]
    return Path(get_cache_dir()) / "gn_det" / f"{number}-{path.name}"


def fetch(address: str, check: Callable[[Path], object]) -> Path:
    """The local copy of the file behind an address, downloaded where there is none yet.

    A checksum is verified where the address has one: ``#sha256=...`` behind it, or the first digits
    of SHA-256 in the name, as in ``resnet50-0676ba61.pth``. A file that does not verify or that
    check refuses is not kept.

    Args:
        address: http(s), perhaps with a query.
        check: raises InputError where a file is not what is wanted.

    Raises:
        InputError: see :func:`kept_at`; no answer within SECONDS, a transfer that breaks off or is
            slower than LEAST_SPEED, another checksum, or what check raises.
    """
    kept = kept_at(address)
    if kept.is_file():
        return kept
    make_folder(kept.parent)
    folder = Path(tempfile.mkdtemp(prefix=".download-", dir=kept.parent))
    try:
        # The name has the ending, by which check knows the format.
        partial = folder / kept.name
        _verify(address, _download(address, partial))
        try:
            check(partial)
        except InputError as error:
            raise InputError(
                f"{address} was downloaded and is not what it should be: "
                f"{str(error).replace(str(partial), 'the file')}. It was not kept"
            ) from error
        os.replace(partial, kept)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return kept


def _download(address: str, file: Path) -> str:
    """Write the file, with progress; its SHA-256."""
    request = urllib.request.Request(address.partition("#")[0], headers={"User-Agent": "gn_det"})
    digest = hashlib.sha256()
    begin, done = time.monotonic(), 0
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer, open(file, "wb") as copy:
            total = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, desc=file.name[17:], unit="B", unit_scale=True) as bar:
                while chunk := answer.read1(_CHUNK):
                    copy.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                    done += len(chunk)
                    seconds = time.monotonic() - begin
                    if done > MOST_BYTES:
                        raise OSError(f"it is larger than {MOST_BYTES / 1e9:.0f} GB")
                    if seconds > 60 and done < LEAST_SPEED * seconds:
                        raise OSError(f"{done} bytes came in {seconds:.0f} s")
            if done < total:
                raise OSError(f"{done} of {total} bytes came")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or reason_of(error)
        raise InputError(
            f"{address} cannot be fetched ({' '.join(str(reason).split())})"
        ) from error
    return digest.hexdigest()


def _verify(address: str, digest: str) -> None:
    parts = urlsplit(address)
    named = _CHECKSUM_IN_NAME.search(parts.path)
    wanted = [*parse_qs(parts.fragment).get("sha256", []), *(named.groups() if named else ())]
    for checksum in wanted:
        if not checksum or not digest.startswith(checksum.lower()):
            raise InputError(
                f"{address} has the SHA-256 {digest} and not {checksum}; it was not kept"
            )
