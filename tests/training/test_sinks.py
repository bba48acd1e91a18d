"""Where metrics go: nothing stays open."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
from dvc.repo import Repo

from milan_pipe.training.sinks import open_sinks


def test_a_run_in_a_dvc_project_leaves_no_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Repo.init(str(tmp_path), no_scm=True).close()
    opened = []
    # The databases of a repository that is garbage are closed when Python looks for cycles, whenever that is.
    gc.collect()
    gc.disable()
    try:
        for number in range(3):
            with open_sinks(tmp_path / str(number), [], 0, {}) as sinks:
                sinks[0].point(1, {"loss": 0.5})
            opened.append(psutil.Process().num_fds())
    finally:
        gc.enable()
    assert opened[0] == opened[2]
