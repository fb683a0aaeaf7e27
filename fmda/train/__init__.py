"""Training: state of plain trees, optimizers, the step, the loop and its checkpoints."""

from fmda.train.checkpoints import best_step, read_params
from fmda.train.loop import run_task
from fmda.train.metrics import last_metrics
from fmda.train.optim import OptimConfig, make_optimizer, make_schedule
from fmda.train.step import Objective, Outcome, TrainState, create_state, make_step
from fmda.train.stop import Stopped
from fmda.train.task import Evaluator, Snapshot, Task, TrainerConfig

__all__ = [
    "Evaluator",
    "Objective",
    "OptimConfig",
    "Outcome",
    "Snapshot",
    "Stopped",
    "Task",
    "TrainState",
    "TrainerConfig",
    "best_step",
    "create_state",
    "last_metrics",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "read_params",
    "run_task",
]
