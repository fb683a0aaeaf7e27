"""Faults that a user can fix, in one line each."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A fault the user can fix. The message is one line: what is wrong, where, and how to fix it.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the most similar choice, else the list of all choices."""
    choices = list(choices)
    if nearest := difflib.get_close_matches(word, choices, n=1, cutoff=0.5):
        return f"; did you mean '{nearest[0]}'?"
    return "; known: " + (", ".join(choices) or "none")


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the error of a full, read-only or missing disk into a UserError that names the file, or else `path`."""
    try:
        yield
    except Exception as fault:
        # the libraries of checkpoints report the system's error number in messages of their own
        code = re.search(r"(?:os_error_code='|\(os error )(\d+)", str(fault))
        if not isinstance(fault, OSError) and code is None:
            raise
        reason = os.strerror(int(code[1])) if code else getattr(fault, "strerror", None) or fault
        where = getattr(fault, "filename", None) or os.fspath(path)
        raise UserError(f"{where}: {reason}; make room or fix the path, then run again to resume") from fault
