"""Triton kernels: the only files that import triton.

Read tile.py (what one program sees), then forward.py, then backward.py. plan.py, one folder up,
says how many programs there are, launch.py runs them. machine_code.py and traffic.py look at the
kernels without a GPU.
"""

from triton import __version__ as TRITON_VERSION

__all__ = ["TRITON_VERSION"]
