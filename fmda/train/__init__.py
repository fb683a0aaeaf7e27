"""Training: state of plain trees, optimizers, the step, the loop and its checkpoints."""

from fmda.train.batches import Batches, NumberedBatches
from fmda.train.checkpoints import read_params
from fmda.train.loop import fit
from fmda.train.optim import OptimConfig, make_optimizer, make_schedule
from fmda.train.signals import Stopped
from fmda.train.step import Objective, Outcome, TrainState, create_state, make_step

__all__ = [
    "Batches",
    "NumberedBatches",
    "Objective",
    "OptimConfig",
    "Outcome",
    "Stopped",
    "TrainState",
    "create_state",
    "fit",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "read_params",
]
