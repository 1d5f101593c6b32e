"""Foreign text is shown, and steers neither a terminal nor a page."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gn_det import InputError
from gn_det.checkpoint.reading import read_weights
from gn_det.config import load_config
from gn_det.engine.terminal import PrintableFilter, PrintableStream
from gn_det.text import markdown, printable, table

HOSTILE = {
    "escape sequence": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "8-bit escape": ("a\x9b31mb", r"a\x9b31mb"),
    "title": ("a\x1b]0;b\x07", r"a\x1b]0;b\x07"),
    "line breaks": ("a\r\nb\x85c\u2028d", r"a\r\nb\x85c\u2028d"),
    "direction": ("a\u202eb\u2066c\u200f", r"a\u202eb\u2066c\u200f"),
    "no text": ("a\udcffb\ufeff\x00", r"a\udcffb\ufeff\x00"),
}
SHOWN = ["Füße", "крыша", "猫", "שלום", "می\u200cخواهم", "👩\u200d🌾", r"C:\cat", "a|b `c` $d$"]


def by_error(name: str, tmp_path: Path) -> str:
    return str(InputError(f"no category {name}"))


def by_weights(name: str, tmp_path: Path) -> str:
    torch.save({"model": {name: "no tensor"}}, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        read_weights(tmp_path / "w.pth")
    return str(caught.value)


def by_config(name: str, tmp_path: Path) -> str:
    quoted = "".join(f"\\u{ord(c):04x}" for c in name)
    (tmp_path / "c.yaml").write_text(f'"{quoted}": 1\n')
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "c.yaml")
    return str(caught.value)


def by_path(name: str, tmp_path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / name.replace("\x00", ""))
    return str(caught.value)


def by_log(name: str, tmp_path: Path) -> str:
    return logged("%s", name.replace("\n", ""))


def by_stream(name: str, tmp_path: Path) -> str:
    stream = io.StringIO()
    print(name.replace("\n", "").replace("\r", ""), file=PrintableStream(stream))
    return stream.getvalue()


def by_table(name: str, tmp_path: Path) -> str:
    return table([[name, Path(name)]], [name], tablefmt="plain")


def by_markdown(name: str, tmp_path: Path) -> str:
    return table([[name]], [name], tablefmt="github")


def logged(message: str, *args: object) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(PrintableFilter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning(message, *args)
    return stream.getvalue()


SINKS = [by_error, by_weights, by_config, by_path, by_log, by_stream, by_table, by_markdown]


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("sink", SINKS)
def test_nothing_of_a_name_steers_a_terminal(sink: Callable, kind: str, tmp_path: Path) -> None:
    shown = sink(HOSTILE[kind][0], tmp_path)
    assert all(line.isprintable() for line in shown.split("\n")), ascii(shown)
    # A log has no colours, and an unknown key is shown up to its first space.
    assert "\\" in shown or sink in (by_log, by_config)


@pytest.mark.parametrize(("text", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_not_printable_becomes_its_escape(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert "\n" not in str(InputError(text)) and str(InputError(text)) == expected


@pytest.mark.parametrize("text", SHOWN)
def test_letters_of_all_scripts_and_emoji_stay(text: str) -> None:
    assert printable(text) == text == str(InputError(text))


def test_a_markdown_cell_stays_one_cell_without_markup() -> None:
    for name in ("a|b", "a\\|b", "<img src=x>", "`rm`", "[a](b)", "![a](b)", "a\n\n# b"):
        lines = table([[name, "c"]], ["d", "e"], tablefmt="github").splitlines()
        assert len(lines) == 3 and lines[2].count("|") == 3
        assert not {"<", "`"} & set(lines[2]) and "](" not in lines[2]
    assert markdown("a & b") == "a &#38; b"


def test_lines_and_tabs_of_our_own_stay_in_the_log() -> None:
    assert logged("a\n\tb \x1b[36mc\x1b[0m %s", 1) == "a\n\tb c 1\n"
    try:
        raise ValueError("\x1b[2J\u202e")
    except ValueError:
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.addFilter(PrintableFilter())
        logger = logging.Logger("test")
        logger.addHandler(handler)
        logger.exception("failed")
    assert r"ValueError: \x1b[2J\u202e" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_colours_pass_to_a_terminal_alone() -> None:
    for is_terminal, expected in ((True, "\x1b[31mred\x1b[0m\\x1b[2J"), (False, "\\x1b[31mred")):
        stream = io.StringIO()
        stream.isatty = lambda is_terminal=is_terminal: is_terminal
        PrintableStream(stream).write("\x1b[31mred\x1b[0m\x1b[2J")
        assert stream.getvalue().startswith(expected)
