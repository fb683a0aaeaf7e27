"""The families of adaptation: values by hand, who gets gradients, one objective on a network of two layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fmda.augment.style import adain
from fmda.losses.features import mmd, reversal_scale
from fmda.methods.uda import style
from fmda.methods.uda.adversary import ADVERSARY, domain_logits, init_layers, without_adversary
from fmda.methods.uda.dann import DannConfig, dann_loss, init_classifier
from fmda.methods.uda.entropy import EntropyConfig
from fmda.methods.uda.mmd import MmdConfig, mmd_loss
from fmda.methods.uda.objective import LearnConfig, init_adversary, make_objective
from fmda.methods.uda.output_adversarial import (
    AuxiliaryConfig,
    OutputAdversarialConfig,
    auxiliary_losses,
    init_auxiliary,
    init_discriminator,
    output_adversarial_losses,
)
from fmda.methods.uda.self_training import initial_aux
from fmda.methods.uda.student import Outputs, teacher_logits
from fmda.methods.uda.style import StyleConfig, styled
from fmda.models.module import abstract, init, separated
from fmda.models.segformer import EncoderDecoder
from fmda.nn.conv import conv
from fmda.nn.norm import BatchNorm
from fmda.train import OptimConfig, TrainState, create_state, make_optimizer

KEY = jax.random.key(0)
CLASSES, CHANNELS = 3, (2, 4)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_mmd_of_unit_vectors():
    source, target = normal(0, 2, 2, 3, 5), normal(1, 2, 2, 3, 5)

    def rows(x):
        x = np.asarray(x).reshape(-1, 5)
        return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))

    # of 12 vectors each, all are taken
    outputs = [Outputs(jnp.zeros((2, 2, 3, CLASSES)), (features,)) for features in (source, target)]
    labels = jnp.zeros((2, 2, 3), jnp.uint8)
    value = mmd_loss(MmdConfig(), *outputs, labels, KEY)
    assert float(value) == pytest.approx(0.1 * float(mmd(rows(source), rows(target))), abs=1e-6)
    some = mmd_loss(MmdConfig(vectors=4), *outputs, labels, KEY)
    assert float(some) != pytest.approx(float(value), rel=1e-3)


def test_mmd_per_class_by_hand():
    # cells of 2x2 pixels; the last cell of the target is not confident
    labels = jnp.array([[0, 0, 0], [1, 1, 1]]).repeat(2, 0).repeat(2, 1)[None]
    source = jnp.array([[[3.0, 0]] * 3, [[0, 2.0]] * 3])[None]
    target = jnp.array([[[5.0, 0]] * 3, [[4.0, 0], [4.0, 0], [0, 1.0]]])[None]
    certain = jnp.array([[[0, 9.0]] * 3, [[9.0, 0], [9.0, 0], [0.1, 0]]]).repeat(2, 0).repeat(2, 1)[None]
    value = mmd_loss(
        MmdConfig(weight=0.5, per_class=True), Outputs(certain, (source,)), Outputs(certain, (target,)), labels, KEY
    )
    # 8 unit vectors along one axis and 4 along the other: 64 of 144 ordered pairs have the squared distance 2
    apart = sum(np.exp(-2 / (2 * 2.0**k * 2 * 64 / 144)) for k in range(-3, 2))
    # class 0 is at one place in both domains, class 1 is not
    assert float(value) == pytest.approx(0.5 * (0 + 10 - 2 * apart) / 2, rel=1e-5)


def test_dann_by_hand():
    # one unit: logit of the target = its input, twice leaky
    params = {i: {"kernel": jnp.ones((1, 1, 1, 1)), "bias": jnp.zeros(1)} for i in range(3)}
    source, target = (jnp.full((1, 1, 1, 1), value) for value in (2.0, 1.0))
    config, progress = DannConfig(weight=0.5), jnp.float32(0.1)
    value, (ours, classifier) = jax.value_and_grad(
        lambda source, params: dann_loss(config, params, source, target, progress), (0, 1)
    )(source, params)
    sigmoid = 1 / (1 + np.exp(-2.0))
    assert float(value) == pytest.approx((np.log1p(np.exp(2.0)) + np.log1p(np.exp(-1.0))) / 2, rel=1e-6)
    # the features go up the classifier's loss, the classifier down, without the weight
    scale = 0.5 * float(reversal_scale(progress))
    assert float(ours.squeeze()) == pytest.approx(-scale * sigmoid / 2, rel=1e-5)
    up = (sigmoid - (1 - 1 / (1 + np.exp(-1.0)))) / 2
    assert float(classifier[2]["bias"][0]) == pytest.approx(up, rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "squares"])
def test_output_adversarial_by_hand(loss):
    config = OutputAdversarialConfig(weight=0.25, loss=loss, width=2)
    params = init_discriminator(config, KEY, CLASSES)
    source, target = 3 * normal(0, 2, 32, 32, CLASSES), 3 * normal(1, 2, 32, 32, CLASSES)
    losses = output_adversarial_losses(config, params, source, target)
    s, t = (np.asarray(domain_logits(params, jax.nn.softmax(x), 2, 1)) for x in (source, target))
    assert s.shape == (2, 1, 1, 1)
    if loss == "squares":
        expected = {"adversarial": 0.25 * np.mean(t**2), "discriminator": (np.mean(s**2) + np.mean((t - 1) ** 2)) / 2}
    else:
        softplus = np.log1p(np.exp([s, t, -t])).mean((1, 2, 3, 4))
        expected = {"adversarial": 0.25 * softplus[1], "discriminator": (softplus[0] + softplus[2]) / 2}
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_student_and_discriminator_learn_from_their_own_losses_alone():
    config = OutputAdversarialConfig(width=2)
    params = init_discriminator(config, KEY, CLASSES)
    logits = normal(0, 2, 32, 32, CLASSES), normal(1, 2, 32, 32, CLASSES)

    def gradients(name):
        return jax.grad(lambda *inputs: output_adversarial_losses(config, *inputs)[name], (0, 1, 2))(params, *logits)

    def moves(tree):
        return any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))

    assert [moves(part) for part in gradients("adversarial")] == [False, False, True]
    assert [moves(part) for part in gradients("discriminator")] == [True, False, False]


@pytest.mark.parity
def test_the_auxiliary_level_equals_torch():
    import torch
    from torch.nn import functional as F

    config = OutputAdversarialConfig(width=2, auxiliary=AuxiliaryConfig())
    maps = [3 * normal(i, 2, 14, 14, 4) for i in (0, 1)]
    labels = np.random.default_rng(0).choice([0, 1, 2, 255], (2, 40, 40)).astype(np.uint8)

    def ours(params, maps):
        outputs = [Outputs(jnp.zeros((2, 40, 40, CLASSES)), (x, jnp.zeros((2, 7, 7, 5)))) for x in maps]
        losses = auxiliary_losses(config, config.auxiliary, params, *outputs, labels)
        return sum(losses.values()), losses

    params = init_auxiliary(config, KEY, 4, CLASSES)
    gradients, losses = jax.jit(jax.grad(ours, 1, has_aux=True))(params, maps)

    def convolved(x, layer, **options):
        kernel, bias = (torch.tensor(np.asarray(layer[name])) for name in ("kernel", "bias"))
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, **options)

    def judged(x):
        for i in range(5):
            x = convolved(x if i == 0 else F.leaky_relu(x, 0.2), params["discriminator"][i], stride=2, padding=1)
        return x

    def theirs(detach):
        inputs = [torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_() for x in maps]
        branches = [params["classifier"]["branches"][i] for i in (0, 1)]
        source, target = (
            F.interpolate(
                sum(convolved(x, one, padding=r, dilation=r) for one, r in zip(branches, (6, 12), strict=True)),
                (40, 40), mode="bilinear",
            )
            for x in inputs
        )  # fmt: skip
        each = F.cross_entropy(source, torch.tensor(labels).long(), ignore_index=255, reduction="none")
        probabilities = [x.softmax(1) for x in (source, target)]
        own = [judged(x.detach() if detach else x) for x in probabilities]
        fooled = judged(probabilities[1])
        found = {
            "auxiliary": 0.1 * each.mean(),
            "auxiliary_adversarial": 0.0002 * F.softplus(fooled).mean(),
            "auxiliary_discriminator": (F.softplus(own[0]).mean() + F.softplus(-own[1]).mean()) / 2,
        }
        return found, [x.permute(0, 2, 3, 1) for x in torch.autograd.grad(sum(found.values()), inputs)]

    def apart(wanted):
        return max(
            float(abs(np.asarray(a) - b.numpy()).max() / b.abs().max()) for a, b in zip(gradients, wanted, strict=True)
        )

    expected, wanted = theirs(detach=True)
    assert {k: float(v) for k, v in losses.items()} == pytest.approx({k: v.item() for k, v in expected.items()}, 1e-5)
    assert apart(wanted) < 1e-4
    # a faulty twin: the student learns from the discriminator's own loss too
    assert apart(theirs(detach=False)[1]) > 1e-2


def test_discriminators_at_full_size():
    shapes = jax.eval_shape(lambda: init_discriminator(OutputAdversarialConfig(), KEY, 19))
    assert [tuple(shapes[i]["kernel"].shape) for i in range(5)] == [
        (4, 4, 19, 64), (4, 4, 64, 128), (4, 4, 128, 256), (4, 4, 256, 512), (4, 4, 512, 1)
    ]  # fmt: skip
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 2_781_121
    out = jax.eval_shape(lambda p: domain_logits(p, jnp.zeros((1, 512, 1024, 19)), 2, 1), shapes)
    assert out.shape == (1, 16, 32, 1)
    shapes = jax.eval_shape(lambda: init_auxiliary(OutputAdversarialConfig(), KEY, 1024, 19))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 2_781_121 + 2 * (9 * 1024 * 19 + 19)
    shapes = jax.eval_shape(lambda: init_classifier(DannConfig(), KEY, 512))
    assert [tuple(shapes[i]["kernel"].shape) for i in range(3)] == [(1, 1, 512, 256), (1, 1, 256, 256), (1, 1, 256, 1)]


def test_layers_keep_the_size_of_their_inputs():
    x = domain_logits({0: init_layers(KEY, 1, (4096, 1))[0]}, normal(1, 64, 4, 4, 4096), 1, 0)
    assert float(x.std()) == pytest.approx(1, abs=0.1)


def test_fda_takes_the_mean_colour_of_the_target():
    source, target = (255 * jax.random.uniform(jax.random.key(i), (2, 8, 8, 3)) for i in (0, 1))
    styles = styled(StyleConfig(share=0.0), source, target, KEY)
    np.testing.assert_allclose(styles.mean((1, 2)), target.mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(
        styles - styles.mean((1, 2), keepdims=True), source - source.mean((1, 2), keepdims=True), atol=1e-2
    )
    jitter = StyleConfig(share=0.0, jitter=0.2)
    first, second = (styled(jitter, source, target[:1].repeat(2, 0), key).mean((1, 2)) for key in jax.random.split(KEY))
    assert abs(first[0] - first[1]).max() > 1 and abs(first - second).max() > 1


class Halves(nnx.Module):
    """Stands in for an autoencoder: latents are half the image, decoded images are too dark by `loss`."""

    def __init__(self, loss=0.0):
        self.loss = loss

    def encode(self, images):
        return images / 2, None

    def decode(self, latents):
        return 2 * latents - self.loss


def test_adain_in_latents():
    source, target = (jax.random.uniform(jax.random.key(i), (2, 8, 8, 3), minval=60, maxval=190) for i in (0, 1))
    target = 0.5 * target + 40
    styles = styled(StyleConfig(method="adain"), source, target, KEY, Halves())
    np.testing.assert_allclose(styles, adain(source, target), atol=0.1)
    # an autoencoder that darkens: its own error is taken back
    dark, config = Halves(loss=0.1), StyleConfig(method="adain", detail=0.5)
    taken_back = 0.5 * 0.1 * 127.5
    np.testing.assert_allclose(styled(config, source, target, KEY, dark), styles - taken_back, atol=0.1)
    half = styled(StyleConfig(method="adain", alpha=0.5), source, target, KEY, Halves())
    np.testing.assert_allclose(half, (styles + source) / 2, atol=0.1)


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.stem = conv(3, CHANNELS[0], 2, stride=2, rngs=rngs)
        self.layer = conv(*CHANNELS, 2, stride=2, rngs=rngs)
        self.norm = BatchNorm(CHANNELS[1], rngs=rngs)

    def stages(self, x, key=None):
        x = jax.nn.relu(self.stem(x))
        return x, jax.nn.relu(self.norm(self.layer(x)))


class Head(nnx.Module):
    def __init__(self, rngs):
        self.layer = conv(CHANNELS[-1], CLASSES, 1, rngs=rngs)

    def __call__(self, maps, key=None):
        return self.layer(maps[-1])


class Network(EncoderDecoder):
    def __init__(self, rngs):
        self.encoder, self.head = Encoder(rngs), Head(rngs)


EVERYTHING = LearnConfig(
    mmd=MmdConfig(), dann=DannConfig(width=4),
    output_adversarial=OutputAdversarialConfig(width=2, auxiliary=AuxiliaryConfig()),
    entropy=EntropyConfig(), style=StyleConfig(share=0.1, jitter=0.1),
)  # fmt: skip
LEVEL = ("adversarial", "discriminator")
TERMS = {"source", "mmd", "dann", *LEVEL, "auxiliary", *(f"auxiliary_{name}" for name in LEVEL), "entropy"}


def make():
    graphdef = abstract(lambda rngs: Network(rngs))[0]
    return graphdef, *separated(graphdef, init(lambda rngs: Network(rngs), KEY))


def batch(labels=False):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 2, 32, 32, 3), dtype=np.uint8)
    classes = rng.integers(0, CLASSES, (2, 32, 32), dtype=np.uint8)
    target = {"image": images[1]} | ({"labels": classes} if labels else {})
    return {"source": {"image": images[0], "labels": classes}, "target": target}


def outcome(learn, batch, step=5):
    graphdef, params, statistics = make()
    params = params | init_adversary(learn, KEY, CHANNELS, CLASSES)
    state = create_state(params, make_optimizer(OptimConfig(), 10), aux=initial_aux(statistics, CLASSES))
    state = state._replace(step=jnp.int32(step))
    objective = make_objective(graphdef, CLASSES, learn, steps=10)

    def loss(params):
        result = objective(params, state, {}, batch, KEY)
        return result.loss, result

    gradients, result = jax.jit(jax.grad(loss, has_aux=True))(params)
    return gradients, result


def test_all_terms_add_up_and_share_a_forward_pass(monkeypatch):
    calls = []
    stages = Encoder.stages
    monkeypatch.setattr(Encoder, "stages", lambda self, x, key=None: (calls.append(x.shape), stages(self, x, key))[1])
    gradients, result = outcome(EVERYTHING, batch(labels=True))
    assert set(result.metrics) == {f"loss_{name}" for name in TERMS | {"target"}}
    assert float(result.loss) == pytest.approx(sum(map(float, result.metrics.values())), rel=1e-5)
    assert len(calls) == 2 and set(gradients) == {"encoder", "head", ADVERSARY}
    assert all(np.isfinite(leaf).all() and np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients["adversary"]))


def test_the_clean_target_moves_the_running_statistics():
    graphdef, params, statistics = make()
    state = create_state(params, make_optimizer(OptimConfig(), 10), aux=initial_aux(statistics, CLASSES))

    def mean(learn):
        result = make_objective(graphdef, CLASSES, learn)(params, state, {}, batch(), KEY)
        return np.asarray(result.aux["statistics"]["encoder"]["norm"]["mean"])

    assert abs(mean(LearnConfig()) - mean(LearnConfig(entropy=EntropyConfig()))).max() > 1e-3


def test_the_teacher_is_the_network_alone():
    graphdef, params, statistics = make()
    whole = params | init_adversary(EVERYTHING, KEY, CHANNELS, CLASSES)
    images = batch()["target"]["image"]
    logits = [
        teacher_logits(graphdef, TrainState(0, {}, {}, teacher, {"statistics": statistics}), images)
        for teacher in (params, whole)
    ]
    np.testing.assert_array_equal(*logits)
    assert without_adversary(whole).keys() == params.keys()


def test_names_of_the_terms_that_need_a_target():
    assert LearnConfig().of_target == () and init_adversary(LearnConfig(), KEY, CHANNELS, 3) == {}
    assert EVERYTHING.of_target == ("mmd", "dann", "output_adversarial", "entropy", "style")
    assert style.open_autoencoder(EVERYTHING.style, 32) is None
