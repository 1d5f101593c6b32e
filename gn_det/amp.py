"""Mixed precision."""

from __future__ import annotations

import torch

__all__ = ["amp_dtype"]


def amp_dtype(enabled: bool) -> torch.dtype | None:
    """The dtype of mixed precision on this GPU: bfloat16 where it has it, else float16."""
    if not enabled:
        return None
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16
