"""Triton kernels: the only files that import triton, themselves imported at the first launch.

Read tile.py (what one program sees), then forward.py, then backward.py.
"""
