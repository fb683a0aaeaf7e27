"""A local OpenAI-compatible endpoint that answers as a test tells it to."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


HANG = object()
"""An answer that comes only after the test."""


def chat(content):
    """Returns the bytes of a chat completion."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


@contextmanager
def answering(answer: Callable[[Request, int], Any]) -> Iterator[tuple[str, list[Request]]]:
    """Serves until the context ends; gives (base URL, requests so far).

    answer: (request, its number) -> text of a chat completion, an HTTP status, whole bytes, a list of bytes that are
    sent one by one with pauses, a dict of headers of a redirect, or `HANG`.
    """
    requests: list[Request] = []
    over, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(requests)
                requests.append(Request(self.path, dict(self.headers), body))
            value = answer(requests[number], number)
            if value is HANG:
                over.wait(30)
            elif isinstance(value, int):
                self.reply(value, {}, b"the key was " + self.headers.get("Authorization", "").encode())
            elif isinstance(value, dict):
                self.reply(302, value, b"")
            else:
                self.reply(200, {}, value if isinstance(value, bytes | list) else chat(value))

        def reply(self, status, headers, data):
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.end_headers()
            try:
                for piece in data if isinstance(data, list) else [data]:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    if isinstance(data, list):
                        time.sleep(0.05)
            except OSError:
                pass  # the other side has heard enough

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
