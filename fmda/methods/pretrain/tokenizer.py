"""A small byte-pair tokenizer in CLIP's own format, learned from the captions it will read.

The library's trainer breaks ties between equally frequent pairs at random, which would make two runs of the same
configuration differ; so the merges are learned here, and only applied by the library.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from fmda.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
ALPHABET = sorted(ByteLevel.alphabet())
WORD_END = "</w>"


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> CLIPTokenizer:
    """Returns a CLIP tokenizer of at most `vocabulary` entries, saved to `folder` in Hugging Face layout.

    It lower-cases, collapses blanks and marks word ends as CLIP's does; any text can be encoded, since every byte is
    in the vocabulary both inside and at the end of a word. The same texts give the same files.
    """
    entries = [*ALPHABET, *(letter + WORD_END for letter in ALPHABET)]
    blank = CLIPTokenizer(vocab=_numbered([*entries, START, END]), merges=[])
    merges = _merges(_word_counts(texts, blank), vocabulary - len(entries) - 2)
    entries += dict.fromkeys(left + right for left, right in merges)
    pairs: Any = merges  # the library's annotation says text; it takes pairs alone
    tokenizer = CLIPTokenizer(vocab=_numbered([*entries, START, END]), merges=pairs)
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as fault:  # the tokenizers library raises bare Exception where the disk does not take a file
        raise UserError(f"{folder}: tokenizer cannot be written ({fault}); make room and run again") from None
    return tokenizer


def _numbered(entries: list[str]) -> dict[str, int]:
    return {entry: index for index, entry in enumerate(entries)}


def _word_counts(texts: Iterable[str], blank: CLIPTokenizer) -> dict[tuple[str, ...], int]:
    """Returns how often each word occurs, as the pieces it has before any merge."""
    backend = blank.backend_tokenizer
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            counts[(*word[:-1], word[-1] + WORD_END)] += 1
    return counts


def _merges(words: dict[tuple[str, ...], int], limit: int) -> list[tuple[str, str]]:
    """Returns at most `limit` merges, the most frequent pair first, ties in alphabetical order."""
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in words.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_joined(pieces, best): count for pieces, count in words.items()}
    return merges


def _joined(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)
