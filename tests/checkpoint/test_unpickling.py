"""Pickles give arrays and plain containers, and nothing else."""

from __future__ import annotations

import collections
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
from support.hostile import REFUSED, Touch

from gn_det import InputError
from gn_det.checkpoint.unpickling import unpickle

CONTENT = {
    "arrays": [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.int64).reshape(3, 2)),
        np.array(3, np.float16),
        np.zeros((0, 4), np.float32),
        np.array([1.5, 2.5], ">f8"),
        np.array(["circle", "square"]),
        np.array([b"a", b"bc"]),
        np.array([True, False]),
    ],
    "scalars": [np.float32(0.5), np.int64(7), np.bool_(True)],
    "plain": (None, True, 1 << 70, 0.25, "é", b"", b"\x00\xff", {1, 2}, frozenset({3})),
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
}


def written(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "file.pkl").write_bytes(content)
    return tmp_path / "file.pkl"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_scalars_and_plain_containers_come_as_they_were(
    tmp_path: Path, protocol: int
) -> None:
    loaded = unpickle(written(tmp_path, pickle.dumps(CONTENT, protocol)))
    for expected, actual in zip(CONTENT["arrays"], loaded["arrays"], strict=True):
        assert actual.dtype in (expected.dtype, expected.dtype.newbyteorder("="))
        assert np.array_equal(actual, expected)
    for expected, actual in zip(CONTENT["scalars"], loaded["scalars"], strict=True):
        assert type(actual) is type(expected) and actual == expected
    assert loaded["plain"] == CONTENT["plain"]
    assert type(loaded["ordered"]) is collections.OrderedDict
    assert list(loaded["ordered"]) == ["b", "a"]


# What Python 2.7 and its NumPy write for {"w": numpy.array([1, -2], "<f4"), "lr": float32(0.5)},
# whose strings are bytes: opcode U.
PYTHON2 = (
    b"\x80\x02}(U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"U\x08\x00\x00\x80?\x00\x00\x00\xc0tb"
    b"U\x02lrcnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x04\x00\x00\x00?\x86Ru."
)


def test_a_file_that_python_2_wrote_is_read(tmp_path: Path) -> None:
    loaded = unpickle(written(tmp_path, PYTHON2))
    assert np.array_equal(loaded["w"], np.array([1, -2], np.float32)) and loaded["lr"] == 0.5
    reference = pickle.loads(PYTHON2, encoding="latin1")
    assert np.array_equal(reference["w"], loaded["w"]) and reference["lr"] == loaded["lr"]


def test_what_would_run_is_named_and_not_run(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file = written(tmp_path, pickle.dumps({"w": Touch(tmp_path / "mark")}, protocol))
        with pytest.raises(InputError, match=REFUSED) as caught:
            unpickle(file)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"\x80\x04\x8c\x05numpy\x8c\x09load.__ge\x93.", "numpy.load.__ge"),
        (b"cnumpy.testing._private.utils\nruntests\n.", r"numpy\.testing.*runtests"),
        (b"c_codecs\nencode\n(S'a'\nS'zlib'\ntR.", "the encoding zlib"),
        (b"cnumpy\ndtype\n(S'O8'\ntR.", "numpy.dtype..O8"),
        (b"cnumpy\ndtype\n(S'V8'\ntR.", "numpy.dtype..V8"),
        (pickle.dumps(np.array([{}], object)), "numpy.dtype..O8"),
        # A forged dtype of fields that are pointers, and one of another size than its code's.
        (b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'|'\nN(S'a'\nt(dI8\nI1\nI63\ntb.", "numpy.dtype with"),
        (b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'<'\nNNNI800\nI-1\nI0\ntb.", "numpy.dtype with"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99999999999\ntS'b'\ntR.",
            "an array of the shape",
        ),
    ],
)
def test_names_that_are_not_admitted_are_told(tmp_path: Path, content: bytes, named: str) -> None:
    with pytest.raises(InputError, match=f"is refused: it asks for {named}"):
        unpickle(written(tmp_path, content))


def test_names_made_up_to_disturb_a_terminal_are_escaped(tmp_path: Path) -> None:
    content = b"\x80\x04\x8c\x02a\n\x8c\x05\x1b[31m\x93."
    with pytest.raises(InputError, match=r"it asks for a\\n\.\\x1b\[31m, and"):
        unpickle(written(tmp_path, content))


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = pickle.dumps(CONTENT, 2)
    ends = [position for _, _, position in pickletools.genops(whole)]
    for content in (b"", b"no pickle", whole[-40:], *(whole[:end] for end in ends)):
        file = written(tmp_path, content)
        with pytest.raises(InputError, match=r"file\.pkl cannot be read as a pickle") as caught:
            unpickle(file)
        assert "\n" not in str(caught.value)


_NUMPY = b"\x80\x03"
_ARRAY = (  # two bytes, not yet built
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
)
_STATE = b"(K\x01K\x02\x85cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR\x89C\x02AAtb"
_OVER_AN_ARRAY = b"(h\x00cnumpy\ndtype\n(X\x02\x00\x00\x00u1tRK\x02\x85X\x01\x00\x00\x00CtR"
FORGED = {
    "addresses in a constructor": (
        b"cnumpy\nndarray\n(K\x01\x85X\x01\x00\x00\x00OC\x08AAAAAAAAtR.",
        "numpy.ndarray, made otherwise",
    ),
    "addresses in a new object": (
        b"cnumpy\nndarray\n(K\x01\x85X\x01\x00\x00\x00OC\x08AAAAAAAAt\x81.",
        "numpy.ndarray, made otherwise",
    ),
    "memory that is freed": (_ARRAY + _STATE + _STATE + b".", "a second state of an array"),
    "memory of another": (
        _ARRAY + _STATE + b"q\x000cnumpy.core.numeric\n_frombuffer\n" + _OVER_AN_ARRAY + b".",
        "an array over another's memory",
    ),
    "a changed function": (
        b"cnumpy.core.multiarray\nscalar\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b.",
        "a change of a function",
    ),
}


@pytest.mark.parametrize("forged", FORGED)
def test_memory_that_is_not_the_arrays_own_is_refused(tmp_path: Path, forged: str) -> None:
    content, message = FORGED[forged]
    with pytest.raises(InputError, match=message):
        unpickle(written(tmp_path, _NUMPY + content))


def test_an_array_of_the_forged_kind_is_read_where_it_is_honest(tmp_path: Path) -> None:
    assert unpickle(written(tmp_path, _NUMPY + _ARRAY + _STATE + b".")).tolist() == [65, 65]
