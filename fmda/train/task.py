"""What a method hands over to be trained, and the settings that all trainers share."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jax.sharding import Mesh

from fmda.config import FREE, NonNegativeInt, PositiveFloat, PositiveInt
from fmda.data.loader import Batch, Batches
from fmda.data.streams import Stream
from fmda.mesh import FSDP_RULES, Rule
from fmda.train.optim import OptimConfig, make_optimizer, make_schedule
from fmda.train.step import Objective, Step, TrainState, create_state, make_step
from fmda.trees import Tree


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a training loop; a trainer's own configuration adds data, network and losses.

    Attributes:
        steps: optimizer steps of the whole run.
        minutes: of training in all, after compilation; the run ends with whichever of `steps` and `minutes` comes
            first, and the learning rate follows the larger share of the two. None: no limit.
        batch: rows of the source per step, over all devices and processes.
        seed: of the parameters, the order of the data, and every random choice.
        mesh: sizes of the axes data and fsdp; -1 takes the rest of the devices.
        workers: loader processes; 0 loads in threads.
        log_every: steps between lines of metrics.
        save_steps, save_minutes: a checkpoint is due after either.
        best: score, such as "val/miou", by which one more checkpoint is kept; None keeps none.
        best_mode: whether the largest or the smallest score is the best.
        tensorboard: write TensorBoard files beside the metrics.
    """

    steps: PositiveInt
    minutes: PositiveFloat | None = None
    batch: PositiveInt
    seed: NonNegativeInt = 0
    mesh: tuple[int, int] = (-1, 1)
    workers: NonNegativeInt = 0
    log_every: PositiveInt = field(default=25, metadata=FREE)
    save_steps: PositiveInt = field(default=250, metadata=FREE)
    save_minutes: PositiveFloat = field(default=5.0, metadata=FREE)
    best: str | None = field(default=None, metadata=FREE)
    best_mode: Literal["max", "min"] = field(default="max", metadata=FREE)
    tensorboard: bool = field(default=False, metadata=FREE)

    def of_loop(self) -> "TrainerConfig":
        """Returns the settings of the loop alone, for a run folder that records the others, with references as text."""
        return TrainerConfig(**{one.name: getattr(self, one.name) for one in fields(TrainerConfig)})


class Evaluator(Protocol):
    """Scores of the state during training, logged as `<name>/<score>`."""

    @property
    def name(self) -> str:
        """Name of the evaluation."""
        ...

    @property
    def every(self) -> int:
        """Steps between evaluations; 0 evaluates at the end only, where all evaluators run."""
        ...

    def run(self, state: Any) -> Iterable[tuple[str, float]]:
        """Returns (score, value) pairs; called by all processes."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """What is written at chosen steps, before a checkpoint of that step or a later one is saved.

    Attributes:
        steps: at which `run` is called.
        run: receives the state, in all processes; a resumed run may call it again with the same state.
    """

    steps: Collection[int]
    run: Callable[[TrainState], None]


class Loader(Protocol):
    """Endless batches with a position, as `Batches` are."""

    def __next__(self) -> Batch:
        """Returns the next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch, as JSON values."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after a position."""
        ...


@runtime_checkable
class Guided(Loader, Protocol):
    """Batches that depend on the state, such as those with pseudo-labels that are made on the host.

    Attributes:
        waited: seconds for which the devices waited for them.
    """

    waited: float

    def follow(self, step: int, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Sees the state and the metrics after `step` updates, which may still run; called before each batch.

        The state's arrays are donated to the next step: what is kept must be copied.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A training run without its settings.

    Attributes:
        name: in the progress line.
        objective: see `fmda.train.step.Objective`.
        init: random key -> parameters; jitted, so that they are born sharded.
        optim: the optimizer.
        streams: training data: one stream, whose batches the objective gets, or several by name, joined.
        frozen: tree of arrays that the objective reads; replicated unless already placed on the mesh.
        aux: auxiliary state before the first step.
        teacher_decay, teacher_when: see `make_step`; a teacher is kept where a decay is given.
        accumulate: parts that a batch is taken in.
        weights: parameters to start from, all or some; they fill the teacher too.
        evaluators: run during and after training.
        snapshots: written during training.
        rules: sharding of the state, by the paths `params/...`, `opt/...`, `teacher/...`, `aux/...`; see `place`.
        facts: what a run folder is recognised by besides the settings: weight fingerprints, digests of data.
        guide: (batches of the streams, mesh, folder of the run) -> batches that depend on the state; None takes the
            batches of the streams as they are.
        precision: "bfloat16" or "float32", the number format whose peak MFU refers to.
    """

    name: str
    objective: Objective
    init: Callable[[Any], Tree]
    optim: OptimConfig
    streams: Stream | Mapping[str, Stream]
    frozen: Any = field(default_factory=dict)
    aux: Tree = field(default_factory=dict)
    teacher_decay: float | Callable[[Any], Any] | None = None
    teacher_when: Literal["before", "after"] = "after"
    accumulate: int = 1
    weights: Tree | None = None
    evaluators: Sequence[Evaluator] = ()
    snapshots: Snapshot | None = None
    rules: Sequence[Rule] = FSDP_RULES
    facts: Mapping[str, Any] = field(default_factory=dict)
    guide: Callable[[Batches, Mesh, Path], AbstractContextManager[Guided]] | None = None
    precision: Literal["bfloat16", "float32"] = "bfloat16"

    def initial_state(self, steps: int) -> Callable[[Any], TrainState]:
        """Returns random key -> the state before a run of `steps` steps; for `jax.jit` and `jax.eval_shape`."""
        tx, averaged = make_optimizer(self.optim, steps), self.teacher_decay is not None

        def state(key: Any) -> TrainState:
            return create_state(self.init(key), tx, teacher=averaged, aux=self.aux)

        return state

    def step(self, steps: int) -> Step:
        """Returns the pure step of a run of `steps` steps; see `make_step`."""
        return make_step(
            self.objective, make_optimizer(self.optim, steps), teacher_decay=self.teacher_decay,
            teacher_when=self.teacher_when, accumulate=self.accumulate, schedule=make_schedule(self.optim, steps),
        )  # fmt: skip
