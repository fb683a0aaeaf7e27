"""FLOPs and bytes counted on traced programs, peaks of devices from data sheets, memory as devices report it."""

from fmda.perf.flops import count_flops
from fmda.perf.memory import compiled_memory, device_memory
from fmda.perf.peaks import peak_flops
from fmda.perf.trace import Gradient, Program, training_flops

__all__ = [
    "Gradient",
    "Program",
    "compiled_memory",
    "count_flops",
    "device_memory",
    "peak_flops",
    "training_flops",
]
