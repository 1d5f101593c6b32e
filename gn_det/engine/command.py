"""The command line of a program: flags that several share, and how it ends."""

from __future__ import annotations

import argparse
import io
import math
import os
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TextIO

from detectron2.engine import default_argument_parser

from gn_det.engine.faults import check_encoding, check_open_files, telling_faults
from gn_det.engine.terminal import PrintableStream, discard
from gn_det.engine.termination import INTERRUPTED, catch_ending, end, end_loading_processes
from gn_det.errors import InputError

__all__ = [
    "RunOptions",
    "above_zero",
    "add_data_arguments",
    "add_overrides",
    "at_least",
    "reads_data",
    "run_command",
    "training_parser",
]

READER_LEFT = 128 + signal.SIGPIPE  # as a shell has it
_SECONDS_TO_END = 5


@dataclass(frozen=True)
class RunOptions:
    """What a command line says of a run, besides its config.

    Attributes:
        train, val: (JSON, folder of images) of a split in COCO format; None for the config's sets.
        skip_bad_images: whether the run leaves out images that are missing or broken.
        refuse_bad_annotations: whether annotations that cannot be learnt end it before it starts.
        crowds_as_objects: whether crowds of these splits are objects.
        resume: whether it continues from the last checkpoint of its folder, if there is one.
        eval_only: whether it evaluates and does not train.
        num_gpus: processes on this machine.
        num_machines, machine_rank: how many machines take part, and which this one is.
        dist_url: where the processes meet; "auto" finds a free port on this machine.
    """

    train: tuple[str, str] | None = None
    val: tuple[str, str] | None = None
    skip_bad_images: bool = False
    refuse_bad_annotations: bool = False
    crowds_as_objects: bool = False
    resume: bool = False
    eval_only: bool = False
    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> RunOptions:
        """The options of parsed arguments; what the program has no flag for is at its default."""
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        for split in ("train", "val"):
            if given.get(split):
                given[split] = tuple(given[split])
        return cls(**given)

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_gpus * self.num_machines


def training_parser(description: str, overrides: str) -> argparse.ArgumentParser:
    """Detectron2's argument parser with :func:`add_data_arguments`.

    Args:
        description: first lines of --help.
        overrides: form of the config overrides at the end of the command.
    """
    parser = default_argument_parser(
        epilog=f"The flags come first, then config overrides as {overrides}."
    )
    parser.description = description
    ours = {
        "resume": "go on from the last checkpoint in the output folder; the model, the batch, the "
        "seed and the data have to be those that the run began with",
        "opts": f"config overrides, {overrides}",
    }
    for action in parser._actions:
        action.help = ours.get(action.dest, action.help)
    # Detectron2's default is one port for all runs of a user, at which two runs may meet.
    parser.set_defaults(dist_url="auto")
    add_data_arguments(parser)
    return parser


def add_data_arguments(
    parser: argparse.ArgumentParser, *, val: bool = True, required: bool = False
) -> None:
    """Add --train, --val and the flags that say how to read them.

    Args:
        parser: to add to.
        val: whether the program takes a held-out split.
        required: whether --train has to be given.
    """
    for flag, split in (("--train", "training"), ("--val", "held-out")):
        if flag == "--train" or val:
            parser.add_argument(
                flag,
                nargs=2,
                required=required and flag == "--train",
                metavar=("JSON", "IMAGES_DIR"),
                help=f"{split} split in COCO format; the classes come from its categories",
            )
    parser.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="continue without images that are missing or broken",
    )
    parser.add_argument(
        "--refuse-bad-annotations",
        action="store_true",
        help="end where annotations would be dropped, such as boxes without width or height",
    )
    parser.add_argument(
        "--crowds-as-objects",
        action="store_true",
        help="learn annotations with iscrowd 1, as some tools write every mask",
    )


class _Checked(argparse.Action):
    """Stores the numbers of a flag, or raises an InputError that names the flag and a number."""

    def __init__(self, *args: Any, check: Callable[[float], str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check = check

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values if isinstance(values, list) else [values]:
            if has_to_be := self.check(value):
                raise InputError(f"{option_string} {value}: {has_to_be}")
        setattr(namespace, self.dest, values)


def at_least(least: int, most: int = 2**31 - 1) -> dict[str, Any]:
    """Arguments of add_argument: whole numbers of at least so much, and at most so much."""

    def check(value: float) -> str:
        if value < least:
            return f"at least {least}"
        return "" if value <= most else f"at most {most}"

    return {"type": int, "action": _Checked, "check": check}


def above_zero() -> dict[str, Any]:
    """Arguments of add_argument: finite numbers above 0."""

    def check(value: float) -> str:
        return "" if 0 < value < math.inf else "a finite number above 0"

    return {"type": float, "action": _Checked, "check": check}


def reads_data(args: argparse.Namespace) -> bool:
    """Whether a flag of :func:`add_data_arguments` is given."""
    flags = ("train", "val", "skip_bad_images", "refuse_bad_annotations", "crowds_as_objects")
    return any(getattr(args, flag) for flag in flags)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add config overrides as the last arguments: ``args.opts``, KEY VALUE KEY VALUE ..."""
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        action=_Overrides,
        metavar="KEY VALUE",
        help="config overrides, after all flags",
    )


class _Overrides(argparse.Action):
    """Overrides, to be recorded without the -- that ends the list of a flag before them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values[1:] if values[:1] == ["--"] else values)


def _open(stream: TextIO | None) -> TextIO:
    """A standard stream that shows what its encoding lacks as escapes; nowhere if it is closed."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _reader_has_left(stream: TextIO) -> bool:
    """Whether the program behind a pipe has ended, as head does."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _empty(stream: TextIO) -> None:
    """Write what is left, or let it go nowhere: Python would say once more that it cannot."""
    try:
        stream.flush()
    except OSError:
        discard(stream)


def run_command(main: Callable[[], int | None]) -> None:
    """Call main and exit with its status: None is 0, 2 for an InputError or a fault of a disk.

    Whatever is printed passes through a :class:`PrintableStream`. Ctrl-C is 130, SIGTERM 143, see
    :mod:`gn_det.engine.termination`; 141 is a pipe whose reader has left.
    """
    before = catch_ending(partial(end, within=_SECONDS_TO_END))
    streams = [_open(stream) for stream in (sys.stdout, sys.stderr)]
    sys.stdout, sys.stderr = map(PrintableStream, streams)
    try:
        with telling_faults():
            check_encoding()
            check_open_files()
            try:
                status = main()
            finally:
                sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        if not _reader_has_left(streams[0]):
            raise
        status = READER_LEFT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    finally:
        for stream in streams:
            _empty(stream)
        # In the end of the interpreter there is nothing left to save.
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        end_loading_processes()
    sys.exit(status)
