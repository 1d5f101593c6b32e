"""Damaged files against the readers of files from strangers, for a bounded time.

Each case is a file that was mutated, read in a process of its own. It passes if the reader takes it
or raises InputError. It fails if the reader raises something else, is killed, takes over 5 seconds,
or asks for over 1 GiB more memory; then the file is kept. A case follows from its number alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from tqdm import tqdm

from gn_det.checkpoint.reading import read_weights
from gn_det.checkpoint.unpickling import unpickle
from gn_det.config import dump_config, load_config
from gn_det.data.datasets import CocoFolder, read_folder
from gn_det.data.pictures import read_picture
from gn_det.data.shapes import generate_shapes
from gn_det.errors import InputError

SECONDS_OF_A_CASE = 5
GROWTH = 2**30
TOKENS = (b"-1", b"0", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"99999999999", b"&a *a")

Reader = Callable[[Path], object]


def make_targets(folder: Path) -> dict[str, tuple[list[Path], Reader]]:
    """Whole files to mutate, and what reads them, by target."""
    shapes = generate_shapes(folder / "shapes", num_train=6, num_val=3)
    weights = {"stem.weight": torch.ones(2, 3), "step": torch.tensor(3)}
    files = {name: folder / f"whole.{name}" for name in ("pkl", "pth", "safetensors", "yaml")}
    arrays = {name: value.numpy() for name, value in weights.items()}
    files["pkl"].write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2))
    torch.save({"model": weights, "epoch": 3}, files["pth"])
    safetensors.torch.save_file(weights, files["safetensors"])
    files["yaml"].write_text(dump_config(load_config(None)))
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    pictures = [folder / f"whole{suffix}" for suffix in (".jpg", ".png", ".tif", ".webp", ".gif")]
    for picture in pictures:
        Image.fromarray(noise).save(picture)
    deep = folder / "deep.png"
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(deep)
    return {
        "unpickler": ([files["pkl"]], unpickle),
        "weights": ([files["pth"], files["safetensors"]], lambda f: read_weights(f, wrapped=True)),
        "YAML": ([files["yaml"]], load_config),
        "COCO": (
            [shapes / "train.json"],
            lambda f: read_folder(CocoFolder("", str(f), str(shapes / "images")), masks=True),
        ),
        "pictures": ([*pictures, deep], read_picture),
    }


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few changes: bits, bytes, tokens, and parts that are cut, doubled or swapped."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        start = rng.randrange(len(data) or 1)
        stop = min(len(data), start + rng.choice((1, 2, 8, 64, 1024)))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start:stop] = rng.randbytes(stop - start)
        elif kind == 2:
            del data[start:stop]
        elif kind == 3:
            data[start:start] = data[start:stop] * rng.choice((1, 2, 50))
        elif kind == 4:
            data[start:stop] = rng.choice(TOKENS)
        else:
            del data[start:]
    return bytes(data)


def fault_of(reader: Reader, file: Path, log: Path) -> str:
    """What is wrong with how a reader takes a file; empty for nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(SECONDS_OF_A_CASE)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + GROWTH
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            with open(log, "w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            with suppress(InputError):
                reader(file)
            status = 0
        except BaseException:
            traceback.print_exc(file=open(log, "a"))  # noqa: SIM115
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return "hang"
    return "" if status == 0 else "exception" if status == 1 else f"killed by signal {-status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of files that failed")
    parser.add_argument("--seconds", type=float, default=600, help="of each target")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    targets = make_targets(args.output / "whole")
    failed = 0
    for name, (files, reader) in targets.items():
        contents = [(file.suffix, file.read_bytes()) for file in files]
        end, number, faults = time.monotonic() + args.seconds, args.first, []
        with tqdm(desc=name, unit="case") as progress:
            while time.monotonic() < end:
                rng = random.Random(f"{name} {number}")
                suffix, content = rng.choice(contents)
                case = args.output / f"{name}-{number}{suffix}"
                case.write_bytes(mutated(content, rng))
                log = case.with_name(f"{case.name}.txt")
                fault = fault_of(reader, case, log)
                if fault:
                    faults.append(f"{case.name}: {fault}")
                else:
                    case.unlink()
                    log.unlink(missing_ok=True)
                number += 1
                progress.update()
        print(json.dumps({"target": name, "cases": number - args.first, "faults": faults[:20]}))
        failed += len(faults)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
