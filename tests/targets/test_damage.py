"""Whatever happens to a file of a store, `verify-targets` finds it, and a reader refuses or gives what was written."""

from __future__ import annotations

import random
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.counts import Counted
from support.targets import (
    check_store,
    differences,
    header,
    joined,
    random_blocks,
    tree,
    write_blocks,
    write_store,
    wrong_values,
)
from support.training import same_run, small_params

from milan_pipe.errors import DataError, MilanError
from milan_pipe.pretraining.run import pretrain
from milan_pipe.storage import location_of
from milan_pipe.targets.schema import ViewRun
from milan_pipe.targets.store import open_targets
from milan_pipe.targets.verify import Problem, verify_store

SIZES = (130, 5)
KINDS = [
    (store_format, codec, level)
    for store_format in ("zarr", "webdataset")
    for codec, level in (("int8", 1), ("int8", 0), ("float16", 1), ("float16", 0), ("klt", 1), ("klt", 0))
]
# Of each format every kind of code, with compression and without.
FEW_KINDS = [kind for kind in KINDS if kind[1:] in (("int8", 1), ("float16", 0), ("klt", 1))]


@dataclass(frozen=True, repr=False)
class Store:
    """A store, its bytes, what was written into it, and its files by kind: paths that differ in numbers alone."""

    root: Path | str
    files: Mapping[str, bytes]
    truth: Mapping[str, Sequence[ViewRun]]

    @property
    def kinds(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self.files:
            found.setdefault(re.sub(r"\d+", "N", path), []).append(path)
        return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Store]:
    made = {}
    for store_format, codec, level in KINDS:
        root = tmp_path_factory.mktemp(f"{store_format}-{codec}-{level}") / "t"
        head = header(codec, format=store_format, zstd_level=level, shards=len(SIZES), width=8)
        written = write_store(root, head, SIZES)
        truth = {name: [joined(blocks, view) for view in range(2)] for name, blocks in written.items()}
        made[store_format, codec, level] = Store(root, tree(root), truth)
    return made


# --- damage -------------------------------------------------------------------------------------------------------


def flipped(data: bytes, draw: st.DataObject) -> bytes:
    position = draw.draw(st.integers(0, len(data) - 1), "position")
    changed = bytearray(data)
    changed[position] ^= draw.draw(st.integers(1, 255), "bits")
    return bytes(changed)


def cut(data: bytes, draw: st.DataObject) -> bytes:
    return data[: draw.draw(st.integers(0, len(data) - 1), "size")]


def lengthened(data: bytes, draw: st.DataObject) -> bytes:
    return data + draw.draw(st.sampled_from([b"\0", b"\n", b" ", data]), "more")


def zeroed(data: bytes, draw: st.DataObject) -> bytes:
    start = draw.draw(st.integers(0, len(data) - 1), "start")
    stop = draw.draw(st.integers(start + 1, len(data)), "stop")
    return data[:start] + bytes(stop - start) + data[stop:]


def without_middle(data: bytes, draw: st.DataObject) -> bytes:
    start = draw.draw(st.integers(0, len(data) - 1), "start")
    stop = draw.draw(st.integers(start + 1, len(data)), "stop")
    return data[:start] + data[stop:]


CHANGES: list[Callable[[bytes, st.DataObject], bytes]] = [flipped, cut, lengthened, zeroed, without_middle]


def problems_of(root: str | Path) -> list[Problem] | None:
    """What `verify-targets` finds; None where the store cannot even be opened for it."""
    try:
        return list(verify_store(root).problems)
    except MilanError:
        return None


def read_all(store: Store) -> None:
    """A reader opened afresh raises what it should, or gives what was written."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no manifest.json", category=RuntimeWarning)
            wrong = list(wrong_values(store.root, store.truth))
    except MilanError:
        return
    assert wrong == []


def check_found(store: Store, *paths: str) -> None:
    problems = problems_of(store.root)
    if problems is None:
        headers = {"shards/zarr.json", "header.json"}
        assert headers & set(paths), "only a damaged header may keep a store from being checked"
        return
    for path in paths:
        check_named(store, path, problems)


def check_named(store: Store, path: str, problems: list[Problem]) -> None:
    shard, _, inside = path.removeprefix("shards/").partition("/")
    if shard == "manifest":
        shard = inside.removesuffix(".json")
    if shard in store.truth:
        of_shard = [problem for problem in problems if problem.shard == shard]
        assert of_shard
        assert any(problem.repair.endswith(f"--redo {shard}") for problem in of_shard)
        if not path.startswith("manifest"):
            assert any(problem.array in (inside, inside.partition("/")[0]) for problem in of_shard)
    else:
        assert any(problem.array == path for problem in problems)


@given(data=st.data())
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_damage_to_any_file_is_found_and_never_read(
    stores: dict[tuple[str, str, int], Store], data: st.DataObject
) -> None:
    store = stores[data.draw(st.sampled_from(KINDS), "store")]
    # By kind and not by file: features would be most of them.
    kind = data.draw(st.sampled_from(sorted(store.kinds)), "kind")
    path = data.draw(st.sampled_from(store.kinds[kind]), "path")
    before = store.files[path]
    file = store.root / path
    others = [other for other in store.kinds[kind] if store.files[other] != before]
    how = data.draw(st.sampled_from(["change", "remove", *(["replace", "exchange"] if others else [])]), "how")
    other = data.draw(st.sampled_from(others), "other") if others else path
    if how == "change":
        change = data.draw(st.sampled_from(CHANGES if before else [lengthened]), "change")
        damaged = change(before, data) if before or change is not lengthened else b"{}\n"
        if damaged == before:
            damaged = before + b"\n"
        file.write_bytes(damaged)
    elif how == "remove":
        file.unlink()
    else:
        file.write_bytes(store.files[other])
        if how == "exchange":
            (store.root / other).write_bytes(before)
    try:
        check_found(store, path, *([other] if how == "exchange" else []))
        read_all(store)
    finally:
        file.write_bytes(before)
        (store.root / other).write_bytes(store.files[other])


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_any_file_that_lies_there_twice_is_told_and_harmless(
    stores: dict[tuple[str, str, int], Store], store_format: str
) -> None:
    store = stores[store_format, "int8", 1]
    copies = {paths[0]: store.root / f"{paths[0]}.copy" for paths in store.kinds.values()}
    for path, copy in copies.items():
        shutil.copy(store.root / path, copy)
    problems = verify_store(store.root).problems
    assert list(wrong_values(store.root, store.truth)) == []
    expected = {
        (f"rm -rf {copy}", "is not part of the shard")
        if path.startswith("shards/0")
        else (f"mv {copy} ELSEWHERE", "is not part of the store")
        for path, copy in copies.items()
    }
    assert len(problems) == len(copies)
    assert {(problem.repair, problem.what) for problem in problems} == expected
    for copy in copies.values():
        copy.unlink()
    (store.root / "shards" / "README.md").touch()
    (problem,) = verify_store(store.root).problems
    assert problem.array == "shards/README.md"
    (store.root / "shards" / "README.md").unlink()
    folder = store.root / "shards" / "000000"
    shutil.copytree(folder, store.root / "shards" / "000007 copied")
    (problem,) = verify_store(store.root).problems
    assert (problem.shard, problem.array) == ("", "shards/000007 copied")
    assert problem.repair == f"mv '{store.root / 'shards' / '000007 copied'}' ELSEWHERE"
    shutil.rmtree(store.root / "shards" / "000007 copied")
    assert verify_store(store.root).problems == ()


@pytest.mark.parametrize("kind", KINDS, ids=["-".join(map(str, kind)) for kind in KINDS])
def test_the_stores_are_whole_to_begin_with(
    stores: dict[tuple[str, str, int], Store], kind: tuple[str, str, int]
) -> None:
    report = verify_store(stores[kind].root)
    assert report.problems == ()
    assert (report.shards, report.samples, report.views) == (2, sum(SIZES), 2 * sum(SIZES))
    assert list(wrong_values(stores[kind].root, stores[kind].truth)) == []


def folders_of(store: Store) -> Iterator[str]:
    """One of each kind: paths that differ in numbers alone."""
    folders = sorted({path.rpartition("/")[0] for path in store.files if "/" in path})
    yield from {re.sub(r"\d+", "N", folder): folder for folder in folders}.values()


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_any_folder_that_is_lost_is_found(
    stores: dict[tuple[str, str, int], Store], tmp_path: Path, store_format: str
) -> None:
    store = stores[store_format, "int8", 1]
    for folder in folders_of(store):
        shutil.move(store.root / folder, tmp_path / "kept")
        try:
            assert problems_of(store.root) != []
            read_all(store)
        finally:
            shutil.move(tmp_path / "kept", store.root / folder)


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
@pytest.mark.parametrize("parts", [["manifest/{}.json"], ["shards/{}"]])
def test_shards_that_changed_places_are_told_before_there_is_a_summary(
    stores: dict[tuple[str, str, int], Store], tmp_path: Path, store_format: str, parts: list[str]
) -> None:
    store = stores[store_format, "int8", 1]
    root = shutil.copytree(store.root, tmp_path / "t")
    (root / "manifest.json").unlink()
    for part in parts:
        one, other = (root / part.format(name) for name in store.truth)
        one.rename(tmp_path / "kept")
        other.rename(one)
        (tmp_path / "kept").rename(other)
    problems = verify_store(root).problems
    assert {problem.shard for problem in problems} == {"", *store.truth}
    read_all(Store(root, store.files, store.truth))


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_damage_between_two_reads_is_found(stores: dict[tuple[str, str, int], Store], store_format: str) -> None:
    """A disk does not wait until the store is opened again."""
    store = stores[store_format, "int8", 1]
    reader = open_targets(store.root)
    reader.read("000000", 0, 0, 128)
    path = "shards/000000/" + ("features/c/0/0/0/0" if store_format == "zarr" else "view-0.tar")
    before = store.files[path]
    with (store.root / path).open("r+b") as file:
        file.seek(len(before) // 3)
        file.write(bytes([before[len(before) // 3] ^ 1]))
    try:
        with pytest.raises(MilanError, match="000000"):
            reader.read("000000", 0, 0, 128)
    finally:
        (store.root / path).write_bytes(before)
    assert open_targets(store.root).read("000000", 0, 0, 128).keys == store.truth["000000"][0].keys[:128]


@pytest.mark.parametrize("kind", FEW_KINDS, ids=["-".join(map(str, kind)) for kind in FEW_KINDS])
def test_a_flipped_byte_anywhere_is_seen_by_an_open_reader(
    stores: dict[tuple[str, str, int], Store], kind: tuple[str, str, int]
) -> None:
    """The checksum of each chunk is checked in each read, of part of a block too, by whichever library reads it."""
    store = stores[kind]
    reader = open_targets(store.root)
    (run, _) = store.truth["000001"]
    reader.read("000001", 0, 0, len(run.keys))
    large = re.compile(r"shards/000001/(features/c/0|(scale|attention|view_bytes)/c|view-0)[/.].*")
    paths = [path for path in store.files if large.fullmatch(path)]
    assert len(paths) == (1 if kind[0] == "webdataset" else 3 if kind[1] == "float16" else 4)
    for path in paths:
        before = store.files[path]
        used = len(before) if kind[0] == "zarr" else len(before.rstrip(b"\0"))
        found = 0
        for position in range(0, used, -(-used // 31)):
            damaged = bytearray(before)
            damaged[position] ^= 4
            (store.root / path).write_bytes(damaged)
            try:
                # Right where nothing is read of what was flipped, as chunks of the other view.
                assert differences(reader.read("000001", 0, 0, len(run.keys)), run) == [], (path, position)
            except DataError:
                found += 1
            finally:
                (store.root / path).write_bytes(before)
        assert found, path
    assert differences(reader.read("000001", 0, 1, 4), run, 1, 4) == []


@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_damage_in_a_bucket_is_found(bucket: str, store_format: str) -> None:
    head = header("int8", format=store_format, width=8)
    where = f"{bucket}/t"
    written = write_store(where, head, [130])
    location = location_of(where)
    truth = {name: [joined(blocks, view) for view in range(2)] for name, blocks in written.items()}
    store = Store(where, tree(where), truth)

    def spoil(paths: Sequence[str], how: int) -> None:
        for path in paths:
            before = store.files[path]
            middle = len(before) // 2
            if how == 0:
                location.write(path, before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
            elif how == 1:
                location.write(path, before[:middle])
            else:
                location.remove(path)
        check_found(store, *paths)
        read_all(store)
        for path in paths:
            location.write(path, store.files[path])

    # Each check costs a hundred requests; the folder above has had every file on its own.
    inside = [paths[-1] for paths in store.kinds.values() if paths[-1].startswith("shards/000000/")]
    for how in range(3):
        spoil(inside[how::3], how)
    for number, path in enumerate(path for paths in store.kinds.values() for path in paths[-1:] if path not in inside):
        spoil([path], number % 3)
    assert problems_of(where) == []
    check_store(open_targets(where), written)


# --- damage against training --------------------------------------------------------------------------------------


def changed(
    how: str, store: Store, older: Mapping[str, bytes], path: str, rng: random.Random
) -> dict[str, bytes | None]:
    """What becomes of files, None for one that is deleted; nothing where it would change nothing."""
    before = store.files[path]
    if how == "swap":
        other = rng.choice([name for name in store.files if store.files[name] != before])
        return {path: store.files[other], other: before}
    if how == "older version":
        return {path: older[path]} if older.get(path, before) != before else {}
    if how == "flip" and before:
        position = rng.randrange(len(before))
        return {path: before[:position] + bytes([before[position] ^ rng.randrange(1, 256)]) + before[position + 1 :]}
    if how == "cut" and before:
        return {path: before[: rng.randrange(len(before))]}
    return {path: None} if how == "delete" else {}


def put(root: Path, files: Mapping[str, bytes | None]) -> None:
    for path, data in files.items():
        if data is None:
            (root / path).unlink(missing_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("store_format", ["zarr", "webdataset"])
def test_five_hundred_corruptions_and_training_without_verify(
    tmp_path: Path, store_format: str, counted: Counted
) -> None:
    head = header("int8", format=store_format, shards=2)
    written = write_store(tmp_path / "t", head, SIZES)
    truth = {name: [joined(blocks, view) for view in range(2)] for name, blocks in written.items()}
    store = Store(tmp_path / "t", tree(tmp_path / "t"), truth)
    # As an earlier extraction of the same images by the same settings left it: other features, whole in itself.
    write_blocks(tmp_path / "older", head, [random_blocks(head, size, 9 + number) for number, size in enumerate(SIZES)])
    older = tree(tmp_path / "older")
    params = small_params(head, epochs=2, batch_size=45, shuffle_blocks=1, log_every=1)
    pretrain(store.root, tmp_path / "whole", params)
    rng, run, done, refused = random.Random(500), tmp_path / "run", Counter[str](), 0
    while done.total() < 500:
        how = ("flip", "cut", "delete", "swap", "older version")[done.total() % 5]
        kinds = store.kinds
        files = changed(how, store, older, rng.choice(kinds[rng.choice(sorted(kinds))]), rng)
        if not files:
            continue
        done[how] += 1
        put(store.root, files)
        if how == "older version" and "manifest.json" in files:
            # Whole in itself: it does not fit any record.
            problems = problems_of(store.root)
            assert [problem.shard for problem in problems or []] == [*store.truth]
            assert all("does not fit its digest in manifest.json" in problem.what for problem in problems or [])
        else:
            # Its digest is in the summary alone, and those of a shard's files in its record.
            unknown = {"bad_samples.jsonl"} if "manifest.json" in files else set()
            records = {f"manifest/{shard}.json" for shard in store.truth} & files.keys()
            unknown |= {path for path in files if path.startswith(tuple(f"shards/{Path(r).stem}/" for r in records))}
            check_found(store, *(files.keys() - unknown))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no manifest.json", category=RuntimeWarning)
            try:
                pretrain(store.root, run, params)
            except MilanError:
                refused += 1
            else:
                assert same_run(run, tmp_path / "whole"), (how, sorted(files))
        shutil.rmtree(run, ignore_errors=True)
        put(store.root, store.files)
    assert refused > 250
    what = ", ".join(f"{count} {how}" for how, count in done.items())
    counted(
        f"damage to a store, {store_format}: {what}",
        done.total(),
        "`verify-targets` names the file, or what vouches for it",
    )
    held = f"refused {refused} times, else read nothing of it: an unbroken run's losses and weights"
    counted(f"the same, `pretrain` without verify, {store_format}", done.total(), held)
