"""What holds of every error message."""

from __future__ import annotations

import pytest


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which is one short line without debug text or markup."""
    text = str(caught.value)
    assert "\n" not in text
    assert "Debug" not in text
    assert "<" not in text
    assert len(text) < 400
    return text
