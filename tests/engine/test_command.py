"""How programs end."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator

import pytest

from gn_det import InputError
from gn_det.engine.command import above_zero, add_overrides, at_least, run_command


@pytest.fixture(autouse=True)
def _signals_of_the_tests() -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error: BaseException) -> object:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (3, 3)])
def test_the_result_of_main_is_the_exit_status(result: int | None, status: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: result)
    assert (ended.value.code or 0) == status


def test_bad_input_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(raising(InputError("no such thing")))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no such thing\n"


def test_an_interruption_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_keeps_its_trace() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("kind", "text", "result"),
    [
        (at_least(1), "1", 1), (at_least(0), "0", 0), (at_least(1), "0", "0: at least 1"),
        (at_least(0), "-1", "-1: at least 0"), (at_least(0, 256), "257", "257: at most 256"),
        (at_least(0), "9" * 23, "at most 2147483647"), (above_zero(), "0.02", 0.02),
        (above_zero(), "0", "0.0: a finite number above 0"), (above_zero(), "-1e-3", "above 0"),
        (above_zero(), "nan", "nan: a finite number"), (above_zero(), "1e999", "inf: a finite"),
    ],
)  # fmt: skip
def test_numbers_of_flags_have_their_bounds(kind: dict, text: str, result: float | str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", **kind)
    parser.add_argument("--several", nargs="+", **kind)
    if not isinstance(result, str):
        assert parser.parse_args([f"--number={text}"]).number == result
        assert parser.parse_args(["--several", text, text]).several == [result, result]
        return
    for flag in ("--number", "--several"):
        with pytest.raises(InputError, match=f"^{flag} .*{result}"):
            parser.parse_args([f"{flag}={text}"])


def test_what_is_no_number_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", **at_least(1))
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--number", "1.5"])
    assert "argument --number: invalid int value: '1.5'" in capsys.readouterr().err


@pytest.mark.parametrize("ends_a_list", [False, True])
def test_what_ends_the_list_of_a_flag_is_no_override(ends_a_list: bool) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="+", type=int)
    add_overrides(parser)
    flag = ["--seeds", "0", "--"] if ends_a_list else []
    args = parser.parse_args([*flag, "MODEL.DEVICE", "cpu"])
    assert args.opts == ["MODEL.DEVICE", "cpu"]
