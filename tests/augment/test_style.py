"""Style transfer by statistics and by frequencies."""

import jax
import jax.numpy as jnp
import numpy as np

from fmda.augment.style import adain, fourier_style


def features(seed: int, height: int = 6, width: int = 8) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(seed), (2, height, width, 4)) + seed


def test_channels_take_the_statistics_of_the_style():
    content, style = features(1), features(2, 5, 3)
    found = adain(content, style)
    np.testing.assert_allclose(found.mean((1, 2)), style.mean((1, 2)), atol=1e-4)
    np.testing.assert_allclose(found.std((1, 2)), style.std((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(adain(content, style, 0.25), 0.25 * found + 0.75 * content, rtol=1e-5)


def test_constant_channels_take_the_mean():
    found = adain(jnp.full((1, 2, 2, 1), 5.0), jnp.array([0.0, 2.0]).reshape(1, 1, 2, 1))
    np.testing.assert_allclose(found.ravel(), [1.0] * 4)
    gradient = jax.grad(lambda x: adain(x, features(0)).sum())(jnp.zeros((2, 3, 3, 4)))
    assert np.isfinite(np.asarray(gradient)).all()


def in_numpy(source: np.ndarray, target: np.ndarray, share: float) -> np.ndarray:
    """Renders the definition of one image with shifted spectra, in float64."""
    ours, theirs = (np.fft.fftshift(np.fft.fft2(x, axes=(0, 1)), axes=(0, 1)) for x in (source, target))
    (h, w), half = source.shape[:2], int(np.floor(share * min(source.shape[:2])))
    box = np.s_[h // 2 - half : h // 2 + half + 1, w // 2 - half : w // 2 + half + 1]
    amplitude = np.abs(ours)
    amplitude[box] = np.abs(theirs)[box]
    return np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * np.angle(ours)), axes=(0, 1)), axes=(0, 1)).real


def test_low_amplitudes_are_those_of_the_target():
    random = np.random.default_rng(0)
    source, target = (random.integers(0, 256, (2, 31, 24, 3), dtype=np.uint8) for _ in range(2))
    for share in (0.01, 0.05, 0.09):
        found = jax.jit(fourier_style, static_argnums=2)(source, target, share)
        expected = [in_numpy(*pair, share) for pair in zip(source, target, strict=True)]
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_lowest_frequency_is_the_mean():
    source, target = jnp.full((1, 8, 8, 1), 10.0), jnp.full((1, 8, 8, 1), 200.0)
    np.testing.assert_allclose(fourier_style(source, target), target, atol=1e-3)
