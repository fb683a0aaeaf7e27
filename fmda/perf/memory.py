"""Memory of a compiled program and of a device, as jax reports it."""

import jax


def compiled_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the bytes per device of a compiled program: arguments, outputs, temporaries, reused, code, and the total.

    `reused` are outputs that take the place of donated arguments; they are in the total once. Empty where the backend
    does not tell.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    parts = {
        "arguments": int(analysis.argument_size_in_bytes),
        "outputs": int(analysis.output_size_in_bytes),
        "temporaries": int(analysis.temp_size_in_bytes),
        "reused": int(analysis.alias_size_in_bytes),
        "code": int(analysis.generated_code_size_in_bytes),
    }
    total = sum(value for name, value in parts.items() if name != "reused") - parts["reused"]
    return {**parts, "total": total}


def device_memory(device: jax.Device | None = None) -> dict[str, int]:
    """Returns `in_use`, `peak` and `limit` in bytes of a device (default: the first); empty where it does not tell."""
    stats = (device or jax.local_devices()[0]).memory_stats() or {}
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {name: int(stats[key]) for name, key in names.items() if key in stats}
