"""How programs end."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from gn_det import InputError
from gn_det.engine.command import run_command


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
