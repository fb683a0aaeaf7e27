"""Position codes that are computed, not learned."""

import numpy as np
from jaxtyping import Float


def sine_positions(size: tuple[int, int], width: int, temperature: float = 10000.0) -> Float[np.ndarray, "h w width"]:
    """Returns sines and cosines of a map's rows (first half of the channels) and columns; `width` is a multiple of 4.

    Row i of h counts as 2 pi (i + 1) / h: sides of all lengths share one range. Sine and cosine alternate.
    Source: Carion et al. 2020 (DETR).
    """
    half = width // 2
    wavelengths = temperature ** (2 * (np.arange(half) // 2) / half)
    codes = []
    for side in size:
        phase = (np.arange(1, side + 1) / (side + 1e-6) * 2 * np.pi)[:, None] / wavelengths
        codes.append(np.where(np.arange(half) % 2, np.cos(phase), np.sin(phase)))
    rows, columns = codes
    shape = (*size, half)
    both = [np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)]
    return np.concatenate(both, axis=-1).astype(np.float32)
