"""From prompts and seeds to images: the same whatever the batch and the devices, by hand, bad sizes."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_diffusion

from fmda.diffusion.draw import SamplerConfig, make_draw, make_graphs, make_program
from fmda.diffusion.load import load_stable_diffusion
from fmda.diffusion.samplers import sample
from fmda.errors import UserError
from fmda.mesh import LargestAxis, make_mesh, place

PROMPTS = ["a car", "a road", "", "a road a car", "a car a car"]
SEEDS = [3, 2**32 - 1, 0, 7, 8]
SAMPLER = SamplerConfig(steps=3)
UNET = replace(small_diffusion.UNET, channels=(8,), attention=(True,), heads=(2,))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_diffusion.stable_diffusion(tmp_path_factory.mktemp("draw") / "model", unet_config=UNET)


@pytest.fixture(scope="module")
def eight(model):
    """Draws on all eight devices."""
    return make_draw(model, SAMPLER, make_mesh())


@pytest.fixture(scope="module")
def one(model):
    """Draws on one device."""
    return make_draw(model, SAMPLER, make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def images(eight):
    return eight(PROMPTS, SEEDS)


def levels(ours, theirs):
    """Returns the largest difference in levels of 0..255."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


def test_a_number_of_prompts_that_does_not_divide_is_filled_up(images):
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert all(image.std() > 5 for image in images)
    assert min(levels(a, b) for i, a in enumerate(images) for b in images[:i]) > 20


def test_the_seed_alone_decides_whatever_the_batch_and_the_place_in_it(eight, images):
    again = eight(PROMPTS[::-1] + PROMPTS[:3], SEEDS[::-1] + SEEDS[:3])
    assert levels(again[:5][::-1], images) <= 1 and levels(again[5:], images[:3]) <= 1
    assert levels(eight(PROMPTS[1:2], SEEDS[1:2]), images[1:2]) <= 1


def test_seed_and_prompt_both_matter(eight, images):
    others = eight(["a car", "a car", "a road"], [3, 4, 3])
    assert levels(others[:1], images[:1]) <= 1
    assert levels(others[1:2], images[:1]) > 20 and levels(others[2:], images[:1]) > 0


def test_eight_devices_equal_one(one, images):
    assert levels(np.concatenate([one(PROMPTS[k : k + 1], SEEDS[k : k + 1]) for k in range(5)]), images) <= 1


def test_parameters_in_parts_give_the_same_images(model, images, monkeypatch):
    mesh, rules = make_mesh(2, 4), (("*", LargestAxis(min_size=0)),)
    cut = ["fsdp" in sharding.spec for sharding in jax.tree.leaves(place(model.params, rules, mesh))]
    assert sum(cut) > 0.8 * len(cut)
    monkeypatch.setattr("fmda.diffusion.draw.FSDP_RULES", rules)
    assert levels(make_draw(model, SAMPLER, mesh)(PROMPTS, SEEDS), images) <= 1


@pytest.fixture(scope="module")
def plain(model):
    """Two oblong images without guidance."""
    return wide(model, 1.0)


def wide(model, guidance, negative=""):
    """Draws two oblong images on one device."""
    config = SamplerConfig("ddim", 2, guidance, negative, (16, 32))
    return make_draw(model, config, make_mesh(devices=jax.devices()[:1]))(PROMPTS[:2], SEEDS[:2])


def test_the_image_is_what_the_parts_give_by_hand(model, plain):
    noise = jnp.stack([jax.random.normal(jax.random.key(np.uint32(seed)), (8, 16, 4)) for seed in SEEDS[:2]])
    context = model.text_encoder(model.tokenize(PROMPTS[:2]))
    latents = sample(
        lambda x, time: model.unet(x, jnp.full(2, time), context), noise, model.schedule, sampler="ddim", steps=2
    )
    pictures = (np.asarray(model.vae.decode(latents / model.vae.config.scale)) + 1) * 127.5
    assert plain.shape == (2, 16, 32, 3)
    assert levels(plain, np.clip(np.round(pictures), 0, 255).astype(np.uint8)) <= 1


def test_guidance_goes_away_from_the_negative_caption(model, plain):
    from_nothing, from_a_car = wide(model, 5.0), wide(model, 5.0, PROMPTS[0])
    assert levels(from_nothing, plain) > 0 and levels(from_nothing, from_a_car) > 0
    # a caption minus itself leaves nothing to go away from
    assert levels(from_a_car[:1], plain[:1]) <= 1 and levels(from_a_car[1:], plain[1:]) > 1


def test_the_noise_of_a_seed_does_not_depend_on_the_default_generator(model):
    given = jax.eval_shape(lambda: (model.params, jnp.zeros((2, 16), int), jnp.zeros(16, int), jnp.zeros(2, np.uint32)))
    texts = []
    for generator in ("rbg", "threefry2x32"):
        jax.config.update("jax_default_prng_impl", generator)
        program = make_program(make_graphs(model.networks, model.schedule), SAMPLER, (8, 8, 4))
        texts.append(str(jax.make_jaxpr(program)(*given)))
    assert texts[0] == texts[1] and "random" in texts[0]


def test_another_type_of_numbers_gives_nearly_the_same(model, one, images):
    half = load_stable_diffusion(model.folder, dtype=jnp.bfloat16)
    mesh = make_mesh(devices=jax.devices()[:1])
    found = np.concatenate([make_draw(half, SAMPLER, mesh)([p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    off = np.abs(found.astype(float) - images).mean()
    apart = np.abs(images[0].astype(float) - images[1]).mean()
    assert 0 < off < 0.2 * apart


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": (20, 17)}, "size: 20x17 are no multiples of 2 pixels; 20x16 would be"),
        ({"size": (0, 16)}, "size: 0x16 are no multiples of 2 pixels; 2x16 would be"),
        ({"steps": 2000}, "steps: 2000 do not fit into 1000 timesteps; take from 1 to 1000"),
        ({"sampler": "dim"}, "sampler: 'dim' does not exist; did you mean 'ddim'?"),
    ],
)
def test_bad_values_are_named_before_anything_is_compiled(model, values, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make_draw(model, SamplerConfig(**values), make_mesh())


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), (["a", "b"], [0]), (["a"], [-1]), (["a"], [2**32])])
def test_seeds_that_do_not_fit_the_prompts_are_refused(model, prompts, seeds):
    with pytest.raises(UserError, match=f"seeds: {len(seeds)} for {len(prompts)} prompts; give one for each"):
        make_draw(model, SAMPLER, make_mesh(1, 1))(prompts, seeds)
