"""Triton kernels. Only these files and studies/kernels import triton.

Read tile.py (what one program sees), then forward.py, then backward.py. plan.py, one folder up,
says how many programs there are, and launch.py runs them.
"""

from triton import __version__ as TRITON_VERSION

__all__ = ["TRITON_VERSION"]
