"""The power goes, and with it whatever was not flushed: what a record says is there, and the same command goes on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.counts import Counted
from support.extraction import command, every_file
from support.power import Power
from support.project import SETTINGS
from support.targets import header, write_store
from support.training import pretrain_command, same_run

from milan_pipe.config.images import PrepareSettings
from milan_pipe.images.prepare import prepare
from milan_pipe.training.checkpoint import checkpoints_of, open_checkpoint

LONGEST = 0.25


@pytest.fixture
def power(tmp_path: Path) -> Power:
    return Power(tmp_path / "power")


@pytest.mark.parametrize("flush", [True, False])
def test_what_was_not_flushed_is_gone(power: Power, tmp_path: Path, flush: bool) -> None:
    root = tmp_path / "disk"
    (root / "a").mkdir(parents=True)
    (root / "a" / "old").write_text("old")
    power.keep(root)
    code = (
        "import os, sys, pathlib\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "(root / 'new').write_text('new'); (root / 'a' / 'old').rename(root / 'a' / 'moved')\n"
        "for path in map(pathlib.Path, sys.argv[2:]):\n"
        "    handle = os.open(path, os.O_RDONLY); os.fsync(handle); os.close(handle)\n"
    )
    flushed = [str(root / "new"), str(root), str(root / "a")] if flush else []
    subprocess.run([sys.executable, "-c", code, str(root), *flushed], env=power.environment, check=True)
    power.cut(root)
    expected = {"new": b"new", "a/moved": b"old"} if flush else {"a/old": b"old"}
    assert every_file(root) == expected


DONE = """
import sys
from pathlib import Path
from milan_pipe import api
from milan_pipe.config.params import load_params

def done():
    print("done", flush=True)
    sys.stdin.readline()

disk = Path(sys.argv[1])
params = load_params(None, sys.argv[2:])
api.prepare("demo", disk / "images", params)
done()
images = (str(disk / "images" / "train-*.tar"), str(disk / "images" / "test-*.tar"))
api.extract_targets(images[0], disk / "targets", params)
done()
api.convert_targets(disk / "targets", disk / "tars", format="webdataset")
done()
api.pretrain(disk / "targets", disk / "run", params)
done()
api.export(disk / "run", disk / "student")
done()
for kind in ("parquet", "zarr"):
    api.embed(disk / "run", images[1], disk / kind, load_params(None, [*sys.argv[2:], f"embed.format={kind}"]))
    done()
api.knn(disk / "run", *images, params, keep=disk / "run")
done()
"""


@pytest.mark.slow
def test_what_is_done_is_on_the_disk(power: Power, tmp_path: Path, counted: Counted) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    power.keep(disk)
    words, cuts = [sys.executable, "-c", DONE, str(disk), *SETTINGS], 0
    with subprocess.Popen(words, env=power.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line != b"done\n":
                continue
            before = every_file(disk)
            for rng in (None, random.Random(cuts), random.Random(cuts + 1)):
                found = every_file(power.after_cut(disk, tmp_path / str(cuts), rng))
                assert [path for path in before if found.get(path) != before[path]] == []
                # A lock whose process is gone is taken over.
                assert found.keys() - {"run/.lock"} == before.keys()
                shutil.rmtree(tmp_path / str(cuts))
                cuts += 1
            process.stdin.write(b"\n")
            process.stdin.flush()
    assert (process.returncode, cuts) == (0, 24)
    counted("power cut after each of 8 commands", cuts, "every file as it was")


def cuts(words: list[str], disk: Path, power: Power, count: int, far_enough: Callable[[], bool]) -> Iterator[None]:
    """Run a command until the power goes, `count` times; then until it ends. The state of the disk is drawn."""
    rng = random.Random(count)
    disk.mkdir()
    power.keep(disk)
    begin: dict[str, Any] = {"cwd": disk.parent, "env": {**power.environment, "OMP_NUM_THREADS": "1"}}
    begin |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    for number in range(count):
        with subprocess.Popen(words, **begin) as process:
            try:
                while process.poll() is None and not far_enough():
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, LONGEST))
                assert process.poll() is None, process.communicate()[1]
            finally:
                process.kill()
        # On every third disk is nothing but what was flushed.
        power.cut(disk, rng if number % 3 else None)
        yield
    subprocess.run(words, **begin, check=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_extraction_goes_on_after_power_cuts(power: Power, tmp_path: Path, counted: Counted) -> None:
    count = 20
    images, targets = tmp_path / "images", tmp_path / "disk" / "targets"
    prepare("demo", images, PrepareSettings(train_scenes=600, test_scenes=0, samples_per_shard=4), workers=1)
    subprocess.run(command(images, tmp_path / "whole"), check=True, capture_output=True, cwd=tmp_path)
    whole = every_file(tmp_path / "whole")
    committed = [0]

    def records() -> int:
        return len(list(targets.glob("manifest/*.json")))

    for _ in cuts(command(images, targets), targets.parent, power, count, lambda: records() > committed[-1]):
        found = {path: data for path, data in every_file(targets).items() if "/.partial" not in f"/{path}"}
        assert [path for path in found if found[path] != whole[path]] == []
        for record in (path for path in found if path.startswith("manifest/")):
            shard = f"shards/{Path(record).stem}"
            assert {path for path in found if path.startswith(shard)} == {p for p in whole if p.startswith(shard)}
        committed.append(records())
    print("shards committed at each cut:", *committed[1:])
    assert every_file(targets) == whole
    counted(
        "power cut during extract-targets", count, "committed shards whole; in the end the bytes of an unbroken run"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pretraining_goes_on_after_power_cuts(power: Power, tmp_path: Path, counted: Counted) -> None:
    count, head = 20, header(shards=1)
    write_store(tmp_path / "targets", head, [100])
    run = tmp_path / "disk" / "run"
    words = pretrain_command(tmp_path / "targets", head, run, 10 * count, "pretrain.log_every=2")
    subprocess.run(
        pretrain_command(tmp_path / "targets", head, tmp_path / "whole", 10 * count, "pretrain.log_every=2"),
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    before: list[Path] = []

    def one_more() -> bool:
        return len(set(checkpoints_of(run)) - set(before)) > 0

    for _ in cuts(words, run.parent, power, count, one_more):
        now = checkpoints_of(run)
        # The one before is not removed until the next one is on the disk.
        assert not before or now[-1] >= before[-1]
        for checkpoint in now:
            opened = open_checkpoint(checkpoint)
            assert all(opened.weights(name) for name in ("student", "decoder", "optimizer"))
        before[:] = now
    assert same_run(run, tmp_path / "whole")
    counted(
        "power cut during pretrain",
        count,
        "the last checkpoint whole; in the end losses and weights of an unbroken run",
    )
