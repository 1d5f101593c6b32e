"""Small files that would cost much are refused in no time."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gn_det import InputError
from gn_det.budget import check_pickle
from gn_det.checkpoint.reading import read_weights

PROTO = pickle.PROTO + b"\x02"


def hashed_for_ever() -> bytes:
    """A dict whose key is a tuple of one tuple twice, which is a tuple of one tuple twice, ..."""
    code = [PROTO, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.BINPUT, b"\x00"]
    for number in range(60):
        code += [pickle.BINGET, bytes([number]), pickle.TUPLE2]
        code += [pickle.BINPUT, bytes([number + 1])]
    return b"".join([*code, pickle.NONE, pickle.SETITEM, pickle.STOP])


BOMBS = {
    "hashed for ever": hashed_for_ever(),
    "nested": PROTO + b"(" * 5000 + b"t" * 5000 + pickle.STOP,
    "a far number": PROTO + b"}r" + (2**31 - 1).to_bytes(4, "little") + pickle.STOP,
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_a_pickle_bomb_is_refused_before_it_is_read(bomb: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"bomb{ending}"
    if ending == ".pkl":
        file.write_bytes(BOMBS[bomb])
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("bomb/data.pkl", BOMBS[bomb])
            archive.writestr("bomb/version", "3\n")
    begin = time.monotonic()
    with pytest.raises(InputError, match="is refused: it (holds values nested|numbers a value)"):
        read_weights(file)
    assert time.monotonic() - begin < 5


def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path) -> None:
    saved = io.BytesIO()
    torch.save({"a": torch.zeros(1_000_000)}, saved)
    file = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(saved) as archive,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as copy,
    ):
        for entry in archive.infolist():
            copy.writestr(entry.filename, archive.read(entry))
    with pytest.raises(InputError, match="would unpack to 4[0-9]*, more than 10 times as many"):
        read_weights(file)


def test_a_tensor_larger_than_what_the_file_holds_of_it_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"'a' is \(1000000000000,\), more than the file holds"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_what_people_save_is_within_the_budgets(protocol: int) -> None:
    arrays = {f"layer{i}": np.ones((3, i), np.float32) for i in range(500)}
    content = {"model": arrays, "ids": list(range(10_000)), "sets": {1, 2}, "nested": [[[()]]]}
    check_pickle(io.BytesIO(pickle.dumps(content, protocol)), "mine")


def test_files_of_every_format_of_pytorch_are_read(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()
    for name, options in {"zip": {}, "old": {"_use_new_zipfile_serialization": False}}.items():
        torch.save({"model": state, "epoch": 3}, tmp_path / f"{name}.pth", **options)
        assert read_weights(tmp_path / f"{name}.pth")["model"].keys() == state.keys()


def saved(file: Path, crc32: bool = True) -> None:
    torch.serialization.set_crc32_options(crc32)
    try:
        torch.save({"model": {"weight": torch.rand(1000), "bias": torch.rand(5)}}, file)
    finally:
        torch.serialization.set_crc32_options(True)


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    saved(tmp_path / "w.pth", crc32=False)
    assert len(read_weights(tmp_path / "w.pth")["model"]["weight"]) == 1000


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "data/1"])
def test_a_changed_byte_is_told(part: str, tmp_path: Path) -> None:
    saved(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        content = archive.read(f"w/{part}")
    whole = (tmp_path / "w.pth").read_bytes()
    place = whole.index(content) + len(content) // 2
    changed = bytes([whole[place] ^ 1])
    (tmp_path / "w.pth").write_bytes(whole[:place] + changed + whole[place + 1 :])
    with pytest.raises(InputError, match=r"w\.pth cannot be read as weights: it is"):
        read_weights(tmp_path / "w.pth")
