"""The functions that the package offers by name, also after its modules have been imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import milan_pipe


def test_names_are_functions_after_everything_is_imported() -> None:
    import milan_pipe.api
    import milan_pipe.cli
    import milan_pipe.evaluation.frozen
    import milan_pipe.pretraining

    for name in milan_pipe.__all__:
        assert callable(getattr(milan_pipe, name)), name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = milan_pipe.nonsense


def test_import_is_light() -> None:
    code = "import sys, milan_pipe, milan_pipe.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
