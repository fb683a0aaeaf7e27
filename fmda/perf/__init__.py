"""FLOP counts, device peaks, timing and memory: what a run costs, counted or measured, never guessed."""

from fmda.perf.flops import compiled_flops, count_flops, text_flops, training_flops, vit_flops
from fmda.perf.memory import compiled_memory, device_memory, run_measured, training_bytes
from fmda.perf.parameters import parameter_rows, parameter_table
from fmda.perf.peaks import device_peak, measured_peak, peak_flops
from fmda.perf.record import record, write_record
from fmda.perf.timing import Timing, alternate, measure

__all__ = [
    "Timing",
    "alternate",
    "compiled_flops",
    "compiled_memory",
    "count_flops",
    "device_memory",
    "device_peak",
    "measure",
    "measured_peak",
    "parameter_rows",
    "parameter_table",
    "peak_flops",
    "record",
    "run_measured",
    "text_flops",
    "training_bytes",
    "training_flops",
    "vit_flops",
    "write_record",
]
