"""The text side: every class name in every template, encoded once, and the classifiers made of that table.

M templates, Q queries (names; more than one a class where it has synonyms), K classes, D the joint width.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from fmda.atomic import replacing
from fmda.data import check_templates
from fmda.data.prompting import SLOT
from fmda.environment import cache_folder
from fmda.errors import UserError
from fmda.progress import track
from fmda.weights.network import Loaded

BATCH = 256


@dataclass(frozen=True)
class Queries:
    """The names that are put into the templates, and the class each belongs to.

    Attributes:
        names: Q names.
        classes: class of each name, non-decreasing from 0; every class has at least one.
    """

    names: tuple[str, ...]
    classes: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[str]]) -> "Queries":
        """Returns the queries of per-class synonym lists."""
        pairs = [(name, k) for k, names in enumerate(prompts) for name in names]
        return cls(tuple(n for n, _ in pairs), tuple(k for _, k in pairs))


def template_hash(templates: Sequence[str]) -> str:
    """Returns the SHA-256 of the templates joined by line ends, UTF-8."""
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()


def prompt_ids(clip: Loaded, queries: Queries, templates: Sequence[str]) -> Int[np.ndarray, "M Q T"]:
    """Returns the token ids of every name in every template.

    Raises UserError for a template without exactly one slot or a repeated one.
    """
    check_templates(tuple(templates))
    prompts = [template.replace(SLOT, name) for template in templates for name in queries.names]
    return np.asarray(clip.tokenize(prompts), np.int32).reshape(len(templates), len(queries.names), -1)


def text_fingerprint(clip: Loaded, ids: Int[np.ndarray, "M Q T"]) -> str:
    """Returns 24 hex digits that change with the weights, a template, a name, or how the tokenizer reads them."""
    digest = hashlib.sha256(f"{clip.fingerprint} {jnp.dtype(clip.dtype).name} {ids.shape}\n".encode())
    digest.update(np.ascontiguousarray(ids).data)
    return digest.hexdigest()[:24]


def text_embeddings(
    clip: Loaded, ids: Int[np.ndarray, "M Q T"], *, cache: Path | None = None
) -> Float[np.ndarray, "M Q D"]:
    """Returns the unit-length embedding of each name in each template, float32.

    Equal prompts are encoded once. The table is kept on disk under `text_fingerprint`.

    Args:
        ids: from `prompt_ids`.
        cache: folder of such tables; default `text` in `fmda.environment.cache_folder()`. A folder that is not
            writable is not used.
    """
    base = cache_folder()
    folder = base / "text" if cache is None and base is not None else cache
    path = None if folder is None else folder / f"{text_fingerprint(clip, ids)}.safetensors"
    # any fault of a table that is only kept to save time: it is encoded again, and not kept
    with contextlib.suppress(Exception):
        if path is not None and path.is_file():
            return load_file(str(path))["embeddings"]
    unique, place = np.unique(ids.reshape(-1, ids.shape[-1]), axis=0, return_inverse=True)
    table = _encode(clip, unique)[place].reshape(*ids.shape[:2], -1)
    with contextlib.suppress(Exception):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                save_file({"embeddings": np.ascontiguousarray(table)}, str(part))
    return table


def _encode(clip: Loaded, ids: Int[np.ndarray, "N T"]) -> Float[np.ndarray, "N D"]:
    # whole batches only, so that the text tower compiles once
    size = min(BATCH, len(ids))
    filled = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % size, axis=0)])
    starts = range(0, len(filled), size)
    parts = [
        np.asarray(clip.encode_text(filled[i : i + size]), np.float32)
        for i in track(starts, "encode prompts", unit="batches")
    ]
    vectors = np.concatenate(parts)[: len(ids)]
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def default_classifier(table: Float[np.ndarray, "M Q D"]) -> Float[np.ndarray, "Q D"]:
    """Returns the mean over templates for each name; at unit length again, as every host uses it alone."""
    return _unit(table.mean(0, dtype=np.float32))


def expert_classifiers(
    table: Float[np.ndarray, "M Q D"],
    chosen: Sequence[Sequence[int]],
    classes: Sequence[int],
    *,
    renormalise: bool,
) -> Float[np.ndarray, "E Q D"]:
    """Returns Q experts and, last, the ordinary classifier; each a complete classifier over all names.

    Expert e applies the templates chosen for the class of query e to every name; a class with none takes all. Without
    `renormalise` a row's length stays below one, as MaskCLIP and CLIP-DINOiser have it in fusion.
    """
    if len(chosen) != max(classes) + 1:
        raise UserError(f"experts for {len(chosen)} classes, but there are {max(classes) + 1}; rank these classes")
    # each query's expert as shares of the templates; last, all alike
    weights = np.full((len(classes) + 1, len(table)), 1 / len(table), np.float32)
    for row, k in enumerate(classes):
        if chosen[k]:
            weights[row] = 0
            weights[row, list(chosen[k])] = 1 / len(chosen[k])
    flat = weights @ table.reshape(len(table), -1)
    experts = flat.reshape(len(weights), *table.shape[1:])
    return _unit(experts) if renormalise else experts


def _unit(x: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
