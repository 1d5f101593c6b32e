"""How programs end."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator

import pytest

from gn_det import InputError
from gn_det.engine.command import above_zero, at_least, run_command


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
        (at_least(1), "1", 1), (at_least(0), "0", 0), (at_least(1), "0", "0 is below 1"),
        (at_least(0), "-1", "-1 is below 0"), (at_least(0, 256), "257", "257 is above 256"),
        (at_least(0), "9" * 23, "is above 2147483647"),
        (at_least(1), "1.5", "invalid int value: '1.5'"),
        (at_least(1), "two", "invalid int value: 'two'"), (above_zero, "0.02", 0.02),
        (above_zero, "0", "0 is not a finite number above 0"), (above_zero, "-1e-3", "above 0"),
        (above_zero, "nan", "nan is not a finite number"), (above_zero, "inf", "above 0"),
        (above_zero, "1e999", "above 0"), (above_zero, "fast", "invalid float value: 'fast'"),
    ],
)  # fmt: skip
def test_numbers_of_flags_have_their_least_value(
    kind: Callable, text: str, result: float | str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=kind)
    if not isinstance(result, str):
        assert parser.parse_args([f"--number={text}"]).number == result
        return
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--number={text}"])
    said = capsys.readouterr().err
    assert "error: argument --number: " in said and result in said
