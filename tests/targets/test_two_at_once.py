"""Several processes at one store: whoever loses is told in a line, and what is committed is whole."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.targets import header, random_blocks, source, write_store

from milan_pipe.errors import MilanError, StoreError
from milan_pipe.storage import SCRATCH, location_of
from milan_pipe.targets import manifest
from milan_pipe.targets.store import TargetStoreWriter, open_targets
from milan_pipe.targets.verify import verify_store

FORMATS = ["zarr", "webdataset"]
TRIALS = 12


@pytest.mark.parametrize("store_format", FORMATS)
def test_races_for_one_shard_commit_nothing_that_is_damaged(tmp_path: Path, store_format: str) -> None:
    """Three threads write the same shard at once, one more finishes the store; pauses are drawn by a seed."""
    head = header(format=store_format)
    blocks = random_blocks(head, 130)
    damaged: list[tuple[int, object]] = []
    unclear: list[BaseException] = []
    for trial in range(TRIALS):
        root = tmp_path / str(trial)
        TargetStoreWriter(root, head)

        def write(seed: int, root: Path = root) -> None:
            pause = random.Random(seed)
            time.sleep(pause.random() / 8)
            try:
                shard = TargetStoreWriter(root, head).open_shard("000000")
                try:
                    for block in blocks:
                        shard.append(block)
                    shard.commit(source(130))
                except BaseException:
                    shard.discard()
                    raise
            except MilanError:
                pass  # a race that was lost
            except BaseException as error:
                unclear.append(error)

        def finish(seed: int, root: Path = root) -> None:
            time.sleep(random.Random(seed).random() / 5)
            try:
                TargetStoreWriter(root, head).finish()
            except MilanError:
                pass  # nothing is committed yet
            except BaseException as error:
                unclear.append(error)

        threads = [threading.Thread(target=write, args=(10 * trial + number,)) for number in range(3)]
        threads.append(threading.Thread(target=finish, args=(10 * trial + 9,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        committed = manifest.committed_names(location_of(root))
        if committed and (found := [p for p in verify_store(root).problems if p.shard]):
            damaged.append((trial, found))
        shutil.rmtree(root)
    assert damaged == []
    assert unclear == []


@pytest.mark.parametrize("store_format", FORMATS)
@pytest.mark.parametrize("when", ["first block", "second block", "commit"])
def test_a_folder_that_was_made_anew_is_never_committed(tmp_path: Path, store_format: str, when: str) -> None:
    """zarr makes a folder that was removed anew: what is in it then lacks what was written before."""
    head = header(format=store_format)
    blocks = random_blocks(head, 130)
    shard = TargetStoreWriter(tmp_path, head).open_shard("000000")
    scratch = shard._scratch

    def remake(moment: str) -> None:
        if when == moment:
            shutil.rmtree(scratch)
            scratch.mkdir()
            (scratch / "zarr.json").write_text("{}")

    with pytest.raises(StoreError, match="removed"):  # noqa: PT012
        remake("first block")
        shard.append(blocks[0])
        remake("second block")
        shard.append(blocks[1])
        remake("commit")
        shard.commit(source(130))
    shard.discard()
    assert manifest.committed_names(location_of(tmp_path)) == ()
    assert not (tmp_path / "shards" / "000000").exists()


def test_unfinished_work_goes_in_one_step(tmp_path: Path) -> None:
    """An owner that writes meanwhile must fail: removed in place, its folder would be filled again."""
    location = location_of(tmp_path)
    scratch = location.scratch("000000")
    (scratch / "deep").mkdir()
    (scratch / "deep" / "file").write_bytes(b"1")
    seen: list[bool] = []
    remove = shutil.rmtree

    def watched(path: Path, **options: bool) -> None:
        seen.append(scratch.exists())
        remove(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", watched)
        location.clear_scratch("000000")
        location.write("000001/x", b"1")
        location.remove("000001")
    assert seen == [False, False]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", ["gone", "refused"])
def test_the_old_folder_stays_where_the_new_one_cannot_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    location = location_of(tmp_path)
    location.write("000000/file", b"committed")
    scratch = location.scratch("000000")
    (scratch / "file").write_bytes(b"new")
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if path.name == "000000" and target.name.startswith(SCRATCH):
            if reason == "gone":
                shutil.rmtree(scratch)
            else:
                os.chmod(tmp_path, 0o755)  # noqa: PTH101
                monkeypatch.setattr(Path, "rename", refuses)
        return moved

    def refuses(path: Path, target: Path) -> Path:
        if path == scratch:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(StoreError):
        location.publish(scratch, "000000")
    assert location.read("000000/file") == b"committed"


# --- a power cut --------------------------------------------------------------------------------------------------


def on_disk_before(order: list[tuple[str, str]], path: str, event: tuple[str, str]) -> bool:
    return ("flush", path) in order[: order.index(event)]


@pytest.mark.parametrize("store_format", FORMATS)
def test_data_is_on_the_disk_before_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_format: str
) -> None:
    """What was flushed when a name was given: a rename may survive a power cut that the data does not."""
    order: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def flushed(handle: int) -> None:
        fsync(handle)
        order.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))  # noqa: PTH115

    def named(kind: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def move(path: Path, target: Path) -> Path:
            inside = [str(file.relative_to(path)) for file in path.rglob("*")] if path.is_dir() else []
            moved = kind(path, target)
            order.append(("name", str(target)))
            moves[str(target)] = (str(path), inside)
            return moved

        return move

    moves: dict[str, tuple[str, list[str]]] = {}
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", named(rename))
    monkeypatch.setattr(Path, "replace", named(replace))
    write_store(tmp_path, header(format=store_format), [130])
    shard, record = str(tmp_path / "shards" / "000000"), str(tmp_path / "manifest" / "000000.json")
    scratch, inside = moves[shard]
    assert len(inside) >= 2
    for path in (scratch, *(f"{scratch}/{file}" for file in inside)):
        assert on_disk_before(order, path, ("name", shard)), path
    assert on_disk_before(order, str(tmp_path / "shards"), ("name", record)), "the shard's own name"
    assert on_disk_before(order, str(tmp_path), ("name", record)), "the name of their folder"
    assert on_disk_before(order, moves[record][0], ("name", record))
    after = order[order.index(("name", record)) :]
    assert ("flush", str(tmp_path / "manifest")) in after


@pytest.mark.parametrize("store_format", FORMATS)
def test_shards_that_a_power_cut_has_spoilt_are_done_again(tmp_path: Path, store_format: str) -> None:
    head = header(format=store_format, shards=5)
    write_store(tmp_path, head, [5] * 5)
    zeros = tmp_path / "manifest" / "000001.json"
    zeros.write_bytes(bytes(zeros.stat().st_size))
    shutil.rmtree(tmp_path / "shards" / "000002")
    largest = max(
        (tmp_path / "shards" / "000004").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    os.truncate(largest, 10)
    writer = TargetStoreWriter(tmp_path, head)
    with pytest.warns(RuntimeWarning, match="000001, 000002"):
        assert sorted(writer.committed(sizes=True)) == ["000000", "000003"]
    with pytest.raises(StoreError, match="4 of 5 shards"), pytest.warns(RuntimeWarning, match="000001"):
        writer.finish()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest" / "000003.json").write_bytes(b"")
    with pytest.raises(MilanError, match="--redo 000001,000003"):
        open_targets(tmp_path)
