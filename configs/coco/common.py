"""What the recipes share: COCO 2017, SGD, and Detectron2's schedules of 16 images per step."""

from detectron2 import model_zoo
from omegaconf import DictConfig

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train
train.update(
    device="auto",
    channels_last=False,
    # Images on each GPU at a time, from which the schedule follows: optimizer.lr, max_iter and the
    # periods are then those of a reference with total_batch_size images per step. 0 takes all as
    # they stand.
    ims_per_gpu=2,
    accumulate_steps=1,  # batches whose gradients make one step
    eval_period=0,  # at the end
)
train.checkpointer.max_to_keep = None  # all


def schedule(times: int) -> tuple[int, DictConfig]:
    """Detectron2's 1x, 2x, 3x, 6x or 9x, 1x being 90000 iterations.

    Returns:
        Iterations, and the learning-rate multiplier, which is in fractions of them.
    """
    multipliers = model_zoo.get_config("common/coco_schedule.py")
    return times * 90_000, multipliers[f"lr_multiplier_{times}x"]


train.max_iter, lr_multiplier = schedule(1)
