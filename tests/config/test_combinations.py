"""Values that do not fit each other are refused."""

from __future__ import annotations

import pytest
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import load_config
from gn_det.config.combinations import check_complete_config

CONFIG = ROOT / "configs/small/quickstart.yaml"
TOGETHER = [
    ("SOLVER.NESTEROV True SOLVER.MOMENTUM 0.0", "needs a SOLVER.MOMENTUM above 0"),
    ("SOLVER.IMS_PER_BATCH 2 SOLVER.REFERENCE_WORLD_SIZE 8", "2 is no multiple of .* 8"),
    ("SOLVER.RESCALE_INTERVAL True SOLVER.WARMUP_ITERS 9 SOLVER.MAX_ITER 9", "a warm-up that ends"),
    ("DATALOADER.SAMPLER_TRAIN RandomSubsetTrainingSampler", "reads .*RANDOM_SUBSET_RATIO, which"),
    ("DATASETS.PROPOSAL_FILES_TRAIN ('a.pkl',)", "read with MODEL.LOAD_PROPOSALS True alone"),
    ("SOLVER.BASE_LR_END 7.0 SOLVER.LR_SCHEDULER_NAME WarmupCosineLR", "is above SOLVER.BASE_LR"),
    ("SOLVER.LR_SCHEDULER_NAME WarmupStepWithFixedGammaLR SOLVER.MAX_ITER 2", "do not fit into"),
    ("MODEL.PROPOSAL_GENERATOR.NAME RRPN", "go together"),
    ("MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals", "needs MODEL.LOAD_PROPOSALS True"),
]


@pytest.mark.parametrize(("overrides", "message"), TOGETHER)
def test_values_that_do_not_fit_each_other_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_complete_config(load_config(CONFIG, overrides.split()))
