"""A language model's endpoint: what is sent, what is read of hostile answers, when it is asked again."""

import json
import time

import pytest
from answering import HANG, answering, chat

from fmda.errors import UserError
from fmda.methods.endpoint import Endpoint, NoAnswer, ask, check_endpoint, json_answer, plain_line

HELLO = [{"role": "user", "content": "hello"}]


def asked(answer, **changes):
    """Returns (answer or NoAnswer, requests) of one question."""
    with answering(answer) as (url, requests):
        endpoint = Endpoint(url, "small", **{"timeout": 5.0, "pause": 0.0, **changes})
        try:
            return ask(endpoint, HELLO, temperature=0.5, seed=7, most_tokens=90), requests
        except NoAnswer as fault:
            return fault, requests


@pytest.fixture(autouse=True)
def proxy(monkeypatch):
    """A proxy that is not there: no question to this machine goes through it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")


def test_a_question_holds_model_messages_and_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    text, (request,) = asked(lambda request, number: " fine ", key_variable="MY_KEY")
    assert text == "fine" and request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == "Bearer sk-secret"
    assert request.body == {
        "model": "small", "messages": HELLO, "temperature": 0.5, "seed": 7, "max_tokens": 90, "stream": False,
    }  # fmt: skip
    monkeypatch.delenv("MY_KEY")
    _, (request,) = asked(lambda request, number: "fine", key_variable="MY_KEY")
    assert "Authorization" not in request.headers


def test_thoughts_are_no_part_of_the_answer():
    assert asked(lambda request, number: "<think>not </think> that</think>\nthis")[0] == "this"


@pytest.mark.parametrize(
    "first", [500, 503, 429, b"", b"{}", b"\xff", chat(None), chat("  "), chat(["x"]), b"[" * 9999]
)
def test_what_may_pass_is_asked_again(first):
    text, requests = asked(lambda request, number: "fine" if number else first)
    assert text == "fine" and len(requests) == 2


@pytest.mark.parametrize(
    ("answer", "changes", "tries", "why"),
    [
        (500, {}, 3, "HTTP 500 Internal Server Error"),
        (401, {}, 1, "HTTP 401 Unauthorized"),
        (HANG, {"timeout": 0.1, "tries": 2}, 2, "no answer in 0.1 s"),
        ([b" "] * 60, {"timeout": 0.2, "tries": 1}, 1, "no answer in 0.2 s"),
        (chat("x" * 10_000_000), {"tries": 2}, 2, "the answer is longer than 1 MiB"),
        (chat(""), {}, 3, "the answer is empty"),
        (b"hello", {}, 3, "the answer is no chat completion"),
        ({"Location": "http://127.0.0.1:1/v1"}, {}, 1, "HTTP 302 Found"),
    ],
)
def test_an_endpoint_that_fails_is_one_reason_without_the_key(monkeypatch, answer, changes, tries, why):
    monkeypatch.setenv("FMDA_ENDPOINT_KEY", "sk-secret")
    fault, requests = asked(lambda request, number: answer, **changes)
    assert len(requests) == tries and isinstance(fault, NoAnswer)
    host, _, reason = str(fault).partition(": ")
    assert reason == why and host.startswith("127.0.0.1:") and "secret" not in str(fault)


def test_no_connection_is_tried_with_growing_pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(NoAnswer, match=r"^127.0.0.1:1: no connection \(Connection refused\)$"):
        ask(Endpoint("http://127.0.0.1:1", "m", tries=4, pause=0.5), HELLO, temperature=0, seed=0, most_tokens=1)
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"url": "file:///etc/passwd"}, "judge.url: 'file:///etc/passwd' is no http"),
        ({"url": "localhost:8000"}, "judge.url: 'localhost:8000' is no http"),
        ({"url": "http://host:port/"}, "judge.url: .* is no http"),
        ({"url": "http://me:secret@host/v1"}, "judge.url: holds credentials or a query"),
        ({"url": "http://host/v1?key=secret"}, "judge.url: holds credentials or a query"),
        ({"model": ""}, "judge.model: is empty"),
        ({"key_variable": "sk-secret"}, "judge.key_variable: is no name"),
        ({"key_variable": "BAD_KEY"}, "BAD_KEY: the key holds control characters"),
    ],
)
def test_settings_that_cannot_work_are_refused_and_no_secret_repeated(monkeypatch, changes, fault):
    monkeypatch.setenv("BAD_KEY", "secret\nX-Other: 1")
    with pytest.raises(UserError, match=fault) as caught:
        check_endpoint(Endpoint(**{"url": "http://host/v1", "model": "m", **changes}), "judge")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"a": 1}', ' \n{"a": 1} ', '```json\n{"a": 1}\n```', '```\n{"a": 1}```\n'])
def test_an_object_alone_or_in_one_fence_is_an_answer(text):
    assert json_answer(text) == {"a": 1}


@pytest.mark.parametrize(
    "text",
    ["Sure! Here it is: {}", '{"a": 1', "", "[1]", "3", '{"a": 1} {"b": 2}', "[" * 100_000, "9" * 9999, "{'a': 1}"],
)
def test_anything_else_is_none(text):
    with pytest.raises(ValueError, match="^the answer is no JSON"):
        json_answer(text)


def test_lines_of_an_answer_are_bounded_and_printable():
    assert plain_line(" a \n\t bus ", 5) == "a bus"
    bad = ["", "  ", "a long bus", "a\x00b", "a\u202eb", json.loads('"\\ud800"'), "x" * 10_000_000, 3, None, ["a"]]
    assert [plain_line(value, 5) for value in bad] == [None] * len(bad)
