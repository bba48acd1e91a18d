"""What holds of every error message, and the check that the tables of messages share."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

# How to provoke an error, its type, and its whole message, in which `...` stands for anything.
Case = tuple[Callable[[], object], type[Exception], str]


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which is one short line without debug text or markup."""
    text = str(caught.value)
    assert "\n" not in text
    assert "Debug" not in text
    assert "<" not in text
    assert len(text) < 400
    return text


def require_message(case: Case) -> None:
    """Provoke the error: it is of this type and no subclass, and says this."""
    provoke, kind, expected = case
    with pytest.raises(kind) as caught:
        provoke()
    assert caught.type is kind
    text = one_line(caught)
    assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".+"), text), text
