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
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.floss.features import Patches
from fmda.methods.floss.predict import agreement, fused_labels, host_labels
from fmda.methods.floss.ranking import Scanner, Seen, rank_images
from fmda.methods.floss.selection import flip_consistency
from fmda.methods.floss.settings import Config
from fmda.methods.floss.tally import Tally
from fmda.methods.floss.text import (
    default_classifier,
    expert_classifiers,
    prompt_ids,
    template_hash,
    text_embeddings,
    text_fingerprint,
)
from fmda.methods.floss.tower import Tower
from fmda.models.clip import VitConfig
from fmda.models.dinoiser import Heads
from fmda.progress import track
from fmda.runs.identity import claim
from fmda.weights.dinoiser import load_heads
from fmda.weights.network import Loaded, load_clip, weight_fingerprint

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
        clip: Loaded,
        heads: Heads | None = None,
        *,
        templates: Sequence[str] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Takes `templates` in place of those that the configuration names; `mesh` defaults to the local devices."""
        self.config, self.classes = config, classes
        self.host = config.host_config()
        if self.host.trained_scale:
            self.host = replace(self.host, scale=float(np.exp(np.asarray(clip.params["logit_scale"], np.float32))))
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
        self.tower = Tower(
            self.host, clip.config, clip.graphdef, clip.params, mesh, heads, f"{clip.fingerprint} {config.dtype}"
        )
        self.background = None
        if config.background is not None:
            self.background = self.queries.classes.index(classes.index(config.background))

    @classmethod
    def load(
        cls,
        config: Config,
        classes: ClassList,
        *,
        clip: Loaded | None = None,
        templates: Sequence[str] | None = None,
        mesh: Mesh | None = None,
    ) -> "Floss":
        """Returns the host of a configuration; reads the checkpoint unless it is passed as `clip`."""
        if clip is None:
            clip = load_clip(config.clip, config.revision, dtype=config.dtype)
        heads = None
        if config.host_config().features == "clip-dinoiser":
            if not isinstance(clip.config.vision, VitConfig):
                raise UserError(f"{config.clip}: CLIP-DINOiser reads a vision transformer; name another clip=")
            folder = config.heads or clip.folder
            assert folder is not None  # of a checkpoint that was loaded
            heads = load_heads(Path(folder), clip.config.vision.width)
        return cls(config, classes, clip, heads, templates=templates, mesh=mesh)

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
            "background": self.background,
        }

    def look(self, image: Image) -> Patches:
        """Returns the patches of the windows, on the first device: devices share the tower alone."""
        return _first_device(self.tower.see([image])[0])

    def predict_host(self, image: Image, patches: Patches | None = None) -> Result:
        """Returns (labels, confidence) by the host alone; `patches` saves a pass of the tower."""
        return host_labels(
            self.host,
            self.look(image) if patches is None else patches,
            self.ordinary,
            self.tower.geometry(image),
            self.queries.classes,
            image=self.tower.network_image(image) if self.host.pamr_steps else None,
            background=self.background,
        )

    def classifiers(self, chosen: Chosen) -> Float[np.ndarray, "E Q D"]:
        """Returns the experts and, last, the ordinary classifier as fusion uses it."""
        return expert_classifiers(self.table, chosen, self.queries.classes, renormalise=self.host.renormalise_mean)

    def predict(self, image: Image, classifiers: Float[np.ndarray, "E Q D"], patches: Patches | None = None) -> Result:
        """Returns (labels, confidence) by the fused experts; `patches` saves a pass of the tower."""
        return fused_labels(
            self.host,
            self.look(image) if patches is None else patches,
            classifiers,
            self.tower.geometry(image),
            self.queries.classes,
            fusion=self.config.fusion,
            background=self.background,
        )

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
            self.host,
            self.table,
            self.ordinary,
            self.queries.classes,
            self.tower.mesh,
            resolution=settings.resolution,
            chunk=settings.chunk,
            background=self.background,
        )

        def see(indices: Sequence[int]) -> Iterator[Seen]:
            examples = [images[i] for i in indices]
            patches = self.tower.see([e.image for e in examples])
            turned = self.tower.see([e.image[:, ::-1] for e in examples]) if settings.flip else [None] * len(examples)
            for example, one, other in zip(examples, patches, turned, strict=True):
                if each is not None:
                    each(example.image, _first_device(one))
                truth = example.labels if labels else None
                yield Seen(one, other, self.tower.geometry(example.image), truth)

        process, count = (jax.process_index(), jax.process_count()) if over_processes else (0, 1)
        if count > 1:
            state = state.with_stem(f"{state.stem}-{process}-of-{count}")
        facts = {**self._facts(), "ranking": settings, "images": images.digest(labels=labels), "labels": labels}
        sums_alike = ("ranking.criterion", "ranking.file")
        if not claim(state.parent, facts, sums_alike, record=f"{state.stem}.json"):
            state.unlink(missing_ok=True)  # sums without a record may be of anything
        tally = rank_images(
            see,
            range(process, len(images), count),
            scanner,
            state=state,
            group=max(1, self.tower.mesh.size // 2),
            save_every=settings.save_every,
            progress=lambda groups: track(list(groups), "rank templates", unit="groups"),
        )
        return tally.over_processes() if count > 1 else tally

    def flip_consistency(self, images: Dataset, candidates: Mapping[int, Chosen]) -> dict[int, float]:
        """Returns, for each candidate, how alike images and their mirror images are labelled by its experts."""
        classifiers = {n: self.classifiers(chosen) for n, chosen in candidates.items()}
        counts: dict[int, list[np.ndarray]] = {n: [] for n in candidates}
        for example in images:
            mirrored = np.ascontiguousarray(example.image[:, ::-1])
            patches, other = self.look(example.image), self.look(mirrored)
            for n, experts in classifiers.items():
                labels, _ = self.predict(example.image, experts, patches)
                turned, _ = self.predict(mirrored, experts, other)
                counts[n].append(agreement(labels, turned[:, ::-1], len(self.classes)))
        return {n: flip_consistency(np.stack(c)) for n, c in counts.items()}


def _first_device(patches: Patches) -> Patches:
    return Patches(*(a.addressable_data(0) for a in patches))
