"""Fixtures: a tiny shapes set, calling the tools in this process, a GPU that is not there."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# mmengine imports yapf, which writes a cache when it is first imported. Here that is done before
# pytest-xdist starts its processes, which would read what another is writing.
import yapf.pytree.pytree_utils  # noqa: F401
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure
from support.programs import load_program
from torch._subclasses import FakeTensorMode

import gn_det.engine  # noqa: F401  (silences third-party warnings, as the tools do)
from gn_det.data.shapes import generate_shapes
from gn_det.engine import activation_memory
from gn_det.ops import backend


def pytest_collection_finish() -> None:
    """Let the collector of cycles pass over the modules, which stay: each of its rounds took half
    a second, and what counts memory asks for many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _registered_sets_go() -> Iterator[None]:
    """A program registers its data sets once in its process; tests share one."""
    yield
    for name in ("custom_train", "custom_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shapes set of 6 training and 3 held-out images; not to be changed."""
    return generate_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=6, num_val=3)


@pytest.fixture
def edit_shapes(shapes: Path, tmp_path: Path) -> Callable[..., Path]:
    """Edit the JSON of a split in a copy of the tiny shapes set, whose images are links."""
    folder = tmp_path / "edited"

    def edit(change: Callable[[dict], object], split: str = "train") -> Path:
        if not folder.exists():
            (folder / "images").mkdir(parents=True)
            for image in (shapes / "images").iterdir():
                (folder / "images" / image.name).symlink_to(image)
            for name in ("train.json", "val.json"):
                (folder / name).write_text((shapes / name).read_text())
        dataset = json.loads((folder / f"{split}.json").read_text())
        change(dataset)
        (folder / f"{split}.json").write_text(json.dumps(dataset))
        return folder

    return edit


@pytest.fixture
def call_main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | None]:
    """Call a program's main in this process, with arguments; exceptions come through."""

    def call(path: str, *args: object) -> int | None:
        monkeypatch.setattr(sys, "argv", [path, *map(str, args)])
        return load_program(path).main()

    return call


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, to look at what they show."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def save(figure: Figure, *args: object, **kwargs: object) -> None:
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU that is not there: its tensors have all but values."""
    monkeypatch.setattr(backend, "TRITON_VERSION", "3.2.0")
    with FakeTensorMode():
        yield torch.device("cuda")


@pytest.fixture
def autocast() -> Iterator[None]:
    """What torch.autocast("cuda", torch.bfloat16) does, which without a GPU does nothing."""
    with activation_memory.autocast(enabled=True, dtype=torch.bfloat16):
        yield
