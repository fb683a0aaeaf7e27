"""The one error a user should ever see, and the search for the name they meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A fault the user can fix. The message is one line: what is wrong, where, and how to fix it.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Returns the choice most similar to `word`, or None when nothing comes near."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the nearest choice, else the list of what exists."""
    choices = list(choices)
    guess = nearest(word, choices)
    if guess is not None:
        return f"; did you mean '{guess}'?"
    return "; known: " + (", ".join(choices) if choices else "none")
