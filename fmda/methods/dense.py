"""Frozen encoders that give one feature per patch, and the heads that are trained on them."""

import copy
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fmda import trees
from fmda.data import ClassList, templates
from fmda.data.classes import Names
from fmda.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fmda.errors import UserError
from fmda.losses.pixelwise import cross_entropy
from fmda.methods.class_text import Queries, default_classifier, prompt_ids, text_embeddings
from fmda.models.catalog import ENTRIES
from fmda.models.clip import VisionTransformer, vision_tower
from fmda.models.clip.convnext import ConvNext
from fmda.models.clip.resnet import ModifiedResNet
from fmda.models.module import abstract
from fmda.nn.resize import resize
from fmda.trees import Tree
from fmda.weights.checkpoint import family_of, network_graph, weight_fingerprint
from fmda.weights.load import load_clip, load_dino, load_dinov2
from fmda.weights.network import Loaded
from fmda.weights.source import resolve


def normalised(pixels: Any, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD) -> Any:
    """Returns RGB in 0..255, [..., 3], as float32 with the mean and deviation of each channel in 0..1 taken out."""
    shape = (1,) * (pixels.ndim - 1) + (3,)
    mean, std = (np.asarray(values, np.float32).reshape(shape) for values in (mean, std))
    return (pixels.astype(np.float32) / 255 - mean) / std


def known_encoder(source: str | None) -> Loaded | None:
    """Returns an encoder of the catalogue that is no folder here, with shapes in place of arrays; None for others."""
    if source is not None and not Path(source).expanduser().is_dir():
        for entry in ENTRIES:
            if entry.family and source in (entry.source, *entry.mirrors):
                return Loaded(entry.family, entry.config, network_graph(entry.family, entry.config)[1])
    return None


LOADERS = {"clip": load_clip, "dino": load_dino, "dinov2": load_dinov2}


class Encoder:
    """A frozen network that gives one feature per patch. Raises UserError for a network of another kind.

    With `sizes`, one of the catalogue that is not here has shapes for arrays, and no fingerprint.

    Attributes:
        source: its name.
        params, width: its parameters, and the channels of a feature.
        changes: those of the parameters that a training changed.
        fingerprint: of the stored parameters, without these changes.
    """

    def __init__(self, source: str, *, sizes: bool = False) -> None:
        known = known_encoder(source) if sizes else None
        family = known.family if known else family_of(resolve(source))
        if family not in LOADERS:
            raise UserError(f"encoder: {source} is a network of family '{family}'; name a CLIP, a DINO or a DINOv2")
        net = known or LOADERS[family](source)
        if family == "clip":
            tower = functools.partial(vision_tower, net.config.vision, net.config.embed_dim)
            self._graphdef, self.params = abstract(lambda rngs: tower(rngs=rngs))[0], net.params["vision"]
        else:
            self._graphdef, self.params = net.graphdef, net.params
        self.source, self.changes = source, Tree()
        self._image = (net.config.image_mean, net.config.image_std) if family == "clip" else ()
        self.fingerprint = "" if known else weight_fingerprint(self.params, net.config)
        square = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        self.width = jax.eval_shape(self.features, self.params, square).shape[-1]

    def changed(self, changes: Tree) -> "Encoder":
        """Returns the encoder with these leaves in place of its own, recorded in `changes`."""
        encoder = copy.copy(self)
        encoder.params, encoder.changes = (trees.joined(tree, changes) for tree in (self.params, self.changes))
        return encoder

    def features(self, params: Any, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w width"]:
        """Returns features of RGB in 0..255; images are stretched to whole patches."""
        net = nnx.merge(self._graphdef, params)
        if not isinstance(net, VisionTransformer):
            return net.stages(normalised(pixels, *self._image))[-1].astype(jnp.float32)
        x, shape = self._before_last(net, pixels)
        return _grid(net.norm_post(net.blocks[-1](x)), shape)

    def projected(self, params: Any, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w e"]:
        """Returns what a CLIP sees at each place of RGB in 0..255, in the space of its texts.

        A place attends to itself alone in the last attention (Zhou et al. 2022, MaskCLIP).
        """
        net = nnx.merge(self._graphdef, params)
        if not isinstance(net, VisionTransformer):
            return net.project(net.stages(normalised(pixels, *self._image))[-1]).astype(jnp.float32)
        x, shape = self._before_last(net, pixels)
        return _grid(net.project(net.blocks[-1].value_path(x)), shape)

    def class_names(self, classes: ClassList) -> tuple[Float[np.ndarray, "k s e"], float]:
        """Returns (embeddings of the classes' names, factor that a CLIP has learned for cosines with them).

        An embedding is the mean over 80 templates, of unit length; classes with fewer names repeat their last one.
        Raises UserError for an encoder that is no CLIP, or has no tokenizer.
        """
        if not self._image:
            raise UserError(f"zero_shot: {self.source} is no CLIP and reads no names; take one, or leave it out")
        return _class_names(self.source, self.fingerprint, classes.prompts)

    def _before_last(self, net: VisionTransformer, pixels: Array) -> tuple[Array, tuple[int, int]]:
        """Returns (tokens before a transformer's last block, patches down and across)."""
        x, patch = normalised(pixels, *self._image), net.config.patch_size
        h, w = (-(-side // patch) for side in x.shape[1:3])
        x = net.tokens(resize(x, (h * patch, w * patch)), position_offset=net.config.position_offset)
        for block in list(net.blocks)[:-1]:
            x = block(x)
        return x, (h, w)

    def maps(self, params: Any, pixels: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], ...]:
        """Returns float32 maps at strides 4, 8, 16, 32 of RGB in 0..255.

        A transformer's are its last map, resized (a simple pyramid as that of Li et al. 2022, ViTDet, without layers of
        its own). Raises UserError for a convolutional tower where a side is below 32.
        """
        net = nnx.merge(self._graphdef, params)
        if isinstance(net, ModifiedResNet | ConvNext):
            return tuple(x.astype(jnp.float32) for x in net.stages(normalised(pixels, *self._image)))
        last, sides = self.features(params, pixels), pixels.shape[1:3]
        return tuple(resize(last, (-(-sides[0] // stride), -(-sides[1] // stride))) for stride in (4, 8, 16, 32))


@functools.lru_cache(maxsize=8)  # checks, facts, scores and fingerprints of a run ask for the same names
def _class_names(source: str, fingerprint: str, prompts: Names) -> tuple[Float[np.ndarray, "k s e"], float]:
    del fingerprint  # other weights under the same name are another entry
    clip, queries = load_clip(source), Queries.of(prompts)
    vectors = iter(default_classifier(text_embeddings(clip, prompt_ids(clip, queries, templates()))))
    most = max(map(len, prompts))
    rows = [[next(vectors) for _ in names] for names in prompts]
    names = np.stack([np.stack([*row, *[row[-1]] * (most - len(row))]) for row in rows])
    return names, float(np.exp(np.asarray(clip.params["logit_scale"], np.float32)))


def _grid(tokens: Float[Array, "b 1+h*w c"], shape: tuple[int, int]) -> Float[Array, "b h w c"]:
    return tokens[:, 1:].reshape(len(tokens), *shape, -1).astype(jnp.float32)


class DenseNetwork:
    """A frozen encoder under a head of convolutions; `hidden` and `classes` as in `init_head`."""

    def __init__(self, encoder: Encoder, hidden: int, classes: int) -> None:
        self.encoder, self._sizes = encoder, (encoder.width, hidden, classes)

    def init(self, key: Any) -> Tree:
        """Returns freshly drawn parameters of the head."""
        return init_head(key, *self._sizes)

    def loss(self, params: Any, batch: dict[str, Array], key: Any) -> tuple[Array, dict[str, Array]]:
        """Returns (cross-entropy over labelled pixels, logits resized to the labels; metrics)."""
        del key
        _, height, width = batch["labels"].shape
        logits = resize(self.scores(params, batch["image"]), (height, width))
        loss, accuracy = cross_entropy(logits, batch["labels"])
        return loss, {"accuracy": accuracy}

    def scores(self, params: Any, pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w k"]:
        """Returns logits of RGB in 0..255; `params` holds those of "encoder" and "head"."""
        return head_logits(params["head"], self.encoder.features(params["encoder"], pixels))


def init_convolution(key: Any, size: int, inputs: int, outputs: int) -> Tree:
    """Returns {"kernel" [size, size, inputs, outputs], "bias"}: normal of deviation 1 / sqrt(inputs), and 0."""
    kernel = jax.random.normal(key, (size, size, inputs, outputs)) * (size * size * inputs) ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros((outputs,))}


def convolved(params: Tree, x: Float[Array, "b h w c"], stride: int = 1, padding: Any = "SAME") -> Array:
    """Returns the convolution of x [b, h2, w2, outputs] with the parameters of `init_convolution`."""
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["kernel"], (stride, stride), padding, dimension_numbers=numbers)
    return x + params["bias"][None, None, None]


def init_head(key: Any, width: int, hidden: int, classes: int) -> Tree:
    """Returns the parameters of a head (`init_convolution`)."""
    sizes = {"linear": (1, hidden or width, classes)} | ({"conv": (3, width, hidden)} if hidden else {})
    return {name: init_convolution(jax.random.fold_in(key, i), *size) for i, (name, size) in enumerate(sizes.items())}


def head_logits(params: Tree, x: Float[Array, "b h w width"]) -> Float[Array, "b h w k"]:
    """Returns the logits of a head; with a hidden layer: 3x3 convolution, ReLU, linear."""
    if "conv" in params:
        x = jax.nn.relu(convolved(params["conv"], x))
    return convolved(params["linear"], x)
