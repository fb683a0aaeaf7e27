"""What a function costs at any batch size: FLOPs and bytes from traces of the function itself, without running it.

A function is traced at two batch sizes. Every dimension of its program grows linearly with the batch, so both traces
together give the program of every other batch size.

Memory is that of the traced program run in its own order: an array takes memory from the operation that computes it to
the last one that reads it. Compilers fuse and reorder operations. On CPUs the estimate is within 16 % of the temporary
memory of compiled float32 UNets and autoencoders that keep all activations, and up to twice that of networks of
elementwise functions, whose derivatives XLA computes again. In bfloat16 XLA's CPU compiler needs up to 46 % more than
the program (copies in float32), and it undoes rematerialisation. Workspaces of convolution libraries and fragmentation
are not counted.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun

from fmda.perf.flops import inner_programs, on_host, program_flops

BATCHES = (61, 62)
"""Batch sizes of the two traces: primes and their neighbours are unlikely to be a network's own sizes."""

Shapes = Callable[[int], Sequence[Any]]
"""Batch size -> the arguments of a function, trees of arrays or `jax.ShapeDtypeStruct`s."""

_IN_PLACE = frozenset(("reshape", "squeeze", "expand_dims", "copy", "stop_gradient", "sharding_constraint"))
_FUSED = frozenset(("broadcast_in_dim", "iota"))


class Program:
    """A function traced at two batch sizes.

    Args:
        function: pure; outputs are trees of arrays.
        shapes: its arguments at a batch size.

    Raises ValueError where the structure of the program depends on the batch size.
    """

    def __init__(self, function: Callable[..., Any], shapes: Shapes) -> None:
        with on_host():
            few, more = (jax.make_jaxpr(function)(*shapes(batch)).jaxpr for batch in BATCHES)
        self.jaxpr = few
        self._shapes: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._lengths: dict[int, tuple[int, int]] = {}
        self._pair(few, more, set())

    def flops(self, batch: int) -> int:
        """Returns the FLOPs of matrix products and convolutions at a batch size."""
        return program_flops(
            self.jaxpr,
            lambda variable: self._shape(variable, batch),
            lambda equation: _linear(*self._lengths[id(equation)], batch),
        )

    def peak(self, batch: int, gathered: Collection[int] = (), stored: Mapping[int, int] | None = None) -> int:
        """Returns the most bytes that the program's arrays take at once, its arguments left out.

        Args:
            batch: examples on the device.
            gathered: positions of flat arguments that are sharded: a whole copy exists from first to last use.
            stored: bytes of flat outputs that are stored in parts, by position.
        """
        memo: dict[int, int] = {}
        outputs = {
            variable: size
            for position, size in (stored or {}).items()
            if not isinstance(variable := self.jaxpr.outvars[position], Literal)
        }
        copies = {self.jaxpr.invars[position] for position in gathered}
        return _peak(self.jaxpr, lambda variable: self._bytes(variable, batch), memo, copies, outputs)

    def _pair(self, few: Any, more: Any, done: set[int]) -> None:
        """Records the shapes of all variables in both traces."""
        if id(few) in done:
            return
        done.add(id(few))
        self._record((*few.constvars, *few.invars), (*more.constvars, *more.invars))
        for one, other in zip(few.eqns, more.eqns, strict=True):
            self._record(one.outvars, other.outvars)
            if one.primitive.name == "scan":
                self._lengths[id(one)] = one.params["length"], other.params["length"]
            for inner in zip(inner_programs(one.params), inner_programs(other.params), strict=True):
                self._pair(*inner, done)

    def _record(self, few: Sequence[Any], more: Sequence[Any]) -> None:
        for one, other in zip(few, more, strict=True):
            self._shapes[one] = _shape(one), _shape(other)

    def _shape(self, variable: Any, batch: int) -> tuple[int, ...]:
        if isinstance(variable, Literal):
            return _shape(variable)
        few, more = self._shapes[variable]
        return tuple(_linear(one, other, batch) for one, other in zip(few, more, strict=True))

    def _bytes(self, variable: Any, batch: int) -> int:
        kind = getattr(variable.aval, "dtype", None)
        return 0 if kind is None else math.prod(self._shape(variable, batch)) * kind.itemsize


class Gradient(Program):
    """Value and gradient of an objective, traced at two batch sizes.

    The outputs are the value, auxiliary values and the gradient.

    Args:
        objective: (params, *rest) -> (scalar, auxiliary values).
        shapes: its arguments at a batch size.

    Raises ValueError as `Program`.
    """

    def __init__(self, objective: Callable[..., Any], shapes: Shapes) -> None:
        kept = 0

        def gradient(params: Any, *rest: Any) -> Any:
            nonlocal kept
            value, pullback, aux = jax.vjp(lambda params: objective(params, *rest), params, has_aux=True)
            kept = len(jax.tree.leaves(pullback))
            return value, aux, pullback(np.ones((), value.dtype))[0], pullback

        super().__init__(gradient, shapes)
        self._objective, self._arguments = objective, shapes
        outputs = self.jaxpr.outvars
        first = len(outputs) - kept
        self._kept = {out for out in outputs[first:] if not isinstance(out, Literal)} - set(self.jaxpr.invars)
        # as outputs, what is kept would take memory to the end
        self.jaxpr = self.jaxpr.replace(outvars=outputs[:first])

    def flops(self, batch: int) -> int:
        """Returns `training_flops` at a batch size; a third trace where something is computed again."""
        if _repeats(self.jaxpr):
            return training_flops(self._objective, *self._arguments(batch))
        return super().flops(batch)

    def residuals(self, batch: int) -> int:
        """Returns the bytes that jax keeps from the forward pass for the gradient.

        Arguments that are kept are not counted, copies of them in another dtype are.
        """
        return sum(self._bytes(variable, batch) for variable in self._kept)


def training_flops(objective: Callable[..., Any], *arguments: Any) -> int:
    """Returns the model's own FLOPs of one gradient of an objective, the numerator of MFU.

    The objective is (params, *rest) -> (scalar, auxiliary values). What `jax.checkpoint` computes again to save memory
    is left out. The arguments may be `jax.ShapeDtypeStruct`s.
    """
    with on_host():
        return program_flops(jax.make_jaxpr(_work(objective))(*arguments).jaxpr)


def _work(objective: Callable[..., Any]) -> Callable[..., Any]:
    """Returns value and gradient of an objective whose `jax.checkpoint`s keep everything, so that nothing is redone."""

    def gradient(params: Any, *rest: Any) -> Any:
        program = jax.make_jaxpr(lambda params: objective(params, *rest)[0])(params)
        loss = jaxpr_as_fun(program.replace(jaxpr=_keeping(program.jaxpr)))
        return jax.value_and_grad(lambda params: loss(*jax.tree.leaves(params))[0])(params)

    return gradient


def _repeats(program: Any) -> bool:
    """Returns whether a gradient computes again what a `jax.checkpoint` has not kept."""
    return any(
        equation.params.get("differentiated") or any(map(_repeats, inner_programs(equation.params)))
        for equation in program.eqns
    )


def _keeping(program: Any) -> Any:
    """Returns the program with `everything_saveable` as the policy of every `jax.checkpoint`."""

    def rewritten(value: Any) -> Any:
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(rewritten(item) for item in value)
        if hasattr(value, "eqns") and hasattr(value, "jaxpr"):
            return value.replace(jaxpr=_keeping(value.jaxpr))
        return _keeping(value) if hasattr(value, "eqns") else value

    equations = []
    for equation in program.eqns:
        params = equation.params
        # derivatives of one's own choice stay as they are; their rules are functions, not programs
        if not equation.primitive.name.startswith("custom_"):
            params = {name: rewritten(value) for name, value in params.items()}
        if "policy" in params and "differentiated" in params:
            params = params | {"policy": jax.checkpoint_policies.everything_saveable}
        equations.append(equation.replace(params=params))
    return program.replace(eqns=equations)


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(getattr(variable.aval, "shape", ()))


def _linear(few: int, more: int, batch: int) -> int:
    return few + (more - few) * (batch - BATCHES[0])


def _peak(
    program: Any,
    size: Callable[[Any], int],
    memo: dict[int, int],
    copies: Collection[Any] = (),
    stored: Mapping[Any, int] | None = None,
) -> int:
    """Returns the most bytes of arrays that exist at once beside the program's arguments."""
    if id(program) in memo:
        return memo[id(program)]
    stored = stored or {}
    origin: dict[Any, Any] = {}
    last: dict[Any, int] = {}
    for number, equation in enumerate(program.eqns):
        if equation.primitive.name in _IN_PLACE and not isinstance(equation.invars[0], Literal):
            source = equation.invars[0]
            origin[equation.outvars[0]] = origin.get(source, source)
        for variable in equation.invars:
            if not isinstance(variable, Literal):
                last[origin.get(variable, variable)] = number
    for variable in program.outvars:
        if not isinstance(variable, Literal):
            last[origin.get(variable, variable)] = len(program.eqns)
    ends: dict[int, list[Any]] = {}
    for variable, number in last.items():
        ends.setdefault(number, []).append(variable)
    live: dict[Any, int] = {}
    total = largest = 0
    for number, equation in enumerate(program.eqns):
        fused = equation.primitive.name in _FUSED
        fresh = {v: 0 if fused else stored.get(v, size(v)) for v in equation.outvars if v in last and v not in origin}
        fresh |= {v: size(v) for v in equation.invars if not isinstance(v, Literal) and v in copies and v not in live}
        live |= fresh
        total += sum(fresh.values())
        inside = max((_inside(equation, inner, size, memo) for inner in inner_programs(equation.params)), default=0)
        largest = max(largest, total + inside)
        total -= sum(live.pop(variable, 0) for variable in ends.get(number, ()))
    memo[id(program)] = largest
    return largest


def _inside(equation: Any, inner: Any, size: Callable[[Any], int], memo: dict[int, int]) -> int:
    """Returns what a program inside an equation takes beside the equation's outputs."""
    peak = _peak(inner, size, memo)
    if equation.primitive.name in ("scan", "while"):
        return peak
    outputs = {variable for variable in inner.outvars if not isinstance(variable, Literal)} - set(inner.invars)
    return max(0, peak - sum(size(variable) for variable in outputs))
