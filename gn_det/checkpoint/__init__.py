"""Loading and saving weights."""

from .checkpointer import Checkpointer
from .weights_file import check_weights_exist

__all__ = ["Checkpointer", "check_weights_exist"]
