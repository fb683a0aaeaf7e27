"""Host and FLOSS as one object: loads what a configuration names, ranks templates and predicts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from fmda.config import fingerprint
from fmda.data import ClassList, Dataset
from fmda.evaluate.confusion import Scores, confusion_matrix
from fmda.mesh import make_mesh
from fmda.methods.class_text import (
    default_classifier,
    expert_classifiers,
    prompt_ids,
    template_hash,
    text_embeddings,
    text_fingerprint,
)
from fmda.methods.floss.features import Patches
from fmda.methods.floss.hosts import vision_transformer
from fmda.methods.floss.predict import Chain, cropped, fused_maps, host_maps
from fmda.methods.floss.ranking import ImagePatches, Scanner, rank_images
from fmda.methods.floss.settings import Config
from fmda.methods.floss.tally import Tally
from fmda.methods.floss.tower import Tower
from fmda.runs.identity import claim
from fmda.weights.checkpoint import weight_fingerprint
from fmda.weights.load import load_clip, load_heads

Chosen = tuple[tuple[int, ...], ...]
Image = UInt8[np.ndarray, "H W 3"]
Result = tuple[Int[np.ndarray, "H W"], Float[np.ndarray, "H W"]]


class Floss:
    """A host with its text table on the local devices.

    Attributes:
        classes: the predicted classes.
        templates: M texts with a slot for a class name.
        table: text embeddings [M, Q, D].
        weights: fingerprints: `clip` of the checkpoint, `heads` of CLIP-DINOiser's (None for other hosts), `text` of
            the checkpoint and the tokenized prompts.
    """

    def __init__(
        self,
        config: Config,
        classes: ClassList,
        *,
        templates: Sequence[str] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Takes `templates` in place of those that the configuration names; `mesh` defaults to the local devices."""
        clip = load_clip(config.clip, config.revision, dtype=config.dtype)
        host, heads = config.host_config(), None
        if host.trained_scale:
            host = replace(host, scale=float(np.exp(np.asarray(clip.params["logit_scale"], np.float32))))
        if host.features == "clip-dinoiser":
            folder = config.heads or clip.folder
            assert folder is not None  # of a checkpoint that was loaded
            heads = load_heads(Path(folder), vision_transformer(clip.config, str(config.clip)).width)
        self.config, self.classes, self.host = config, classes, host
        self.queries = config.queries(classes)
        self.templates = config.template_list() if templates is None else tuple(templates)
        ids = prompt_ids(clip, self.queries, self.templates)
        self.weights = {
            "clip": clip.fingerprint,
            "heads": None if heads is None else weight_fingerprint(heads),
            "text": text_fingerprint(clip, ids),
        }
        self.table = text_embeddings(clip, ids)
        self.ordinary = default_classifier(self.table)
        mesh = mesh or make_mesh(devices=jax.local_devices())
        weights = f"{clip.fingerprint} {config.dtype}"
        self.tower = Tower(host, clip.config, clip.graphdef, clip.params, mesh, heads, weights)
        background = None if config.background is None else classes.index(config.background)
        self.chain = Chain(
            host, self.queries.classes, None if background is None else self.queries.classes.index(background)
        )

    def identity(self, chosen: Chosen | None) -> str:
        """Returns the fingerprint of all that a prediction depends on; None stands for the host alone."""
        experts = None if chosen is None else {"chosen": chosen, "fusion": self.config.fusion}
        return fingerprint({**self._facts(), "classes": self.classes.names, "experts": experts})

    def _facts(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "dtype": self.config.dtype,
            "host": self.host,
            "queries": self.queries,
            "templates": template_hash(self.templates),
            "background": self.chain.background,
        }

    def patches(self, image: Image) -> Patches:
        """Returns the patches of the windows, on the first device: devices share the tower alone."""
        return _first_device(self.tower.patches([image])[0])

    def predict_host(self, image: Image, patches: Patches | None = None) -> Result:
        """Returns (labels, confidence) by the host alone; `patches` saves a pass of the tower."""
        patches, grid = self.patches(image) if patches is None else patches, self.tower.patch_grid(image)
        pixels = self.tower.network_image(image) if self.host.pamr_steps else None
        return cropped(host_maps(self.chain, patches, self.ordinary, grid, pixels), grid)

    def classifiers(self, chosen: Chosen) -> Float[np.ndarray, "E Q D"]:
        """Returns the experts and, last, the ordinary classifier as fusion uses it."""
        return expert_classifiers(self.table, chosen, self.queries.classes, renormalise=self.host.renormalise_mean)

    def predict(self, image: Image, classifiers: Float[np.ndarray, "E Q D"], patches: Patches | None = None) -> Result:
        """Returns (labels, confidence) by the fused experts; `patches` saves a pass of the tower."""
        patches, grid = self.patches(image) if patches is None else patches, self.tower.patch_grid(image)
        return cropped(fused_maps(self.chain, patches, classifiers, grid, self.config.fusion), grid)

    def rank(
        self,
        images: Dataset,
        state: Path,
        *,
        labels: bool = False,
        each: Callable[[Image, Patches], None] | None = None,
        over_processes: bool = True,
    ) -> Tally:
        """Returns the sums of all templates over a dataset; continues from those in the file `state`.

        With several processes each takes every n-th image and keeps its own state. The number of devices may change
        before a pass continues.

        Args:
            labels: also count hits with true labels, for scoring criteria.
            each: called with every image and its patches, which other work can use without another pass.
            over_processes: False ranks all images in this process.

        Raises UserError for a state of other weights, prompts, images or settings.
        """
        settings = self.config.ranking
        scanner = Scanner(
            self.chain,
            self.table,
            self.ordinary,
            self.tower.mesh,
            resolution=settings.resolution,
            chunk=settings.chunk,
        )

        def load(indices: Sequence[int]) -> Iterator[ImagePatches]:
            examples = [images[i] for i in indices]
            patches = self.tower.patches([e.image for e in examples])
            turned = (
                self.tower.patches([e.image[:, ::-1] for e in examples]) if settings.flip else [None] * len(examples)
            )
            for example, one, other in zip(examples, patches, turned, strict=True):
                if each is not None:
                    each(example.image, _first_device(one))
                truth = example.labels if labels else None
                yield ImagePatches(one, other, self.tower.patch_grid(example.image), truth)

        process, count = (jax.process_index(), jax.process_count()) if over_processes else (0, 1)
        if count > 1:
            state = state.with_stem(f"{state.stem}-{process}-of-{count}")
        facts = {**self._facts(), "ranking": settings, "images": images.digest(labels=labels), "labels": labels}
        sums_alike = ("ranking.criterion", "ranking.file")
        if not claim(state.parent, facts, sums_alike, record=f"{state.stem}.json"):
            state.unlink(missing_ok=True)  # sums without a record may be of anything
        tally = rank_images(
            load,
            range(process, len(images), count),
            scanner,
            state=state,
            group=max(1, self.tower.mesh.size // 2),
            save_every=settings.save_every,
        )
        return tally.over_processes() if count > 1 else tally

    def flip_consistency(self, images: Dataset, candidates: Mapping[int, Chosen]) -> dict[int, float]:
        """Returns, for each candidate, the mean IoU of the labels of images and of their mirror images, turned back."""
        names, counts = self.classes.names, dict[int, np.ndarray]()
        classifiers = {n: self.classifiers(chosen) for n, chosen in candidates.items()}
        for example in images:
            mirrored = np.ascontiguousarray(example.image[:, ::-1])
            patches, mirrored_patches = self.patches(example.image), self.patches(mirrored)
            for n, experts in classifiers.items():
                labels, _ = self.predict(example.image, experts, patches)
                turned = self.predict(mirrored, experts, mirrored_patches)[0][:, ::-1]
                counts[n] = counts.get(n, 0) + confusion_matrix(labels, turned, len(names))
        return {n: Scores.from_confusion(matrix, names).miou for n, matrix in counts.items()}


def _first_device(patches: Patches) -> Patches:
    return Patches(*(a.addressable_data(0) for a in patches))
