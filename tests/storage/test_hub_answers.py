"""What a hub answers is anyone's: an answer of another form is one error, and a path leads nowhere else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub.utils import _http as hub_http

from milan_pipe.errors import StoreError
from milan_pipe.storage.hub import HubFolder

FILE = {"type": "file", "oid": "a" * 40, "size": 123, "path": "data/a.tar"}
INFO = {"id": "a/b", "sha": "f" * 40, "siblings": [], "tags": []}


@pytest.fixture
def answers() -> Iterator[dict[str, Any]]:
    """What the hub says, by the client of huggingface_hub without a network below it."""
    client = getattr(hub_http, "httpx2", None) or hub_http.httpx
    said: dict[str, Any] = {"tree": [FILE], "info": INFO}

    def answer(request: Any) -> Any:
        text = said["tree" if "/tree/" in request.url.path else "info"]
        return client.Response(200, text=text if isinstance(text, str) else json.dumps(text))

    hub_http.set_client_factory(lambda: client.Client(transport=client.MockTransport(answer)))
    yield said
    hub_http.set_client_factory(hub_http.default_client_factory)


def test_a_good_answer_is_a_listing(answers: dict[str, Any]) -> None:
    assert answers
    assert HubFolder("hf://datasets/a/b/data").sizes() == {"a.tar": 123}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("info", 5),
        ("info", "[" * 100_000),
        ("info", {"sha": "f" * 40}),
        ("info", INFO | {"sha": None}),
        ("info", INFO | {"sha": "../../../models/x"}),
        ("tree", 5),
        ("tree", {"error": "busy"}),
        ("tree", [5]),
        ("tree", [{"type": "file", "path": "data/a.tar"}]),
        ("tree", [FILE | {"path": 7}, FILE]),
        ("tree", [FILE | {"size": "much"}]),
        ("tree", [FILE | {"path": "data/../../a.tar"}]),
        ("tree", [FILE | {"path": "/etc/a.tar"}]),
    ],
)
def test_an_answer_of_another_form_is_one_error(answers: dict[str, Any], name: str, text: Any) -> None:
    answers[name] = text
    with pytest.raises(StoreError, match=r"no such thing .*try again, or update huggingface_hub"):
        HubFolder("hf://datasets/a/b/data").sizes()


def test_a_list_that_is_refused_is_not_asked_on(answers: dict[str, Any]) -> None:
    answers["tree"] = [FILE | {"path": 7}, *[FILE] * 5_000]
    with pytest.raises(StoreError):
        HubFolder("hf://datasets/a/b/data").sizes()
    for thread in threading.enumerate():
        if thread.name == "hub":
            thread.join(30)
            assert not thread.is_alive()


def test_what_an_answer_has_twice_is_there_once(answers: dict[str, Any]) -> None:
    answers["tree"] = [FILE, FILE | {"type": "directory"}, FILE]
    assert HubFolder("hf://datasets/a/b/data").sizes() == {"a.tar": 123}
