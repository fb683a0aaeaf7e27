"""Three steps of a personalisation against PyTorch: diffusers' UNet, autoencoder and schedule, transformers' text
encoder, torch's AdamW and clipping, with the same crops, noise and times; as the paper's, and with class pictures, a
network that predicts velocities and a batch in two parts."""

import jax
import numpy as np
import pytest
import small_diffusion as small

from fmda import trees
from fmda.data.streams import Stream
from fmda.diffusion.draw import Graphs
from fmda.diffusion.load import load_stable_diffusion
from fmda.diffusion.schedule import ScheduleConfig
from fmda.methods.datum.dreambooth import noised
from fmda.methods.datum.personalise import personalisation
from fmda.methods.datum.settings import Config, Optimizer, PriorConfig
from fmda.weights.load import load_text_encoder, load_unet

pytestmark = pytest.mark.parity
RATE, STEPS, ROWS = 1e-3, 3, 2
EPS = 1e-6
"""Adam brings every gradient to the size of the rate, those that are rounding alone too, down to this one."""


PRIOR = 0.7
"""Weight of the loss on class pictures."""


@pytest.fixture(scope="module", params=[1, 2], ids=["noise", "velocity-prior-parts"])
def pictures(request):
    """Pictures of a row: the target's crop as in the paper; or with a class picture, a velocity, a batch in parts."""
    return request.param


def batches(pictures):
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (STEPS, ROWS, pictures, 4, 4, 3), np.uint8).repeat(4, 3).repeat(4, 4)
    seeds = rng.integers(2**32, size=(STEPS, ROWS, pictures), dtype=np.uint32)
    return [{"pixels": pixels, "seed": seed} for pixels, seed in zip(rough, seeds, strict=True)]


def drawn(seed, shape):
    """Deviates of a latent, noise and time, as an example with this seed draws them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    deviates, noise = (np.asarray(jax.random.normal(key, shape)) for key in keys[:2])
    return deviates, noise, np.asarray(jax.random.randint(keys[2], (), 0, 1000))


@pytest.fixture(scope="module")
def place(tmp_path_factory, pictures):
    place = tmp_path_factory.mktemp("parity")
    small.stable_diffusion(place / "model", ScheduleConfig(prediction=["epsilon", "v_prediction"][pictures - 1]))
    return place


@pytest.fixture(scope="module")
def ours(place, pictures):
    """(metrics, state) after each step."""
    config = Config(
        image="none", model=str(place / "model"), prompt="a sks road", crop=16, resize=None, batch=ROWS, steps=STEPS,
        optim=Optimizer(learning_rate=RATE, eps=EPS), accumulate=pictures,
        prior=None if pictures == 1 else PriorConfig(weight=PRIOR, prompt="a car"),
    )  # fmt: skip
    model = load_stable_diffusion(config.model)
    task = personalisation(config, model, Stream(batches(pictures), None, ROWS))
    with jax.default_matmul_precision("highest"):
        state = jax.jit(task.initial_state(STEPS))(jax.random.key(0))._replace(params=task.weights)
        lowered = jax.jit(task.step(STEPS)).lower(state, task.frozen, batches(pictures)[0], jax.random.key(0))
    step = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    found = []
    for rows in batches(pictures):
        state, metrics = step(state, task.frozen, rows, jax.random.key(0))
        found.append((metrics, state))
    return found


@pytest.fixture(scope="module")
def theirs(place, pictures):
    """(losses, gradient norms, first clipped gradients, last parameters) of PyTorch, by network, in our names."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = place / "model"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    schedule = DDPMScheduler.from_pretrained(folder / "scheduler")
    ids = torch.tensor(load_stable_diffusion(folder).tokenize(["a sks road", "a car"][:pictures]))
    params = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(params, lr=RATE, betas=(0.9, 0.999), eps=EPS, weight_decay=1e-2)

    def in_our_names(value):
        named = {}
        for name, module in (("unet", unet), ("text_encoder", text)):
            kept = {key: leaf.clone() for key, leaf in module.state_dict().items()}
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(value(parameter))
            module.save_pretrained(place / "out" / name)
            module.load_state_dict(kept)
            load = {"unet": load_unet, "text_encoder": load_text_encoder}[name]
            named[name] = load(place / "out" / name).params
        return named

    losses, norms, gradients = [], [], None
    for rows in batches(pictures):
        # all target crops, then all class pictures
        rows = {name: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]) for name, leaf in rows.items()}
        pixels = torch.tensor(rows["pixels"].transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        shape = posterior.mean.permute(0, 2, 3, 1).shape[1:]
        values = zip(*[drawn(int(seed), shape) for seed in rows["seed"]], strict=True)
        deviates, noise, times = (torch.tensor(np.stack(value)) for value in values)
        deviates, noise = deviates.permute(0, 3, 1, 2), noise.permute(0, 3, 1, 2)
        latents = (posterior.mean + posterior.std * deviates) * vae.config.scaling_factor
        states = text(ids.repeat_interleave(ROWS, 0).long())[0]
        found = unet(schedule.add_noise(latents, noise, times), times, states).sample
        wanted = noise if pictures == 1 else schedule.get_velocity(latents, noise, times)
        parts = zip(found.chunk(pictures), wanted.chunk(pictures), (1.0, PRIOR), strict=False)
        loss = sum(weight * torch.nn.functional.mse_loss(*pair) for *pair, weight in parts)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
        losses.append(loss.item())
        if gradients is None:
            gradients = in_our_names(lambda parameter: parameter.grad)
        optimizer.step()
    return losses, norms, gradients, in_our_names(lambda parameter: parameter.detach())


def distance(found, expected):
    """The norm of the difference relative to the norm."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    differences = sum(np.sum((np.asarray(ours) - theirs) ** 2) for ours, theirs in pairs)
    return float(np.sqrt(differences / sum(np.sum(theirs**2) for _, theirs in pairs)))


def test_losses_and_gradient_norms_are_torch_s(ours, theirs):
    for (metrics, _), loss, norm in zip(ours, *theirs[:2], strict=True):
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert theirs[1][0] > 1.0, "nothing was clipped"


def test_gradients_are_torch_s(ours, theirs):
    # the first moment after one step is a tenth of the clipped gradient
    moments = trees.flatten(jax.tree.map(lambda leaf: 10 * np.asarray(leaf), ours[0][1].opt[1].mu))
    expected = trees.flatten(theirs[2])
    assert moments.keys() == expected.keys() and len(moments) > 100
    # biases of keys shift all scores alike, which the softmax takes back: their gradient is rounding
    paths = [path for path in expected if not path.endswith("attention/key/bias")]
    assert max(distance(moments[path], expected[path]) for path in paths) < 1e-4


def test_three_updates_are_those_of_torch_s_adamw(place, ours, theirs):
    begin = load_stable_diffusion(place / "model").params
    changes = [
        {part: jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after[part], begin[part])}
        for after in (ours[-1][1].params, theirs[3])
        for part in ("unet", "text_encoder")
    ]
    unet, text, torch_unet, torch_text = changes
    assert distance(unet, torch_unet) < 1e-4
    assert distance(text, torch_text) < 1e-4


def test_a_velocity_is_diffusers(place):
    import torch
    from diffusers import DDPMScheduler

    schedule = ScheduleConfig(prediction="v_prediction")
    graphs = Graphs(None, None, None, schedule, 1.0)
    mean, seeds = np.random.default_rng(1).normal(size=(5, 2, 3, 4)).astype(np.float32), np.arange(5, dtype=np.uint32)
    found = noised(graphs, mean, np.full_like(mean, -30.0), seeds)
    theirs = DDPMScheduler.from_config({**schedule.to_json(), "_class_name": "DDPMScheduler"})
    noise = np.stack([drawn(int(seed), mean.shape[1:])[1] for seed in seeds])
    times = torch.tensor(np.asarray(found.times))
    latents, noise = torch.tensor(mean), torch.tensor(noise)
    np.testing.assert_allclose(found.target, theirs.get_velocity(latents, noise, times), atol=1e-5)
    np.testing.assert_allclose(found.latents, theirs.add_noise(latents, noise, times), atol=1e-5)
