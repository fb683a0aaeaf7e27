"""When the fused kernel is taken, and that nothing else asks for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.nn import attention as module
from fmda.nn.attention import attention_in_parts, fusible, memory_efficient_attention

AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "head", "queries", "keys", "expected"),
    [
        # the self-attention of Stable Diffusion 1.x at 64x64, 32x32 and 16x16 places
        ("gpu", HOPPER, jnp.bfloat16, 40, 4096, 4096, True),
        ("cuda", HOPPER, jnp.bfloat16, 80, 1024, 1024, True),
        ("cuda", HOPPER, jnp.float16, 160, 256, 256, True),
        ("cuda", (10, 0), jnp.bfloat16, 160, 256, 256, True),
        ("gpu", AMPERE, jnp.bfloat16, 40, 4096, 4096, True),
        ("gpu", AMPERE, jnp.float16, 80, 1024, 1024, True),
        ("gpu", AMPERE, jnp.bfloat16, 128, 1024, 1024, True),
        ("gpu", AMPERE, jnp.bfloat16, 160, 256, 256, False),
        ("gpu", ADA, jnp.bfloat16, 160, 256, 256, False),
        ("gpu", (7, 5), jnp.float16, 40, 4096, 4096, False),
        ("gpu", HOPPER, jnp.bfloat16, 256, 4096, 4096, True),
        # the text, the 8x8 middle, the autoencoder, and sizes that tiles do not divide
        ("gpu", HOPPER, jnp.bfloat16, 40, 4096, 77, False),
        ("gpu", HOPPER, jnp.bfloat16, 160, 64, 64, False),
        ("gpu", HOPPER, jnp.bfloat16, 512, 4096, 4096, False),
        ("gpu", HOPPER, jnp.bfloat16, 44, 4096, 4096, False),
        ("gpu", HOPPER, jnp.bfloat16, 40, 4100, 4096, False),
        ("gpu", HOPPER, jnp.bfloat16, 40, 4096, 3127, False),
        ("gpu", HOPPER, jnp.float32, 40, 4096, 4096, False),
        ("gpu", None, jnp.bfloat16, 40, 4096, 4096, False),
        ("rocm", HOPPER, jnp.bfloat16, 40, 4096, 4096, False),
        ("cpu", None, jnp.bfloat16, 40, 4096, 4096, False),
        ("tpu", None, jnp.bfloat16, 40, 4096, 4096, False),
    ],
)
def test_where_the_fused_kernel_is_tried(platform, capability, dtype, head, queries, keys, expected):
    assert fusible(platform, capability, dtype, head, queries, keys) is expected


class Client:
    def __init__(self, version):
        self.platform_version = version


class Device:
    """What jax tells about a device."""

    def __init__(self, platform, version, capability=None):
        self.platform, self.client = platform, Client(version)
        if capability is not None:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("device", "platform", "capability"),
    [
        (Device("gpu", "PJRT C API\ncuda 12080", "9.0"), "cuda", (9, 0)),
        (Device("gpu", "PJRT C API\ncuda 13000", "12.1"), "cuda", (12, 1)),
        (Device("gpu", "PJRT C API\nrocm 60300", "gfx942"), "rocm", None),
        (Device("tpu", "libtpu"), "tpu", None),
    ],
)
def test_what_is_read_from_a_device(device, platform, capability):
    assert module._platform(device) == platform
    assert module._capability(device) == capability


def test_the_default_device_is_heeded():
    fourth = jax.devices()[3]
    with jax.default_device(fourth):
        assert module._default_device() == fourth
    with jax.default_device("cpu"):
        assert module._default_device() == jax.local_devices(backend="cpu")[0]
    assert module._default_device() == jax.local_devices()[0]


def raising(query, key, value):
    raise RuntimeError("cuDNN is\nnot here")


@pytest.fixture
def hopper(monkeypatch):
    """Lets the choice believe that this CPU is a Hopper GPU."""
    monkeypatch.setattr(module, "_platform", lambda device: "cuda")
    monkeypatch.setattr(module, "_capability", lambda device: HOPPER)


def draw(t=256, s=256, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(1, n, 1, 8)), dtype) for n in (t, s, s)]


def test_the_fused_kernel_is_taken_unless_the_environment_forbids_it(hopper, monkeypatch):
    taken = []
    monkeypatch.setattr(module, "fused_attention", lambda *given: taken.append(given) or given[0])
    memory_efficient_attention(*draw())
    monkeypatch.setenv("FMDA_FUSED_ATTENTION", "0")
    query, key, value = draw()
    np.testing.assert_array_equal(
        memory_efficient_attention(query, key, value).astype(jnp.float32),
        attention_in_parts(query, key, value).astype(jnp.float32),
    )
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("t", "s", "dtype"), [(256, 256, jnp.float32), (64, 64, jnp.bfloat16), (256, 77, jnp.bfloat16)]
)
def test_what_does_not_fit_never_asks_for_the_kernel(hopper, monkeypatch, t, s, dtype):
    monkeypatch.setattr(module, "fused_attention", raising)
    given = draw(t, s, dtype)
    np.testing.assert_array_equal(memory_efficient_attention(*given), attention_in_parts(*given))


def test_mixed_types_never_ask_for_the_kernel(hopper, monkeypatch):
    monkeypatch.setattr(module, "fused_attention", raising)
    taken = []
    monkeypatch.setattr(module, "attention_in_parts", lambda *given: taken.append(given) or given[0])
    query, key, value = draw()
    memory_efficient_attention(query, key.astype(jnp.float32), value)
    assert len(taken) == 1
