"""Results that a config expects."""

from __future__ import annotations

import pytest
from detectron2.config import get_cfg

from gn_det import InputError
from gn_det.engine.evaluation import check_expected

RESULTS = {"bbox": {"AP": 31.5, "APs": float("nan")}, "segm": {"AP": 34.1}}


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ([], ""),
        ([["bbox", "AP", 31.0, 0.5], ["segm", "AP", 34, 1]], ""),
        ([["bbox", "AP", 30.0, 0.5]], r"bbox/AP is 31\.50, not 30 ± 0\.5"),
        ([["bbox", "APs", 30.0, 0.5]], "bbox/APs is nan"),
        ([["box", "AP", 1.0, 0.5]], "box/AP was not evaluated, but bbox/AP, bbox/APs, segm/AP"),
        ([["bbox", "ap", 1.0, 1], ["segm", "AP", 1, 1]], r"bbox/ap was not .*; segm/AP is 34\.10"),
    ],
)
def test_results_are_held_to_what_is_expected(expected: list, message: str) -> None:
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = expected
    if not message:
        check_expected(cfg, RESULTS)
        return
    with pytest.raises(InputError, match=message):
        check_expected(cfg, RESULTS)
