"""The device mesh, sharding rules of parameters, batch placement, several processes.

A mesh has two axes: parameters are copied along `data` and sharded along `fsdp`; the batch is split over both. The axes
are of the Auto kind: the compiler places everything between the inputs and the outputs of a step.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmda import trees
from fmda.errors import UserError, did_you_mean

BATCH = P(("data", "fsdp"))


@dataclass(frozen=True)
class LargestAxis:
    """Shards the largest dimension divisible by a mesh axis, the last one among equals.

    Leaves of fewer than `min_size` scalars, and leaves in which no dimension divides, are replicated.
    """

    axis: str = "fsdp"
    min_size: int = 4096

    def spec(self, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
        """Returns the partition spec of a leaf of this shape."""
        parts = mesh.shape[self.axis]
        fitting = [dim for dim, length in enumerate(shape) if length % parts == 0]
        if parts == 1 or math.prod(shape) < self.min_size or not fitting:
            return P()
        largest = max(fitting, key=lambda dim: (shape[dim], dim))
        return P(*[self.axis if dim == largest else None for dim in range(largest + 1)])


LARGEST_AXIS = LargestAxis()

Rule = tuple[str, P | LargestAxis]
REPLICATED_RULES: tuple[Rule, ...] = (("*", P()),)
FSDP_RULES: tuple[Rule, ...] = (("*", LARGEST_AXIS),)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh with axes `data` and `fsdp` (both Auto) over `devices`, by default all of every process.

    One size may be -1: the number of devices over the other size. A single process may use fewer devices than there
    are: the first ones. Raises UserError for more devices than there are, and in a run of several processes for any
    number but all.
    """
    every = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp}
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise UserError(f"mesh.{name}: {size} is no size; give a positive number, or -1 for the rest")
    if data == fsdp == -1:
        raise UserError("mesh: data and fsdp are both -1; set only one of them to -1")
    for name, other in (("data", "fsdp"), ("fsdp", "data")):
        if sizes[name] == -1:
            sizes[name], left = divmod(len(every), sizes[other])
            if left:
                raise UserError(
                    f"mesh.{other}: {sizes[other]} does not divide the {len(every)} devices; "
                    f"choose a divisor of {len(every)}"
                )
    data, fsdp = sizes.values()
    if devices is None and jax.process_count() == 1:
        every = every[: data * fsdp]
    if data * fsdp != len(every):
        raise UserError(
            f"mesh: data={data} times fsdp={fsdp} is {data * fsdp}, but there are {len(every)} devices; "
            "set one of them to -1"
        )
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=every)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that copies an array to every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first dimension over all devices."""
    return NamedSharding(mesh, BATCH)


def place(shapes: Any, rules: Sequence[Rule], mesh: Mesh | AbstractMesh) -> Any:
    """Returns the tree of NamedShardings that the rules give to a tree of arrays or `ShapeDtypeStruct`s.

    A rule is (glob, partition spec or `LargestAxis`). The glob matches the slash path of a leaf, or an ending of it
    that begins at a slash: a rule for `up/kernel` also places the optimizer's moments (`opt/0/mu/up/kernel`) and the
    teacher (`teacher/up/kernel`). The first rule that matches wins; a last rule "*" places the rest.

    Raises UserError for a rule that matches no leaf, a leaf without a rule, a spec with an unknown axis or longer than
    the leaf's shape, and a dimension that does not divide.
    """
    used: set[str] = set()

    def sharding(path: str, leaf: Any) -> NamedSharding:
        matching = [r for r in rules if trees.matches(path, r[0]) or trees.matches(path, f"*/{r[0]}")]
        if not matching:
            raise UserError(f"sharding: no rule matches '{path}'; end the rules with one for '*'")
        used.update(pattern for pattern, _ in matching)
        pattern, tactic = matching[0]
        if isinstance(tactic, LargestAxis):
            return NamedSharding(mesh, tactic.spec(leaf.shape, mesh))
        _check_spec(pattern, tactic, path, leaf.shape, mesh)
        return NamedSharding(mesh, tactic)

    result = map_with_paths(sharding, shapes)
    for pattern, _ in rules:
        if pattern not in used:
            raise UserError(f"sharding rule '{pattern}': matches no leaf; correct or remove it")
    return result


def map_with_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Returns the tree with `function(path, leaf)` in place of each leaf; paths as in `trees.leaf_paths`."""
    results = [function(path, leaf) for path, leaf in trees.leaf_paths(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), results)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Returns the host batch as arrays split over all devices.

    `batch` is a tree of arrays [B, ...] that holds this process's part; with several processes the result is the global
    batch, in process order. Scalars are replicated. Raises UserError when B does not divide.
    """
    split, whole = batch_sharding(mesh), replicated(mesh)
    local_devices = mesh.local_mesh.size

    def put(path: str, leaf: Any) -> jax.Array:
        if not isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
        if leaf.ndim == 0:
            return _put(leaf, whole)
        if leaf.shape[0] % local_devices:
            raise UserError(
                f"batch '{path}': {leaf.shape[0]} examples do not divide over {local_devices} devices; "
                f"choose a batch size that is a multiple of {mesh.size}"
            )
        return _put(leaf, split)

    return map_with_paths(put, batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns the tree with a whole copy of every leaf, also random keys, on each device, unless it is on the mesh.

    The values must be equal in all processes.
    """

    def put(leaf: Any) -> jax.Array:
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and where.mesh == mesh:
            return leaf
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            bits = _put(jax.device_get(jax.random.key_data(leaf)), replicated(mesh))
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
        return _put(leaf, replicated(mesh))

    return jax.tree.map(put, tree)


def distribute(tree: Any, shardings: Any) -> Any:
    """Returns a tree of host arrays, equal in all processes, as arrays with these shardings."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Returns this process's array, or its part, as one over all processes."""
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    # jax counts this as an implicit transfer; here it is explicit.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def start_processes(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Connects the processes of a run, before a device is used; a no-op for one process, or when called again.

    Defaults are the environment's FMDA_COORDINATOR (host:port of process 0), FMDA_PROCESSES (number of processes) and
    FMDA_PROCESS (number of this one). On a cluster that jax detects (Slurm, Open MPI, Cloud TPU, Kubernetes), set
    FMDA_COORDINATOR=auto alone. Raises UserError for incomplete or impossible values.
    """
    coordinator = coordinator or os.environ.get("FMDA_COORDINATOR")
    processes = processes if processes is not None else _number("FMDA_PROCESSES")
    process = process if process is not None else _number("FMDA_PROCESS")
    if jax.distributed.is_initialized() or (coordinator is None and processes in (None, 1)):
        return
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    values = {"FMDA_COORDINATOR": coordinator, "FMDA_PROCESSES": processes, "FMDA_PROCESS": process}
    missing = [name for name, value in values.items() if value is None]
    if coordinator is None or processes is None or process is None:
        raise UserError(f"{missing[0]}: not set; several processes need all of {', '.join(values)}")
    if not 0 <= process < processes:
        raise UserError(f"FMDA_PROCESS: {process} is not below FMDA_PROCESSES={processes}; count from 0")
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"{variable}: '{text}' is no number; give a count such as 2")
    return int(text)


def _check_spec(pattern: str, spec: P, path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError unless a leaf of this shape can be sharded by the spec of the rule `pattern`."""
    if len(spec) > len(shape):
        raise UserError(f"sharding rule '{pattern}': '{path}' {shape} has fewer dimensions than {spec}")
    for dim, entry in enumerate(spec):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for axis in axes:
            if axis not in mesh.shape:
                raise UserError(f"sharding rule '{pattern}': no mesh axis '{axis}'{did_you_mean(axis, mesh.shape)}")
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dim] % parts:
            raise UserError(
                f"sharding rule '{pattern}': dimension {dim} of '{path}' {shape} does not divide into {parts}; "
                "change the mesh or the rule"
            )
