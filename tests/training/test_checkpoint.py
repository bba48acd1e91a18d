"""Checkpoints: what was saved is what is opened, and half a checkpoint is none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import processes
from support.checkpoints import change_record
from torch import Tensor

from milan_pipe.digests import with_digest
from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError
from milan_pipe.training.checkpoint import (
    checkpoint_path,
    checkpoints_of,
    keep_last,
    open_checkpoint,
    require_same_configuration,
    save_checkpoint,
)


def weights(value: float = 1.0) -> dict[str, Tensor]:
    return {"a.weight": torch.full((2, 3), value), "b": torch.arange(4, dtype=torch.int64)}


def save(run: Path, step: int = 7, value: float = 1.0) -> Path:
    return save_checkpoint(run, step, {"student": weights(value)}, {"student": {"depth": 2}})


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("by", ["run", "checkpoints", "folder"])
def test_what_is_saved_is_opened(tmp_path: Path, by: str) -> None:
    folder = save(tmp_path)
    named = {"run": tmp_path, "checkpoints": tmp_path / "checkpoints", "folder": folder}[by]
    opened = open_checkpoint(named)
    assert opened.path == folder
    assert dict(opened.record) == {"version": 1, "step": 7, "student": {"depth": 2}}
    found = opened.weights("student")
    assert found.keys() == weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights().items())
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "student.safetensors"]


def test_tensors_that_are_not_contiguous_or_need_gradients_are_saved(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    folder = save_checkpoint(tmp_path, 1, {"student": {"w": turned}}, {})
    assert torch.equal(open_checkpoint(folder).weights("student")["w"], turned.detach())


def test_a_run_opens_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        save(tmp_path, step)
    assert open_checkpoint(tmp_path).record["step"] == 100
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000009", "step-00000020", "step-00000100"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, value=1.0)
    folder = save(tmp_path, value=2.0)
    assert open_checkpoint(folder).weights("student")["a.weight"][0, 0] == 2.0


def test_what_an_interrupted_write_left_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / f".partial-step-00000002-{0:032x}"
    half.mkdir()
    (half / "student.safetensors").write_text("half")
    assert open_checkpoint(tmp_path).record["step"] == 1
    save(tmp_path, 3, value=3.0)
    assert open_checkpoint(tmp_path).weights("student")["a.weight"][0, 0] == 3.0
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 2, {"student": weights()}, {"student": object()})
    assert names(tmp_path) == ["step-00000001"]


FULL_DISK = """
import sys
from pathlib import Path
import torch
from milan_pipe.errors import StoreError
from milan_pipe.training.checkpoint import open_checkpoint, save_checkpoint

run, megabyte = Path(sys.argv[1]), {"w": torch.zeros(2**18)}
save_checkpoint(run, 1, {"student": megabyte}, {})
for _ in range(2):
    try:
        save_checkpoint(run, 2, {"student": megabyte, "optimizer": megabyte}, {})
    except StoreError as error:
        print(error)
    print(*sorted(path.name for path in (run / "checkpoints").iterdir()))
half = run / "checkpoints" / f".partial-step-00000002-{0:032x}"
half.mkdir()
(half / "student.safetensors").write_bytes(bytes(1_000_000))
save_checkpoint(run, 3, {"student": megabyte}, {})
print(open_checkpoint(run).weights("student")["w"].shape)
"""


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=2500k none {tmp_path}"
    # In a name space of its own, so that nothing else sees the disk and it goes with the process.
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    words = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *attempts, last = done.stdout.splitlines()
    assert re.fullmatch(r"checkpoint \S+/step-00000002 cannot be written: .*No space left.*", attempts[0])
    assert attempts == [attempts[0], "step-00000001"] * 2
    assert last == "torch.Size([262144])"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        save(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\xff"], ids=["empty", "cut", "list", "no version", "bytes"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path)
    (folder / "checkpoint.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"checkpoint\.json is damaged"):
        open_checkpoint(tmp_path)


def test_a_run_whose_last_checkpoint_lost_its_record_does_not_fall_back_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "checkpoint.json").unlink()
    with pytest.raises(DataError, match="step-00000002"):
        open_checkpoint(tmp_path)


def test_another_version_is_refused_with_both(tmp_path: Path) -> None:
    folder = save(tmp_path)
    change_record(folder, lambda record: record.update(version=99))
    with pytest.raises(MismatchError, match=r"version 99.* 1"):
        open_checkpoint(folder)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path))
    with pytest.raises(MissingError, match=r"decoder\.safetensors"):
        opened.weights("decoder")


@pytest.mark.parametrize("keep", [0, 4, -5])
def test_a_cut_file_is_named(tmp_path: Path, keep: int) -> None:
    folder = save(tmp_path)
    file = folder / "student.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"student\.safetensors is damaged"):
        open_checkpoint(folder).weights("student")


def test_a_missing_folder_differs_from_one_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not there"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="has no checkpoint"):
        open_checkpoint(tmp_path)
    assert checkpoints_of(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["student", "optimizer"])
def test_a_flipped_bit_is_found_and_an_earlier_checkpoint_named(tmp_path: Path, name: str) -> None:
    parts = {"student": weights(), "optimizer": weights(2.0)}
    earlier, folder = (save_checkpoint(tmp_path, step, parts, {}) for step in (5, 7))
    file = folder / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)
    record = json.loads((folder / "checkpoint.json").read_text())
    expected = record["files"][file.name]["sha256"]
    with pytest.raises(DataError, match=rf"{expected}.*{earlier}"):
        open_checkpoint(tmp_path).weights(name)
    assert open_checkpoint(earlier).weights(name)["b"][3] == 3


@pytest.mark.parametrize(("old", "new"), [('"step": 7', '"step": 3'), ("0.125", "0.625"), ('"sha256"', '"sha257"')])
def test_a_changed_record_is_found(tmp_path: Path, old: str, new: str) -> None:
    folder = save_checkpoint(tmp_path, 7, {"student": weights()}, {"losses": {"sum": 0.125}, "names": ("a", {1: "ü"})})
    assert open_checkpoint(folder).record["losses"] == {"sum": 0.125}
    file = folder / "checkpoint.json"
    text = file.read_text()
    assert old in text
    file.write_text(new.join(text.rsplit(old, 1)))
    with pytest.raises(DataError, match="digest"):
        open_checkpoint(folder)


def test_a_checkpoint_from_before_there_were_digests_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "checkpoint.json").write_text(json.dumps({"version": 1, "step": 7, "student": {"depth": 2}}))
    opened = open_checkpoint(tmp_path)
    assert dict(opened.record) == {"version": 1, "step": 7, "student": {"depth": 2}}
    assert opened.weights("student")["b"][3] == 3


@pytest.mark.parametrize(
    ("section", "name", "before", "since"),
    [("segment", "over_all_pixels", False, True), ("targets", "views", {"renderer": "pillow"}, {"renderer": "torch"})],
)
def test_a_run_from_before_a_choice_goes_on_as_it_was(
    tmp_path: Path, section: str, name: str, before: object, since: object
) -> None:
    former = {section: {"steps": 3}}
    save_checkpoint(tmp_path, 7, {"student": weights()}, {"configuration": former, "finished": False})
    opened = open_checkpoint(tmp_path)
    require_same_configuration(opened, former, tmp_path)
    require_same_configuration(opened, {section: {"steps": 3, name: before}}, tmp_path)
    with pytest.raises(MismatchError, match=f"{section}.{name}"):
        require_same_configuration(opened, {section: {"steps": 3, name: since}}, tmp_path)


def test_what_earlier_versions_did_not_say_is_not_compared(tmp_path: Path) -> None:
    said = {"targets": {"samples": "a", "views_sha256": "b"}, "data": {"train": "c", "train_sizes": "d"}}
    former = {"targets": {"samples": "a"}, "data": {"train": "c"}}
    for run, configuration in (("old", former), ("new", said)):
        save_checkpoint(tmp_path / run, 7, {"student": weights()}, {"configuration": configuration, "finished": False})
        require_same_configuration(open_checkpoint(tmp_path / run), said, tmp_path / run)
    with pytest.raises(MismatchError, match=r"data\.train_sizes: .*; targets\.views_sha256: "):
        require_same_configuration(open_checkpoint(tmp_path / "new"), former, tmp_path / "new")


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(checkpoint_path(tmp_path, 800))
    for where in (tmp_path, checkpoint_path(tmp_path, 800)):
        with pytest.raises(DataError, match=r"holds the checkpoint of another step, 1; rename it to step-00000001$"):
            open_checkpoint(where)


def test_a_run_goes_on_with_its_store_converted(tmp_path: Path) -> None:
    header = {"schema_version": 2, "codec": {"name": "int8", "zstd_level": 1}, "teacher": {"model": "demo"}}
    save_checkpoint(tmp_path, 7, {"student": weights()}, {"configuration": {"targets": header}, "finished": False})
    converted = {"schema_version": 3, "codec": {"name": "int8", "zstd_level": 0}}
    teacher = {"model": "demo", "license": "mit", "source": "hf-hub:org/name"}
    require_same_configuration(open_checkpoint(tmp_path), {"targets": converted | {"teacher": teacher}}, tmp_path)
    other = {"targets": converted | {"teacher": {"model": "other"}}}
    with pytest.raises(MismatchError, match=r"targets\.teacher\.model"):
        require_same_configuration(open_checkpoint(tmp_path), other, tmp_path)


def test_copies_and_other_folders_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    mine = ["step-00000100-best", "step-best", "step-00000100.old", "step-7", "step-000000100", "best", "step-"]
    for name in mine:
        save(tmp_path, 1).rename(tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / ".partial-step-00000100-best").mkdir()
    with pytest.raises(MissingError, match="has no checkpoint"):
        open_checkpoint(tmp_path)
    for step in (99_999_999, 100, 100_000_000):
        save(tmp_path, step)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-00000100", "step-99999999", "step-100000000"]
    assert open_checkpoint(tmp_path).record["step"] == 100_000_000
    assert open_checkpoint(tmp_path / "checkpoints").record["step"] == 100_000_000
    keep_last(tmp_path, 1)
    assert names(tmp_path) == sorted([*mine, ".partial-step-00000100-best", "step-100000000"])
    assert open_checkpoint(tmp_path / "checkpoints" / "step-best").record["step"] == 1


OUT_OF_FILES = """
import resource, sys
from contextlib import suppress
from pathlib import Path
from milan_pipe.errors import StoreError
from milan_pipe.training.checkpoint import open_checkpoint
opened = open_checkpoint(sys.argv[1])
opened.weights("student")
files = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with suppress(OSError):
    while True:
        files.append(open("/dev/null"))
# One file may be opened, and safetensors opens two.
for left in (0, 1):
    for read in (lambda: opened.weights("student"), lambda: open_checkpoint(sys.argv[1])):
        try:
            read()
        except StoreError as error:
            print(error)
    files.pop().close()
"""


def test_too_many_open_files_are_not_damage(tmp_path: Path) -> None:
    folder = save(tmp_path)
    done = processes.run([sys.executable, "-c", OUT_OF_FILES, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("cannot be read: too many open files" in line and "ulimit -n" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "7"),
        ("step", -1),
        ("task", 5),
        ("finished", "yes"),
        ("student", [1]),
        ("teacher", {"model": "a"}),
        ("settings", {"decoder": 5}),
        ("configuration", {"targets": {"views": 1}}),
        ("others", [{"targets": "t"}]),
        ("command", None),
    ],
)
def test_a_record_of_another_form_is_one_error_though_its_digest_fits(tmp_path: Path, name: str, value: object) -> None:
    folder = save(tmp_path)
    change_record(folder, lambda record: record.update({name: value}))
    with pytest.raises(DataError, match=rf"checkpoint\.json was not written by milan-pipe: {name}"):
        open_checkpoint(folder)


def test_a_configuration_of_endless_names_is_one_short_error(tmp_path: Path) -> None:
    inner = {str(number): 0 for number in range(1000)}
    save_checkpoint(tmp_path, 1, {"student": weights()}, {"configuration": {"x" * 100_000: inner}})
    with pytest.raises(DataError, match="has no configuration of milan-pipe: a name of 100000 characters"):
        require_same_configuration(open_checkpoint(tmp_path), {}, tmp_path)
    save_checkpoint(tmp_path, 2, {"student": weights()}, {"configuration": {"x": inner, "y": "z" * 10**6}})
    with pytest.raises(MismatchError, match=r"x\.0: the run has 0, .* and 981 more\. Use") as refused:
        require_same_configuration(open_checkpoint(tmp_path), {}, tmp_path)
    assert len(str(refused.value)) < 3000


def test_a_record_that_is_nested_deep_is_one_error_though_its_digest_fits(tmp_path: Path) -> None:
    folder = save(tmp_path)
    change_record(folder, lambda record: record.update(zz=json.loads("[" * 40 + "]" * 40)))
    open_checkpoint(folder)
    change_record(folder, lambda record: record.update(zz=json.loads("[" * 400 + "]" * 400)))
    with pytest.raises(DataError, match=r"checkpoint\.json is damaged \(RecursionError\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("files", [5, [], {"student.safetensors": 5}, {"student.safetensors": {"bytes": 3}}])
def test_files_of_another_form_are_one_error_though_the_digest_fits(tmp_path: Path, files: object) -> None:
    record = json.loads((save(tmp_path) / "checkpoint.json").read_text())
    del record["sha256"]
    (save(tmp_path) / "checkpoint.json").write_text(json.dumps(with_digest(record | {"files": files})))
    with pytest.raises(DataError, match=r"was not written by milan-pipe: files"):
        open_checkpoint(tmp_path)
