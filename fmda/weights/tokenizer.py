"""Prompts to ids, by the tokenizer files that lie beside the weights."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fmda.errors import UserError
from fmda.models.clip.text import LARGEST_ID

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder holds tokenizer.json, or vocab.json and merges.txt."""
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


class Tokenizer:
    """The byte-pair encoder of one checkpoint. `ids` are right padded with zeros; ids after the end change nothing."""

    def __init__(self, folder: Path, eos_token_id: int, vocab_size: int) -> None:
        self.folder = folder
        self._inner = _load(folder)
        if self._inner.eos_token_id is None:
            raise UserError(f"{folder}: its tokenizer has no end token; copy the tokenizer files of the model")
        if len(self._inner) > vocab_size:
            raise UserError(
                f"{folder}: its tokenizer has {len(self._inner)} tokens, the model {vocab_size}; "
                "take both from the same source"
            )
        end, expected = self._inner.eos_token_id, eos_token_id
        if eos_token_id == LARGEST_ID:
            # The end is the last of CLIP's ids. Tokens that were added later follow it, with a row in the model each.
            expected = end if len(self._inner) == vocab_size else vocab_size - 1
        if end != expected:
            raise UserError(
                f"{folder}: its tokenizer ends sentences with id {end}, "
                f"the model reads them off at {expected}; take both from the same source"
            )

    def __call__(self, texts: Sequence[str], limit: int, context: int | None = None) -> Int[np.ndarray, "b t"]:
        """Returns int32 ids [B, T]; T is `context`, or by default what the longest text needs, at most `limit`.

        Longer texts are cut so that the end token stays. Raises UserError where `context` is not in 2..limit.
        """
        if context is not None and not 2 <= context <= limit:
            raise UserError(f"context: {context} is not in 2..{limit}, the positions that the model has")
        rows = self._encode(texts)
        return self._joined(rows, context or min(limit, max(map(len, rows), default=2)), padding=0)

    def padded(self, texts: Sequence[str], context: int) -> tuple[Int[np.ndarray, "b t"], list[str]]:
        """Returns (int32 ids [B, context], what was cut off each text, "" for nothing).

        Padding has the id that the tokenizer's files name, by default that of the end: Stable Diffusion's UNet reads
        the padded places too.
        """
        rows, padding = self._encode(texts), self._inner.pad_token_id
        lost = [self._inner.decode(row[context - 1 : -1]).strip() if len(row) > context else "" for row in rows]
        return self._joined(rows, context, self._inner.eos_token_id if padding is None else padding), lost

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # the library fails on an empty list
        return self._inner(list(texts), truncation=False, verbose=False)["input_ids"] if len(texts) else []

    def _joined(self, rows: list[list[int]], context: int, padding: int) -> Int[np.ndarray, "b t"]:
        ids = np.full((len(rows), context), padding, np.int32)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row[:context]
            if len(row) > context:
                ids[index, -1] = self._inner.eos_token_id
        return ids

    def length(self, text: str) -> int:
        """Returns how many ids a text has, start and end included."""
        return len(self._encode([text])[0])

    @property
    def vocab_size(self) -> int:
        """Number of ids the encoder can produce."""
        return len(self._inner)

    def files(self) -> list[Path]:
        """Returns the tokenizer's files, for copying them beside exported weights.

        Raises UserError where they are gone since they were read.
        """
        if not has_tokenizer(self.folder):
            raise UserError(f"{self.folder}: its tokenizer files are gone; put them back")
        return [self.folder / name for name in FILES if (self.folder / name).is_file()]


def _load(folder: Path) -> Any:
    """Returns the transformers tokenizer in a folder, read from its files alone."""
    # transformers advises about missing torch on import; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not has_tokenizer(folder):
        # transformers would make one up
        raise UserError(f"{folder}: holds no tokenizer.json, nor vocab.json and merges.txt; copy them from the model")
    from transformers import CLIPTokenizer

    try:
        inner = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UserError(
            f"{folder}: its tokenizer files cannot be read ({error}); copy or download them again"
        ) from None
    # the library accepts any type and fails later; its huge default means no limit
    limit = inner.model_max_length
    if not isinstance(limit, int | float) or isinstance(limit, bool):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {limit!r}, not one number; "
            "copy or download it again"
        )
    return inner
