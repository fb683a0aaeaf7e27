"""Host and FLOSS as one object: loads what a configuration names, ranks, chooses and predicts."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from fmda.config import fingerprint, to_dict
from fmda.data import ClassList, Dataset, open_dataset
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.floss.features import Patches
from fmda.methods.floss.predict import agreement, fused_labels, host_labels
from fmda.methods.floss.ranking import Scanner, Seen, rank_images
from fmda.methods.floss.settings import Config
from fmda.methods.floss.tally import Tally
from fmda.methods.floss.text import default_classifier, expert_classifiers, template_hash, text_embeddings
from fmda.methods.floss.tower import Tower
from fmda.models.clip import VitConfig
from fmda.models.dinoiser import Heads
from fmda.progress import track
from fmda.weights.clip import LoadedClip, load_clip
from fmda.weights.diffusers import params_fingerprint
from fmda.weights.dinoiser import load_heads
from fmda.weights.source import resolve

Chosen = tuple[tuple[int, ...], ...]
Result = tuple[Int[np.ndarray, "H W"], Float[np.ndarray, "H W"]]


class Floss:
    """A host with its text table on the local devices.

    Attributes:
        classes: what is predicted.
        table: text embeddings [M, Q, D].
    """

    def __init__(self, config: Config, classes: ClassList, clip: LoadedClip, heads: Heads | None, mesh: Mesh) -> None:
        self.config, self.classes, self.fingerprint = config, classes, clip.fingerprint
        self.heads_fingerprint = None if heads is None else params_fingerprint(heads)
        self.host = config.host_config()
        if self.host.trained_scale:
            self.host = replace(self.host, scale=float(np.exp(np.asarray(clip.params["logit_scale"], np.float32))))
        self.queries = config.queries(classes)
        self.templates = config.template_list()
        self.table = text_embeddings(clip, self.queries, self.templates)
        self.ordinary = default_classifier(self.table)
        self.tower = Tower(self.host, clip.config, clip.graphdef, clip.params, mesh, heads)
        self.background = None
        if config.background is not None:
            self.background = self.queries.classes.index(classes.index(config.background))

    @classmethod
    def load(cls, config: Config, classes: ClassList, mesh: Mesh | None = None) -> "Floss":
        """Returns the host of a configuration, by default on all devices of this process."""
        clip = load_clip(config.clip, config.revision, dtype=config.dtype)
        heads = None
        if config.host_config().features == "clip-dinoiser":
            if not isinstance(clip.config.vision, VitConfig):
                raise UserError(f"{config.clip}: CLIP-DINOiser reads a vision transformer; name another clip=")
            folder = Path(config.heads) if config.heads else resolve(config.clip, config.revision)
            heads = load_heads(folder, clip.config.vision.width)
        return cls(config, classes, clip, heads, mesh or make_mesh(devices=jax.local_devices()))

    def identity(self, chosen: Chosen | None) -> str:
        """Returns the fingerprint of all that a prediction depends on; None stands for the host alone."""
        fused = None if chosen is None else {"chosen": chosen, "fusion": self.config.fusion}
        return fingerprint(
            {
                "weights": [self.fingerprint, self.heads_fingerprint],
                "host": self.host,
                "queries": self.queries,
                "templates": template_hash(self.templates),
                "background": self.background,
                "fused": fused,
            }
        )

    def predict_host(self, image: UInt8[np.ndarray, "H W 3"]) -> Result:
        """Returns (labels, confidence) by the host alone."""
        return host_labels(
            self.host,
            self._look(image),
            self.ordinary,
            self.tower.geometry(image),
            self.queries.classes,
            image=self.tower.network_image(image) if self.host.pamr_steps else None,
            background=self.background,
        )

    def _look(self, image: UInt8[np.ndarray, "H W 3"]) -> Patches:
        """Returns the patches on the first device: the devices share the tower's work, the rest is done once."""
        return Patches(*(a.addressable_data(0) for a in self.tower.see([image])[0]))

    def classifiers(self, chosen: Chosen) -> Float[np.ndarray, "E Q D"]:
        """Returns the experts and, last, the ordinary classifier as fusion uses it."""
        return expert_classifiers(self.table, chosen, self.queries.classes, renormalise=self.host.renormalise_mean)

    def predict(self, image: UInt8[np.ndarray, "H W 3"], classifiers: Float[np.ndarray, "E Q D"]) -> Result:
        """Returns (labels, confidence) by the fused experts."""
        return fused_labels(
            self.host,
            self._look(image),
            classifiers,
            self.tower.geometry(image),
            self.queries.classes,
            fusion=self.config.fusion,
            background=self.background,
        )

    def rank(self, images: Dataset, state: Path, *, labels: bool = False) -> Tally:
        """Returns the sums of all templates over a data set; continues what `state` holds.

        With several processes each takes every n-th image and keeps a state of its own.

        Args:
            labels: also count hits with true labels, for scoring criteria.
        """
        ranking = self.config.ranking
        scanner = Scanner(
            self.host,
            self.table,
            self.ordinary,
            self.queries.classes,
            self.tower.mesh,
            resolution=ranking.resolution,
            chunk=ranking.chunk,
            background=self.background,
        )

        def see(indices: Sequence[int]) -> Iterator[Seen]:
            pictures = [images[i] for i in indices]
            patches = self.tower.see([p.image for p in pictures])
            turned = self.tower.see([p.image[:, ::-1] for p in pictures]) if ranking.flip else [None] * len(pictures)
            for picture, one, other in zip(pictures, patches, turned, strict=True):
                known = picture.labels if labels else None
                yield Seen(one, other, self.tower.geometry(picture.image), known)

        mark = self._mark(images, labels)
        own = range(jax.process_index(), len(images), jax.process_count())
        if jax.process_count() > 1:
            state = state.with_stem(f"{state.stem}-{jax.process_index()}-of-{jax.process_count()}")
        return rank_images(
            see,
            own,
            scanner,
            state=state,
            fingerprint=mark,
            group=max(1, self.tower.mesh.size // 2),
            save_every=ranking.save_every,
            progress=lambda groups: track(list(groups), "rank templates", unit="groups"),
        )

    def _mark(self, images: Dataset, labels: bool) -> str:
        names = hashlib.sha256("\n".join(item.name for item in images.items).encode()).hexdigest()
        ranking = replace(self.config.ranking, criterion="", file=None, chunk=0, save_every=0)
        parts = [self.fingerprint, to_dict(self.host), self.queries, template_hash(self.templates), ranking]
        return fingerprint([*(to_dict(p) for p in parts), names, labels, self.background, self.tower.mesh.size])

    def flip_counts(self, images: Dataset, chosen: Chosen) -> Int[np.ndarray, "I K 3"]:
        """Returns how the fused labels of each image agree with those of its mirror image, turned back."""
        classifiers = self.classifiers(chosen)
        counts = []
        for example in images:
            labels, _ = self.predict(example.image, classifiers)
            turned, _ = self.predict(np.ascontiguousarray(example.image[:, ::-1]), classifiers)
            counts.append(agreement(labels, turned[:, ::-1], len(self.classes)))
        return np.stack(counts)


def unlabelled_images(config: Config) -> Dataset:
    """Returns the images of the ranking, drawn by its seed where there is a budget; in the data set's order."""
    part = config.unlabelled
    root = part.root if part.root is not None else (config.data.root if part.name is None else None)
    images = open_dataset(part.name or config.data.name, root, part.split, labels=False)
    if part.images is None or part.images >= len(images):
        return images
    if part.images < 1:
        raise UserError(f"unlabelled.images: a budget of {part.images} ranks nothing; give 1 or more, or null for all")
    drawn = np.random.default_rng(part.seed).permutation(len(images))[: part.images]
    return images.subset(sorted(int(i) for i in drawn))


def scored_images(config: Config) -> Dataset:
    """Returns the labelled images host and FLOSS are scored on."""
    return open_dataset(config.data.name, config.data.root, config.data.split)
