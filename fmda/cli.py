"""The command line: arguments to verbs, faults to exit codes.

A fault that the user can fix is one line on stderr and exit code 2; FMDA_TRACEBACK=1 also prints its traceback and
cause.
"""

import os
import re
import sys
import traceback
import warnings
from typing import NoReturn

import tyro

from fmda import __version__
from fmda.config import user_path
from fmda.environment import platform_fault
from fmda.errors import UserError
from fmda.verbs import VERBS


def _words(arguments: list[str]) -> list[str]:
    """Returns the arguments with a verb of two words as one, and with `~` expanded, also behind `--name=`."""
    two = " ".join(arguments[:2])
    words = [two, *arguments[2:]] if two in VERBS else arguments
    parts = [word.rpartition("=") if word.startswith("--") else ("", "", word) for word in words]
    return [name + sign + (str(user_path(path)) if re.match("~(/|$)", path) else path) for name, sign, path in parts]


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Returns a warning as one line; its origin is added unless it is meant for users."""
    where = "" if issubclass(category, UserWarning) else f"{filename}:{lineno}: {category.__name__}: "
    return f"fmda: {where}{message}\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb; exits with 2 and one line for a fault that the user can fix, 130 when interrupted."""
    warnings.formatwarning = _warning_line
    words = sys.argv[1:] if arguments is None else arguments
    if words in (["--version"], ["version"]):
        print(f"fmda {__version__}")
        return
    try:
        description = "Foundation models for domain adaptation, in JAX."
        tyro.extras.subcommand_cli_from_dict(VERBS, prog="fmda", args=_words(words), description=description)
    except UserError as fault:
        _refuse(fault)
    except BrokenPipeError:
        # the reader of stdout (head, less) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as fault:
        where = f"{fault.filename}: " if fault.filename else ""
        _refuse(fault, f"{where}{fault.strerror or fault}; fix it and run the same command again")
    except KeyboardInterrupt:
        print("fmda: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, AssertionError) as fault:
        unusable = platform_fault()
        if unusable is None:
            raise
        _refuse(fault, str(unusable))


def _refuse(fault: Exception, line: str | None = None) -> NoReturn:
    """Prints one line, with FMDA_TRACEBACK=1 after the traceback and causes, and ends with exit code 2."""
    if os.environ.get("FMDA_TRACEBACK", "0") != "0":
        cause: BaseException | None = fault
        while cause is not None:
            # `from None` hides causes from users; a requested traceback needs them
            cause.__suppress_context__ = False
            cause = cause.__cause__ or cause.__context__
        traceback.print_exception(fault)
    print(f"fmda: {line or fault}", file=sys.stderr)
    _leave(2)


def _leave(code: int) -> NoReturn:
    """Ends the process. One of several ends at once: at a regular exit jax would wait for the others forever."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
