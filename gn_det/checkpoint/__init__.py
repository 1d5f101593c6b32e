"""Loading and saving weights."""

from gn_det.checkpoint.checkpointer import Checkpointer
from gn_det.checkpoint.weights_file import check_weights_exist

__all__ = ["Checkpointer", "check_weights_exist"]
