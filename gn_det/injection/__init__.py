"""Putting FusedGroupNorm into models that others wrote."""

from .convert import inject

__all__ = ["inject"]
