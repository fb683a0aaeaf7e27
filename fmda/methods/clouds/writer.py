"""Prompts of street scenes written by a language model behind an endpoint.

CLOUDS takes the 100 prompts of Llama 2 70B as they come. Here the model is asked, for each scene of the grammar, for
one sentence, so that classes and conditions stay balanced. Every sentence is checked, and the grammar's own stands in
for those that stay missing. A sentence is only ever a prompt: nothing in it is followed or executed.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fmda.diffusion.filters import normalised, overlap, word_set
from fmda.methods.clouds.grammar import Scene
from fmda.methods.endpoint import Endpoint, NoAnswer, ask, json_answer, plain_line
from fmda.methods.generate.naming import named_classes
from fmda.progress import Line

ROUNDS, AT_ONCE, TEMPERATURE = 3, 20, 0.8
"""Times that a scene is asked for at most; scenes in one question; temperature of the answers."""

FEWEST_WORDS, MOST_WORDS, MOST_LETTERS, MOST_OVERLAP = 4, 40, 250, 0.8
"""Bounds of a sentence; largest share of common words of two."""

MARKUP = frozenset("<>{}[]|\\`*_#=~^")

ROLE = "You write captions of street photographs. You answer with one JSON object and nothing else."
QUESTION = """For each number below write one English sentence of 10 to 25 words that describes a realistic photograph
of these things under these conditions. Name the first thing by its word. Vary the wording and add plausible details of
a street. The keys of the JSON object are the numbers, its values the sentences.
"""


@dataclass
class Written:
    """What a language model wrote.

    Attributes:
        texts: accepted sentences by scene.
        refused: a row for each refused sentence or answer: scene, class, round, why, answer (its beginning, escaped).
        failure: why the endpoint fell silent; None where it did not.
        scene_of: scene by sentence, without case and punctuation.
        words: (scene, words of its sentence) of each class.
    """

    texts: dict[int, str] = field(default_factory=dict)
    refused: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    scene_of: dict[str, int] = field(default_factory=dict)
    words: dict[str, list[tuple[int, frozenset[str]]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, k: int, subject: str, text: str) -> None:
        """Takes the sentence of scene k."""
        self.texts[k] = text
        self.scene_of[normalised(text)] = k
        self.words[subject].append((k, word_set(text)))


def write(scenes: Sequence[Scene], endpoint: Endpoint, seed: int) -> Written:
    """Returns the sentences for these scenes that pass all checks; ends early where the endpoint falls silent."""
    out = Written()
    with Line() as line:
        for turn in range(ROUNDS):
            missing = [k for k in range(len(scenes)) if k not in out.texts]
            for first in range(0, len(missing), AT_ONCE):
                asked = missing[first : first + AT_ONCE]
                try:
                    _ask(scenes, asked, endpoint, seed + turn, turn, out)
                except NoAnswer as fault:
                    out.failure = str(fault)
                    return out
                line.update(f"prompts: {len(out.texts)}/{len(scenes)} written, {len(out.refused)} refused")
    return out


def _ask(scenes: Sequence[Scene], asked: Sequence[int], endpoint: Endpoint, seed: int, turn: int, out: Written) -> None:
    """Asks for some scenes once; adds what comes to `out`."""
    listed = [f"{k}: {' and '.join(scenes[k].nouns)}; {'; '.join(scenes[k].conditions)}" for k in asked]
    messages = [{"role": "system", "content": ROLE}, {"role": "user", "content": QUESTION + "\n".join(listed)}]
    answer = ask(endpoint, messages, temperature=TEMPERATURE, seed=seed, most_tokens=200 + 80 * len(asked))

    def refuse(k: int | None, why: str, value: Any) -> None:
        name = None if k is None else scenes[k].subject
        out.refused.append({"scene": k, "class": name, "round": turn, "why": why, "answer": ascii(value)[:200]})

    try:
        values = json_answer(answer)
    except ValueError as fault:
        refuse(None, str(fault), answer)
        return
    for k in asked:
        text = plain_line(values.get(str(k)), MOST_LETTERS)
        bounds = f"is no line of at most {MOST_LETTERS} letters"
        why = bounds if text is None else _fault(text, scenes[k].subject, out)
        if text is None or why is not None:
            refuse(k, str(why), values.get(str(k)))
        else:
            out.add(k, scenes[k].subject, text)


def _fault(text: str, subject: str, out: Written) -> str | None:
    """Returns why a sentence cannot be the prompt of a scene with this subject, None where it can."""
    if not FEWEST_WORDS <= len(text.split()) <= MOST_WORDS:
        return f"has not {FEWEST_WORDS} to {MOST_WORDS} words"
    if MARKUP & set(text) or "://" in text:
        return "holds markup or an address"
    if any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN ") for c in text):
        return "holds letters that are not Latin"
    if subject not in named_classes(text):
        return f"does not name the class '{subject}' in English"
    if (same := out.scene_of.get(normalised(text))) is not None:
        return f"is the sentence of scene {same}"
    words = word_set(text)
    near = next((k for k, earlier in out.words[subject] if overlap(earlier, words) > MOST_OVERLAP), None)
    return None if near is None else f"is nearly the sentence of scene {near}"
