"""Files that would leave a mark if what they hold were run."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

REFUSED = "is refused: it asks for posix.system"


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        import os

        return os.system, (f"touch {self.mark}",)


def write_hostile(file: Path, mark: Path, content: dict[str, object]) -> None:
    """Write a file of the kind of its ending that holds content, and makes mark when it is run."""
    content = {"run": Touch(mark), **content}
    if file.suffix in (".pth", ".pyth"):
        torch.save(content, file)
    else:  # a pickle, whatever the name claims
        file.write_bytes(pickle.dumps(content, protocol=2))
