"""FLOPs and bytes counted on traced programs, peaks of devices from data sheets, memory as devices report it."""

from fmda.perf.flops import count_flops
from fmda.perf.memory import compiled_memory, device_memory
from fmda.perf.peaks import peak_flops
from fmda.perf.trace import Program, residual_bytes, training_flops

__all__ = [
    "Program",
    "compiled_memory",
    "count_flops",
    "device_memory",
    "peak_flops",
    "residual_bytes",
    "training_flops",
]
