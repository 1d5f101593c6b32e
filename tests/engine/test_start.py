"""What a new run may start from."""

from __future__ import annotations

import pytest

from gn_det import InputError
from gn_det.engine.run_data import check_start


def test_frozen_layers_need_weights() -> None:
    with pytest.raises(InputError, match=r"FREEZE_AT 2 freezes .*\(for a LazyConfig, freeze_at"):
        check_start("", 2)
    check_start("weights.pth", 2)
    check_start("", 0)
