"""Samplers against hand-written steps, recorded Flax schedulers, and pictures whose answer is known."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmda.diffusion.samplers import SAMPLERS, make_table, sample, timesteps
from fmda.diffusion.schedule import PREDICTIONS, SPACINGS, ScheduleConfig, alphas_cumprod
from fmda.errors import UserError

FIXTURES = Path(__file__).parent.parent / "fixtures"
START = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)


def draw(network, config, sampler, steps, start=START):
    """Returns the latents, sampled under jit."""
    return np.asarray(jax.jit(lambda x: sample(network, x, config, sampler=sampler, steps=steps))(start))


def wave(x, t):
    """The prediction that the recorded trajectories were made with."""
    return 0.5 * jnp.sin(3 * x) + t / 1000


def test_plms_calls_the_network_51_times_at_50_steps():
    called = []

    def network(x, t):
        jax.debug.callback(lambda t: called.append(float(t)), t, ordered=True)
        return 0.1 * x

    draw(network, ScheduleConfig(), "plms", 50)
    jax.effects_barrier()
    assert len(called) == 51
    assert called[:5] == [981, 961, 961, 941, 921] and called[-2:] == [21, 1]
    assert called == timesteps(ScheduleConfig(), "plms", 50).tolist()


@pytest.mark.parametrize(
    ("sampler", "spacing", "expected"),
    [
        ("ddim", None, [751, 501, 251, 1]),
        ("ddim", "linspace", [999, 666, 333, 0]),
        ("ddim", "trailing", [999, 749, 499, 249]),
        ("plms", None, [751, 501, 501, 251, 1]),
        ("plms", "trailing", [999, 749, 749, 499, 249]),
        ("euler", None, [999, 666, 333, 0]),
        ("euler", "leading", [751, 501, 251, 1]),
        ("dpm++2m", None, [999, 749, 500, 250]),
        ("dpm++2m", "leading", [801, 601, 401, 201]),
    ],
)
def test_timesteps_of_four_steps(sampler, spacing, expected):
    found = timesteps(ScheduleConfig(spacing=spacing), sampler, 4)
    assert found.tolist() == expected
    assert found.dtype == (np.float32 if sampler == "euler" else np.int32)


def test_euler_stands_between_whole_timesteps():
    np.testing.assert_allclose(timesteps(ScheduleConfig(), "euler", 3)[1], 499.5)


@pytest.mark.parametrize("steps", [48, 61, 999])
def test_trailing_grid_has_as_many_points_as_steps(steps):
    found = timesteps(ScheduleConfig(spacing="trailing"), "ddim", steps)
    assert len(found) == steps and found[0] == 999 and found[-1] >= 0


def transfer(x, e, a, b):
    """From noise level a to b along the noise e, without dividing by what may be small."""
    return np.sqrt(b / a) * x - (b - a) * e / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))


def test_plms_equals_the_written_out_method():
    left = alphas_cumprod(ScheduleConfig()).astype(np.float64)
    network = lambda x, t: np.cos(2 * x) + t / 1000  # noqa: E731
    # 8 steps of 125: 876, 751, 751, 626, ...
    x, e = START.astype(np.float64), []
    e.append(network(x, 876))
    first = transfer(x, e[0], left[876], left[751])
    x = transfer(x, (e[0] + network(first, 751)) / 2, left[876], left[751])
    for t in (751, 626, 501, 376, 251, 126, 1):
        e.insert(0, network(x, t))
        if len(e) == 2:
            mixed = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            mixed = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            mixed = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = transfer(x, mixed, left[t], left[max(t - 125, 0)])
    found = draw(lambda x, t: jnp.cos(2 * x) + t / 1000, ScheduleConfig(), "plms", 8)
    np.testing.assert_allclose(found, x, atol=1e-5 * np.abs(x).max())


def test_ddim_step_by_hand():
    left = alphas_cumprod(ScheduleConfig()).astype(np.float64)
    found = draw(lambda x, t: jnp.ones_like(x) / 2, ScheduleConfig(), "ddim", 2)
    x = transfer(START.astype(np.float64), 0.5, left[501], left[1])
    np.testing.assert_allclose(found, transfer(x, 0.5, left[1], left[0]), rtol=1e-5, atol=1e-6)


def test_ddim_ends_without_noise_when_told():
    left = alphas_cumprod(ScheduleConfig())[1]
    found = draw(lambda x, t: jnp.zeros_like(x), ScheduleConfig(set_alpha_to_one=True), "ddim", 1)
    np.testing.assert_allclose(found, START / np.sqrt(left), rtol=1e-6)


def test_euler_step_by_hand():
    left = alphas_cumprod(ScheduleConfig()).astype(np.float64)
    sigma = np.sqrt(1 / left[[999, 0]] - 1)
    # from a start of size sigma the noise 0.3 is taken away in two steps, whatever lies between
    found = draw(lambda x, t: jnp.full_like(x, 0.3), ScheduleConfig(), "euler", 2)
    np.testing.assert_allclose(found, sigma[0] * START - 0.3 * sigma[0], rtol=1e-5, atol=1e-5)
    kept = draw(lambda x, t: jnp.full_like(x, 0.3), ScheduleConfig(final_sigma="sigma_min"), "euler", 2)
    np.testing.assert_allclose(kept, sigma[0] * START - 0.3 * (sigma[0] - sigma[1]), rtol=1e-5, atol=1e-5)


def test_dpm_second_step_by_hand():
    config = ScheduleConfig(prediction="sample")
    left = alphas_cumprod(config).astype(np.float64)[[999, 666, 333]]
    picture, rest = np.sqrt(left), np.sqrt(1 - left)
    size = np.diff(np.log(picture / rest))
    m = [0.2 + 999 / 5000, 0.2 + 666 / 5000, 0.2 + 333 / 5000]
    x = rest[1] / rest[0] * START - picture[1] * np.expm1(-size[0]) * m[0]
    ahead = m[1] + (m[1] - m[0]) * size[1] / size[0] / 2
    x = rest[2] / rest[1] * x - picture[2] * np.expm1(-size[1]) * ahead
    # the last step ends without noise, and so at its own clean estimate
    table = make_table(config, "dpm++2m", 3)
    mine = START.astype(np.float64)
    for i in range(2):
        mine = table.noisy[i] * mine + table.weights[i] @ [m[i], m[i - 1]]
    np.testing.assert_allclose(mine, x, rtol=1e-12)
    np.testing.assert_allclose(draw(lambda x, t: 0.2 + t / 5000 + 0 * x, config, "dpm++2m", 3), m[2], rtol=1e-5)


@pytest.mark.parametrize(("steps", "ahead"), [(14, False), (15, True)])
def test_dpm_ends_at_first_order_below_15_steps(steps, ahead):
    table = make_table(ScheduleConfig(final_sigma="sigma_min"), "dpm++2m", steps)
    assert (table.weights[-1, 1] != 0) == ahead
    assert table.weights[0, 1] == 0 and np.all(table.weights[1:-1, 1] != 0)


@pytest.mark.parametrize(
    ("name", "sampler", "options"),
    [
        ("ddim", "ddim", {"clip": 1.0}),
        ("pndm", "plms", {}),
        ("dpmsolver++", "dpm++2m", {"final_sigma": "sigma_min"}),
    ],
)
@pytest.mark.parametrize(("model", "prediction"), [("sd1", "epsilon"), ("sd2", "v_prediction")])
def test_trajectory_equals_flax_schedulers(model, prediction, name, sampler, options):
    """What was recorded used the classes' defaults: DDIM clipped, DPM-Solver++ ended at the noise of timestep 0."""
    io = np.load(FIXTURES / f"flax-hf-{model}" / "schedulers.npz")
    config = ScheduleConfig(prediction=prediction, **options)
    assert timesteps(config, sampler, 10).tolist() == io[f"{name}_timesteps"].tolist()
    expected = io[f"{name}_out"]
    found = draw(wave, config, sampler, 10, io["latents"])
    # largest differences: 1e-6 to 6e-6 of the largest value
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def knows(picture, config):
    """Returns a network that tells the picture exactly from any noisy one, in the configured kind of prediction."""
    left = jnp.asarray(alphas_cumprod(config))

    def network(x, t):
        a = jnp.interp(t, jnp.arange(config.train_steps, dtype=jnp.float32), left)
        noise = (x - jnp.sqrt(a) * picture) / jnp.sqrt(1 - a)
        if config.prediction == "epsilon":
            return noise
        return picture if config.prediction == "sample" else jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * picture

    return network


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_knows_the_picture_gets_it(sampler, prediction):
    picture = jnp.asarray(np.random.default_rng(1).normal(size=START.shape).astype(np.float32))
    config = ScheduleConfig(prediction=prediction, set_alpha_to_one=True, spacing="leading")
    # plms averages predictions of several timesteps, and the velocity of one picture turns with time
    atol = 0.05 if (sampler, prediction) == ("plms", "v_prediction") else 2e-4
    np.testing.assert_allclose(draw(knows(picture, config), config, sampler, 12), picture, atol=atol)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_is_traced_once_in_one_scan(sampler):
    traced = []

    def network(x, t):
        traced.append((x.shape, t.shape, t.dtype))
        return 0.1 * x

    jaxpr = jax.make_jaxpr(lambda x: sample(network, x, ScheduleConfig(), sampler=sampler, steps=25))(START)
    assert traced == [(START.shape, (), jnp.float32)]
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [26 if sampler == "plms" else 25]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_picture_of_a_batch_is_its_own(sampler):
    together = draw(wave, ScheduleConfig(), sampler, 5)
    alone = draw(wave, ScheduleConfig(), sampler, 5, START[1:])
    np.testing.assert_allclose(together[1:], alone, rtol=1e-6, atol=1e-6)


def test_state_is_float32_under_a_bfloat16_network():
    seen = []

    def network(x, t):
        seen.append(x.dtype)
        return wave(x, t).astype(jnp.bfloat16)

    out = draw(network, ScheduleConfig(), "plms", 3, START.astype(jnp.bfloat16))
    assert out.dtype == np.float32 and seen == [jnp.float32]


def test_clipping_bounds_the_clean_estimate():
    config = ScheduleConfig(set_alpha_to_one=True, clip=0.5)
    found = draw(lambda x, t: jnp.zeros_like(x), config, "ddim", 3)
    assert np.abs(found).max() == np.float32(0.5)


def test_samplers_agree_where_steps_are_many():
    """All four solve the same equation, so that with many steps they meet."""
    config = ScheduleConfig(set_alpha_to_one=True, spacing="leading")
    network = lambda x, t: 0.9 * jnp.tanh(x)  # noqa: E731
    first, *others = (draw(network, config, sampler, 400) for sampler in SAMPLERS)
    scale = np.abs(first).max()
    for other in others:
        np.testing.assert_allclose(other, first, atol=0.02 * scale)


@pytest.mark.parametrize(
    ("sampler", "steps", "options", "message"),
    [
        ("dmi", 10, {}, "sampler: 'dmi' does not exist; did you mean 'ddim'?"),
        ("dpm", 10, {}, "sampler: 'dpm' does not exist; did you mean 'dpm++2m'?"),
        ("ddim", 0, {}, "steps: 0 do not fit into 1000 timesteps; take from 1 to 1000"),
        ("euler", 1001, {}, "steps: 1001 do not fit into 1000 timesteps"),
        ("plms", 1000, {}, "steps: 1000 with 'leading' spacing do not fit into 1000 timesteps; take fewer"),
        ("dpm++2m", 1000, {}, "steps: 1000 with 'linspace' spacing"),
        ("ddim", 5, {"zero_terminal_snr": True, "spacing": "trailing"}, "ddim: 'epsilon' prediction is undefined"),
        ("plms", 5, {"zero_terminal_snr": True, "spacing": "linspace"}, "plms: 'epsilon' prediction is undefined"),
    ],
)
def test_impossible_requests(sampler, steps, options, message):
    with pytest.raises(UserError) as caught:
        sample(wave, jnp.asarray(START), ScheduleConfig(**options), sampler=sampler, steps=steps)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_velocity_works_from_pure_noise(sampler, spacing):
    config = ScheduleConfig(prediction="v_prediction", zero_terminal_snr=True, spacing=spacing)
    assert np.isfinite(draw(wave, config, sampler, 6)).all()
