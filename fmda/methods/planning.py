"""Lines of a plan from traces: parameters, FLOPs, bytes of each device, and what batch fits."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh

from fmda import trees
from fmda.data.streams import Stream
from fmda.errors import UserError
from fmda.mesh import FSDP_RULES, REPLICATED_RULES, Rule, place
from fmda.perf.memory import device_memory
from fmda.perf.trace import Gradient
from fmda.runs.plan import Plan
from fmda.train.step import Objective, TrainState, scalar_loss
from fmda.train.task import Task
from fmda.trees import Tree

GIB = 2**30
LIMIT = " (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 lets JAX take more of a GPU)"
MACHINES = (("80 GB card", 1, 80e9), ("v5e-8 slice", 8, 16.0 * GIB))
"""What a plan is made for: name, devices, bytes of each."""

STATE = {
    "params": "parameters",
    "opt": "optimizer state",
    "teacher": "average of parameters",
    "aux": "auxiliary state",
}
"""Names of the parts of a training state in a plan."""


@dataclass(frozen=True)
class Training:
    """The pieces of a training from which its cost is traced; nothing of it runs.

    Attributes:
        objective: what is differentiated.
        init: random key -> state.
        frozen: shapes of what the objective reads without training it.
        batch: examples -> shapes of a batch.
        rules: how the state is sharded.
        frozen_rules: how `frozen` is sharded.
        accumulate: parts that a batch is taken in.
        example: name of one row of a batch.
    """

    objective: Objective
    init: Callable[[Any], TrainState]
    frozen: Any
    batch: Callable[[int], Any]
    rules: Sequence[Rule] = FSDP_RULES
    frozen_rules: Sequence[Rule] = REPLICATED_RULES
    accumulate: int = 1
    example: str = "example"

    @staticmethod
    def of(task: Task, steps: int, batch: Callable[[int], Any] | None = None, **options: Any) -> "Training":
        """Returns the pieces of a task whose frozen arrays may be shapes; `options` are further attributes.

        Without `batch`, its shapes are those of one example of each stream.
        """
        return Training(
            task.objective, task.initial_state(steps), task.frozen, batch or _batches(task), task.rules,
            accumulate=task.accumulate, **options,
        )  # fmt: skip

    @functools.cached_property
    def state(self) -> TrainState:
        """The shapes of the state."""
        return jax.eval_shape(self.init, _key())

    def flops(self, batch: int) -> float:
        """Returns the model's own FLOPs of a step on so many examples, nothing that is computed twice."""
        return self._gradient.flops(batch)

    def residuals(self, batch: int) -> int:
        """Returns the bytes of activations that are kept for the gradient."""
        return self._gradient.residuals(batch)

    def memory(self, batch: int, shards: int = 1) -> dict[str, int]:
        """Returns the bytes of each device by name, with `batch` examples on it at once and fsdp over `shards`."""
        state, frozen = placed(self.state, self.rules, shards), placed(self.frozen, self.frozen_rules, shards)
        rows = {name: stored_bytes(getattr(self.state, part), getattr(state, part)) for part, name in STATE.items()}
        rows["frozen parameters"] = stored_bytes(self.frozen, frozen)
        where = jax.tree.leaves((state.params, state, frozen))
        gradients = [
            _bytes(leaf, one)
            for leaf, one in zip(jax.tree.leaves(self.state.params), jax.tree.leaves(state.params), strict=True)
        ]
        first = len(self._gradient.jaxpr.outvars) - len(gradients)
        activations = self._gradient.peak(
            batch,
            gathered=[position for position, one in enumerate(where) if not one.is_fully_replicated],
            stored=dict(enumerate(gradients, first)),
        )
        # when activations are gone, XLA holds the gradients and their clipped copy
        rows["gradients and activations"] = max(activations, 2 * sum(gradients))
        if self.accumulate > 1:
            rows["gradients, summed over parts"] = sum(gradients)
        return {name: value for name, value in rows.items() if value}

    def need(self, batch: int, shards: int = 1) -> int:
        """Returns the bytes of each device in all."""
        return sum(self.memory(batch, shards).values())

    @functools.cached_property
    def _gradient(self) -> Gradient:
        return Gradient(scalar_loss(self.objective), self._arguments)

    def _arguments(self, batch: int) -> tuple[Any, ...]:
        return self.state.params, self.state, self.frozen, self.batch(batch), _key()


def _batches(task: Task) -> Callable[[int], Any]:
    """Returns rows of each stream -> shapes of a batch; reads the first example of each."""
    if isinstance(task.streams, Stream):
        first = task.streams.rows(range(1), 0)
    else:
        first = {name: stream.rows(range(1), 0) for name, stream in task.streams.items()}
    return lambda rows: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), first)


def training_plan(
    training: Training,
    *,
    stages: Iterable[tuple[str, str]],
    batch: int,
    steps: int,
    parameters: Mapping[str, int],
    shardings: tuple[tuple[str, str], ...] = (),
    notes: Sequence[str] = (),
) -> Plan:
    """Returns the plan of a training with `batch` examples a step over all devices.

    Memory is given by name for what one device has of the configured batch, and as a sum for 1, 4 and 8 devices, over
    which parameters are sharded too.
    """
    rows = batch // training.accumulate
    flops = training.flops(rows) / rows
    totals, work = [], []
    for devices in (1, 4, 8):
        share = -(-rows // devices)
        name = f"{devices} device{'s' if devices > 1 else ''}, fsdp={devices}, {share} on each at once"
        if batch % devices:
            name += f" (batch={share * devices * training.accumulate})"
        totals.append((name, training.need(share, devices)))
        work.append((name, flops * share * training.accumulate * steps / 1e15))
    kept = training.residuals(1) / 2**20
    return Plan(
        stages=tuple(stages),
        parameters=(*parameters.items(), ("trained", trees.count(training.state.params))),
        flops=((f"one {training.example} in training", flops),),
        memory=(*training.memory(rows).items(), *totals),
        shardings=shardings or (("state", sharding(training.state.params, training.rules, 8)),),
        notes=(
            f"activations kept for the gradient: {kept:,.1f} MiB with one {training.example}",
            *(f"the whole run, {name}: {share:,.4g} PFLOP per device" for name, share in work),
            *fit_lines(training.need, training.example),
            *notes,
        ),
    )


def check_need(
    need: Callable[[int], int],
    batch: int,
    share: int,
    devices: int,
    gib: float | None,
    row: str,
    name: str,
    remedies: str,
) -> None:
    """Raises UserError where a device cannot hold its part of a batch, with the largest batch that fits.

    Args:
        need: rows on a device at once -> bytes of it.
        batch: rows of a whole batch.
        share: rows of a batch that make one on each device at once.
        devices: their number.
        gib: memory of a device; None reads it from the device, and checks nothing where the device has no limit.
        row: name of a row.
        name: the option that gives `batch`.
        remedies: other options that help.
    """
    limit = device_memory().get("limit") if gib is None else gib * GIB
    if limit is None:
        return
    bytes_needed = need(-(-batch // share))
    if bytes_needed <= limit:
        return
    most = _most(need, limit) * share
    raise UserError(
        f"{name}: {batch} needs about {bytes_needed / GIB:.2f} GiB on each of {devices} device"
        f"{'s' if devices > 1 else ''}, {(bytes_needed - limit) / GIB:.2f} GiB more than the {limit / GIB:.2f} GiB "
        f"there{LIMIT if gib is None else ''}; {f'{name}={most} fits' if most else f'not even one {row} fits'}; "
        f"{remedies} help too"
    )


def fit_lines(need: Callable[..., int], row: str) -> list[str]:
    """Returns a line for each of `MACHINES` that says how many rows each device holds at once.

    `need` is (rows on a device at once, shards=number of devices) -> bytes of it.
    """
    lines = []
    for machine, devices, limit in MACHINES:
        rows_need = functools.partial(need, shards=devices)
        one, most = rows_need(1), _most(rows_need, limit)
        if most:
            text = f"{one / GIB:.2f} of {limit / GIB:.2f} GiB with one {row} a device; {most} fit at once"
        else:
            text = f"does not fit, {(one - limit) / GIB:.2f} GiB short on each of {devices} with one {row}"
        lines.append(f"{machine}: {text}")
    return lines


def sharding(shapes: Tree, rules: Sequence[Rule], shards: int) -> str:
    """Returns how the arrays of a tree lie on `shards` devices of the axis fsdp."""
    if shards == 1:
        return "whole on every device, as fsdp is 1"
    where = jax.tree.leaves(placed(shapes, rules, shards))
    sizes = [(leaf.size, one.is_fully_replicated) for leaf, one in zip(jax.tree.leaves(shapes), where, strict=True)]
    whole = sum(size for size, replicated in sizes if replicated)
    number = sum(not replicated for _, replicated in sizes)
    total = sum(size for size, _ in sizes)
    return f"{number:,} of {len(sizes):,} arrays cut in {shards}, {whole:,} of {total:,} parameters whole"


def placed(shapes: Any, rules: Sequence[Rule], shards: int) -> Any:
    """Returns the shardings of a tree with the axis fsdp over so many devices."""
    return place(shapes, rules, AbstractMesh((1, shards), ("data", "fsdp"))) if jax.tree.leaves(shapes) else shapes


def stored_bytes(shapes: Any, shardings: Any) -> int:
    """Returns the bytes of a tree on each device."""
    return sum(map(_bytes, jax.tree.leaves(shapes), jax.tree.leaves(shardings)))


def _bytes(leaf: Any, where: Any) -> int:
    return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _most(need: Callable[[int], int], limit: float) -> int:
    """Returns how many rows a device of so many bytes holds at once.

    The need is convex in the rows: the largest of several quantities that each grow linearly. So a line through two
    neighbours ends at or beyond the answer, and a chord ends before it.
    """
    need = functools.cache(need)
    if need(1) > limit:
        return 0
    low, high = 1, 1 + int((limit - need(1)) // max(1, need(2) - need(1)))
    while need(high) > limit:
        low += max(1, int((limit - need(low)) * (high - low) // (need(high) - need(low))))
        high = low + int((limit - need(low)) // max(1, need(low + 1) - need(low)))
    return high


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
