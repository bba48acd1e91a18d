"""Where metrics go: the same names, steps and values everywhere, and nothing stays open."""

from __future__ import annotations

import gc
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from dvc.repo import Repo

from milan_pipe.config.training import SinkName
from milan_pipe.training.metrics import CURVES, cut_metrics, metric_files, read_metric
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


POINTS = {2: {"train/loss": 0.5, "train/lr": 0.25}, 4: {"train/loss": 0.25, "val/top1": 1.0}, 6: {"train/loss": 0.125}}
Points = dict[tuple[str, int], float]


def write(folder: Path, names: Sequence[SinkName], first_step: int, points: Mapping[int, Mapping[str, float]]) -> None:
    if first_step:
        cut_metrics(folder, first_step)
    with open_sinks(folder, names, first_step, {}) as sinks:
        for step, values in points.items():
            for sink in sinks:
                sink.point(step, values)


def in_files(folder: Path) -> Points:
    root = folder / CURVES
    return {
        (file.relative_to(root).with_suffix("").as_posix(), step): value
        for file in metric_files(root)
        for step, value, _ in read_metric(file).rows
    }


def of_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = [((tag, event.step), event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    assert len(dict(found)) == len(found), "two values of one step"
    return dict(found)


def of_wandb(folder: Path) -> Points:
    """The history of a run's offline files, which are records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: Points = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, at = file.read_bytes(), 7
        while at < len(data):
            _, length, kind = struct.unpack_from("<IHB", data, at)
            assert kind == 1, "a record that is not whole"
            record = Record.FromString(data[at + 7 : at + 7 + length])
            at += 7 + length
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    found[name, record.history.step.num] = json.loads(item.value_json)
    return found


def test_sinks_agree_on_names_steps_and_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an interruption: the point behind the checkpoint is measured again."""
    pytest.importorskip("wandb", reason="the extra `sinks` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run" / "metrics"
    expected = {(name, step): value for step, values in POINTS.items() for name, value in values.items()}
    write(folder, ("tensorboard", "wandb"), 0, POINTS | {8: {"train/loss": 1.0}})
    assert in_files(folder) == of_tensorboard(folder) == of_wandb(folder) == expected | {("train/loss", 8): 1.0}
    write(folder, ("tensorboard", "wandb"), 4, {6: POINTS[6], 8: {"train/loss": 2.0}})
    assert in_files(folder) == of_tensorboard(folder) == of_wandb(folder) == expected | {("train/loss", 8): 2.0}
    assert len({file.name for file in folder.glob("wandb/offline-run-*/run-*.wandb")}) == 1, "two runs, not one"
