"""A language or vision-language model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, Ollama, hosted ones).

Answers are hostile text: bounded while they are read, never executed, and parsed strictly by `json_answer`. The key
stands in an environment variable; it is sent as a header and nowhere else, and never to another host.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fmda.config import FREE, NonNegativeFloat, PositiveFloat, PositiveInt
from fmda.errors import UserError

MOST_BYTES = 1 << 20
"""Of an answer; the rest is not read."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts that are reached without the proxy of the environment."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers.

    Attributes:
        url: its base, such as `http://127.0.0.1:8000/v1`, without credentials.
        model: name of the model there.
        key_variable: environment variable that holds the key, if the endpoint wants one.
        timeout: seconds of one try.
        tries: of one question.
        pause: seconds before the second try; doubled before each further one.
    """

    url: str = field(metadata=FREE)
    model: str
    key_variable: str = field(default="FMDA_ENDPOINT_KEY", metadata=FREE)
    timeout: PositiveFloat = field(default=120.0, metadata=FREE)
    tries: PositiveInt = field(default=3, metadata=FREE)
    pause: NonNegativeFloat = field(default=2.0, metadata=FREE)

    @property
    def host(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc.rpartition("@")[2]


class NoAnswer(Exception):
    """The endpoint gave no answer within its tries; the message names host and reason in a few words."""


def check_endpoint(endpoint: Endpoint, where: str) -> None:
    """Raises UserError for a URL that cannot work or holds credentials; `where` is the option. Sends nothing."""
    try:
        parts = urlsplit(endpoint.url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    # credentials are not repeated in the message, nor recorded with the run
    if valid and ("@" in parts.netloc or parts.query or parts.fragment):
        raise UserError(
            f"{where}.url: holds credentials or a query; give the base alone, such as http://127.0.0.1:8000/v1, and "
            f"the key in the environment variable {endpoint.key_variable}"
        )
    if not valid:
        raise UserError(f"{where}.url: '{endpoint.url}' is no http(s) URL; give one such as http://127.0.0.1:8000/v1")
    if not endpoint.model:
        raise UserError(f"{where}.model: is empty; name the model of the endpoint")
    if not re.fullmatch(r"[A-Za-z_]\w*", endpoint.key_variable):
        # perhaps the key itself, which is not repeated
        raise UserError(f"{where}.key_variable: is no name of an environment variable; give one, and the key in it")
    if not _key(endpoint).isprintable() or not _key(endpoint).isascii():
        raise UserError(f"{endpoint.key_variable}: the key holds control characters or letters beyond ASCII; fix it")


def ask(endpoint: Endpoint, messages: list[dict[str, Any]], *, temperature: float, seed: int, most_tokens: int) -> str:
    """Returns the text of the answer to a chat, without a reasoning model's thoughts.

    Raises NoAnswer where all tries fail: no connection, time-out, an HTTP error, more than `MOST_BYTES`, or no text in
    the answer. Errors that another try cannot change (a wrong key, an unknown model) are not tried again.
    """
    body = {
        "model": endpoint.model, "messages": messages, "temperature": temperature, "seed": seed,
        "max_tokens": most_tokens, "stream": False,
    }  # fmt: skip
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := _key(endpoint):
        headers["Authorization"] = f"Bearer {key}"
    url = endpoint.url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    reason = ""
    for attempt in range(endpoint.tries):
        if attempt:
            time.sleep(endpoint.pause * 2 ** (attempt - 1))
        try:
            return _text(_read(request, endpoint.timeout))
        except urllib.error.HTTPError as fault:
            # the body is left unread: it may repeat the key
            fault.close()
            reason = f"HTTP {fault.code} {http.client.responses.get(fault.code, '')}".strip()
            if fault.code < 500 and fault.code not in (408, 425, 429):
                break
        except TimeoutError:
            reason = f"no answer in {endpoint.timeout:g} s"
        except urllib.error.URLError as fault:
            late = isinstance(fault.reason, TimeoutError)
            cause = getattr(fault.reason, "strerror", None) or fault.reason
            reason = f"no answer in {endpoint.timeout:g} s" if late else f"no connection ({cause})"
        except (OSError, http.client.HTTPException, UnicodeError):
            reason = "the connection broke"
        except _Unusable as fault:
            reason = str(fault)
    raise NoAnswer(f"{endpoint.host}: {reason}")


def json_answer(text: str) -> dict[str, Any]:
    """Returns the JSON object that an answer consists of, alone or in one code fence.

    Raises ValueError, with the reason in a few words, for anything else: prose, broken JSON, a list, deep nesting.
    """
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise ValueError("the answer is no JSON") from None
    if not isinstance(value, dict):
        raise ValueError("the answer is no JSON object")
    return value


def plain_line(value: Any, most: int) -> str | None:
    """Returns a text of an answer with single spaces; None for other values, control characters, and longer texts."""
    line = " ".join(value.split()) if isinstance(value, str) and len(value) <= 4 * most else ""
    return line if line and len(line) <= most and line.isprintable() else None


class _Unusable(Exception):
    pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects unfollowed, since urllib would send the key along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read(request: urllib.request.Request, timeout: float) -> bytes:
    handlers: list[Any] = [_NoRedirect]
    if urlsplit(request.full_url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    end, data = time.monotonic() + timeout, b""
    with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
        # piece by piece: an endpoint that sends a byte now and then is late too
        while piece := answer.read1(1 << 16):
            data += piece
            if len(data) > MOST_BYTES:
                raise _Unusable(f"the answer is longer than {MOST_BYTES >> 20} MiB")
            if time.monotonic() > end:
                raise TimeoutError
    return data


def _text(data: bytes) -> str:
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Unusable("the answer is no chat completion") from None
    text = text.rpartition("</think>")[2].strip() if isinstance(text, str) else ""
    if not text:
        raise _Unusable("the answer is empty")
    return text


def _key(endpoint: Endpoint) -> str:
    return os.environ.get(endpoint.key_variable, "").strip()
