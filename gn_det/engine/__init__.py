"""What the programs in tools/ and demo/ are made of: arguments, checks, launching, training.

Importing it silences warnings of third-party packages that a user of our programs can do nothing
about, before those packages are imported.
"""

import logging
import warnings

for _message in (
    "pkg_resources is deprecated",
    "`torch.jit.script`",
    "torch.meshgrid: in an upcoming release",
    "`torch.cuda.amp",
):
    warnings.filterwarnings("ignore", message=_message)
for _name in (
    "torch.utils.cpp_extension",
    "torch.fx._symbolic_trace",
    "torch.multiprocessing.spawn",
):
    logging.getLogger(_name).setLevel(logging.ERROR)


def _is_defect(record: logging.LogRecord) -> bool:
    from gn_det.engine.faults import fault_of

    return not (record.exc_info and fault_of(record.exc_info[1]))


# Its trace of what ends a training, which is raised and said as well.
logging.getLogger("detectron2.engine.train_loop").addFilter(_is_defect)
