"""What `verify-targets` tells of stores whose bytes are as they were written: that they were wrong from the start."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.targets import header, random_blocks, source, tree, write_blocks, write_store

from milan_pipe.api import extract_targets, verify_targets
from milan_pipe.config.images import PrepareSettings
from milan_pipe.config.params import Params, load_params
from milan_pipe.errors import DataError, MismatchError, MissingError
from milan_pipe.images.prepare import prepare
from milan_pipe.images.views import encode_jpeg
from milan_pipe.targets import manifest
from milan_pipe.targets.schema import TargetBlock, ViewRun
from milan_pipe.targets.store import TargetStore, TargetStoreWriter, header_file, open_targets
from milan_pipe.targets.verify import Problem, VerifyReport

FORMATS = ("zarr", "webdataset")
Change = Callable[[TargetBlock], TargetBlock]


def arrays_of(report: VerifyReport) -> list[tuple[str, str]]:
    return [(problem.shard, problem.array) for problem in report.problems]


# --- content ------------------------------------------------------------------------------------------------------


def one_value(name: str, index: tuple[int, ...], value: float) -> Change:
    """A block with one value of an array replaced."""

    def change(block: TargetBlock) -> TargetBlock:
        array = getattr(block, name).copy()
        array[index] = value
        return dataclasses.replace(block, **{name: array})

    return change


def jpeg(data: Callable[[bytes], bytes]) -> Change:
    """A block with one view replaced."""

    def change(block: TargetBlock) -> TargetBlock:
        jpegs = [list(row) for row in block.jpegs]
        jpegs[1][3] = data(bytes(jpegs[1][3]))
        return dataclasses.replace(block, jpegs=jpegs)

    return change


def grey(size: int) -> bytes:
    return encode_jpeg(np.full((size, size, 3), 99, np.uint8), 90)


def flat(value: float) -> Change:
    def change(block: TargetBlock) -> TargetBlock:
        attention = block.attention_KNL.copy()
        attention[1, 3] = value
        return dataclasses.replace(block, attention_KNL=attention)

    return change


def negative(block: TargetBlock) -> TargetBlock:
    attention = block.attention_KNL.copy()
    attention[1, 3] = [-0.5, 0.5, 0.5, 0.5]
    return dataclasses.replace(block, attention_KNL=attention)


WRONG: dict[str, tuple[str, Change, str, str]] = {
    "scale infinite": ("int8", one_value("scale_KNS", (1, 3, 2), np.inf), "scale", "not finite, or negative"),
    "scale no number": ("klt", one_value("scale_KNS", (1, 3, 2), np.nan), "scale", "not finite, or negative"),
    "scale negative": ("int8", one_value("scale_KNS", (1, 3, 2), -0.5), "scale", "not finite, or negative"),
    "feature infinite": ("float16", one_value("code_KNST", (1, 3, 2, 1), np.inf), "features", "not finite"),
    "feature no number": ("float16", one_value("code_KNST", (1, 3, 2, 1), np.nan), "features", "not finite"),
    "token of zeros, int8": ("int8", one_value("code_KNST", (1, 3, 2), 0), "features", "all zero"),
    "token of zeros, float16": ("float16", one_value("code_KNST", (1, 3, 2), 0), "features", "all zero"),
    "code too low, int8": ("int8", one_value("code_KNST", (1, 3, 2, 1), -128), "features", "-127 to 127"),
    "code too low, klt": ("klt", one_value("code_KNST", (1, 3, 2, 1), -128), "features", "-127 to 127"),
    "attention zero": ("int8", flat(0), "attention", "a row sums to 0, expected 1"),
    "attention in percent": ("int8", flat(25), "attention", "a row sums to 100, expected 1"),
    "attention a little low": ("int8", flat(0.248), "attention", "a row sums to 0.99"),
    "attention no number": ("int8", flat(np.nan), "attention", "a row sums to nan"),
    "attention infinite": ("int8", flat(np.inf), "attention", "a row sums to inf"),
    "attention negative": ("int8", negative, "attention", "a negative value, -0.5"),
    "view empty": ("int8", jpeg(lambda _: b""), "view_bytes", "cannot be decoded: empty"),
    "view cut": ("int8", jpeg(lambda data: data[: len(data) // 2]), "view_bytes", "cannot be decoded"),
    "view no image": ("int8", jpeg(lambda data: b"<html>" + bytes(len(data))), "view_bytes", "cannot be decoded"),
    "view of another size": ("int8", jpeg(lambda _: grey(24)), "view_bytes", "24 x 24 pixels, expected 16 x 16"),
    "box without height": ("int8", one_value("crop_KN4", (1, 3, 2), 0), "crop", "empty"),
    "box of negative width": ("int8", one_value("crop_KN4", (1, 3, 3), -4), "crop", "empty"),
    "box left of its image": ("int8", one_value("crop_KN4", (1, 3, 1), -1), "crop", "outside"),
}


@pytest.mark.parametrize("store_format", FORMATS)
@pytest.mark.parametrize("codec", ["int8", "float16", "klt"])
def test_content_that_was_wrong_from_the_start(tmp_path: Path, store_format: str, codec: str) -> None:
    """A shard for each wrong content, and one that is right."""
    wrong = [(name, *case) for name, (kind, *case) in WRONG.items() if kind == codec]
    head = header(codec, format=store_format, shards=len(wrong) + 1)
    shards = [random_blocks(head, 5, number) for number in range(len(wrong) + 1)]
    for number, (_, change, _, _) in enumerate(wrong):
        shards[number] = [change(shards[number][0])]
    write_blocks(tmp_path / "t", head, shards)
    report = verify_targets(tmp_path / "t")
    expected = [(f"{number:06d}", array) for number, (_, _, array, _) in enumerate(wrong)]
    assert arrays_of(report) == expected
    for (name, _, _, what), problem in zip(wrong, report.problems, strict=True):
        assert what in problem.what, name
        assert "view 1" in problem.what, name
        assert problem.repair == f"milan-pipe extract-targets IMAGES {tmp_path / 't'} --redo {problem.shard}", name
    of_all = ",".join(shard for shard, _ in expected)
    assert report.repair == (f"milan-pipe extract-targets IMAGES {tmp_path / 't'} --redo {of_all}",)


def test_features_that_the_codec_did_not_keep(tmp_path: Path) -> None:
    head = header()
    writer = TargetStoreWriter(tmp_path, head)
    shard = writer.open_shard("000000")
    shard.append(random_blocks(head, 5)[0])
    shard.commit(source(5), 0.5)
    writer.finish()
    (problem,) = verify_targets(tmp_path).problems
    assert (problem.shard, problem.array) == ("000000", "features")
    assert "mean cosine of 0.5" in problem.what


def test_the_block_of_many_is_named(tmp_path: Path) -> None:
    head = header(shards=1)
    blocks = random_blocks(head, 300)
    blocks[2] = flat(0)(blocks[2])
    write_blocks(tmp_path / "t", head, [blocks])
    (problem,) = verify_targets(tmp_path / "t").problems
    assert problem.what.startswith("view 1, samples from 256: ")


@pytest.mark.parametrize("store_format", FORMATS)
@pytest.mark.parametrize("array", ["attention", "scale"])
def test_an_array_of_another_shape(tmp_path: Path, store_format: str, array: str) -> None:
    head = header(format=store_format)
    (block,) = random_blocks(head, 5)
    if array == "attention":
        block = dataclasses.replace(block, attention_KNL=np.full((2, 5, 9), 1 / 9, np.float16))
    else:
        assert block.scale_KNS is not None
        block = dataclasses.replace(block, scale_KNS=block.scale_KNS[..., :-1])
    write_blocks(tmp_path / "t", head, [[block]])
    (problem,) = verify_targets(tmp_path / "t").problems
    assert (problem.shard, problem.array) == ("000000", array if store_format == "zarr" else "view-0.tar")


@pytest.mark.parametrize("store_format", FORMATS)
def test_keys_that_occur_twice(tmp_path: Path, store_format: str) -> None:
    head = header(format=store_format, shards=3)
    keys = [[f"{shard}-{row}" for row in range(140)] for shard in range(3)]
    # Within a shard and over two of its blocks; then in two shards.
    keys[0][139] = keys[0][0]
    keys[2][7], keys[2][133] = keys[1][130], keys[1][2]
    write_blocks(tmp_path / "t", head, [random_blocks(head, 140, n, keys[n]) for n in range(3)])
    report = verify_targets(tmp_path / "t")
    assert arrays_of(report) == [("000000", "key"), ("000002", "key")]
    within, across = (problem.what for problem in report.problems)
    assert within == "key '0-0' is more than once in the shard; rename in IMAGES first"
    assert across == "key '1-130' and 1 more are in another shard too, as 000001; rename in IMAGES first"
    assert report.repair == (f"milan-pipe extract-targets IMAGES {tmp_path / 't'} --redo 000000,000002",)


@pytest.mark.parametrize("store_format", FORMATS)
def test_more_samples_reported_than_there_are(tmp_path: Path, store_format: str) -> None:
    """A record and a summary that agree with each other, and not with the files."""
    head = header(format=store_format)
    write_store(tmp_path / "t", head, [5])
    writer = TargetStoreWriter(tmp_path / "t", head)
    record = dataclasses.replace(manifest.read_record(writer.location, "000000"), source=source(6))
    manifest.write_record(writer.location, "000000", record)
    manifest.write_manifest(writer.location, header_file(head)[1], writer.committed())
    problems = verify_targets(tmp_path / "t").problems
    assert {problem.shard for problem in problems} == {"000000"}


# --- files --------------------------------------------------------------------------------------------------------


def test_a_store_that_is_not_finished(tmp_path: Path) -> None:
    head = header(shards=2)
    write_store(tmp_path / "t", head, [5, 5])
    whole = tree(tmp_path / "t")
    writer = TargetStoreWriter(tmp_path / "t", head)
    writer.forget("000001")
    # Published, and not committed: the process ended between the two.
    for path, data in whole.items():
        if path.startswith("shards/000001/"):
            (tmp_path / "t" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "t" / path).write_bytes(data)
    report = verify_targets(tmp_path / "t")
    assert arrays_of(report) == [("", "manifest.json")]
    assert report.repair == (f"milan-pipe extract-targets IMAGES {tmp_path / 't'}",)
    assert (report.shards, report.samples) == (1, 5)


def test_foreign_files_are_reported_and_only_the_stores_own_are_removed(tmp_path: Path) -> None:
    root = tmp_path / "two words"
    head = header(shards=2)
    write_store(root, head, [5, 5])
    before = tree(root)
    for path in (
        "note.txt",
        "a folder/x",
        "a folder/deep/y",
        "shards/000001/features/c/0/7/0/0",
        "shards/000000/.z",
        "manifest/a.txt",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"z")
    shutil.copy(root / "manifest/000000.json", root / "manifest/000002.json")
    shutil.copytree(root / "shards" / "000000", root / "shards" / "000002")
    report = verify_targets(root)
    assert sorted(arrays_of(report)) == [
        ("", "a folder"),
        ("", "manifest/000002.json"),
        ("", "manifest/a.txt"),
        ("", "note.txt"),
        ("", "shards/000002"),
        ("000000", ".z"),
        ("000001", "features/c/0/7/0/0"),
    ]
    foreign = [command for command in report.repair if not command.startswith("rm -rf ")]
    assert [shlex.split(command) for command in foreign] == [
        ["mv", f"{root}/{path}", "ELSEWHERE"] for path in ("a folder", "manifest/a.txt", "note.txt")
    ]
    (tmp_path / "elsewhere").mkdir()
    for command in report.repair:
        subprocess.run(command.replace("ELSEWHERE", shlex.quote(f"{tmp_path}/elsewhere/")), shell=True, check=True)
    assert (tmp_path / "elsewhere" / "a folder" / "deep" / "y").read_bytes() == b"z"
    assert verify_targets(root).problems == ()
    assert tree(root) == before


def test_what_repairs_several_problems_is_one_extraction(tmp_path: Path) -> None:
    root = tmp_path / "t"
    write_store(root, header(shards=3), [5, 5, 5])
    (root / "manifest" / "000000.json").unlink()
    (root / "shards" / "000002" / "crop" / "zarr.json").write_bytes(b"{}")
    (root / "shards" / "000002" / "key" / "c" / "0").unlink()
    (root / "bad_samples.jsonl").unlink()
    (root / "x").touch()
    report = verify_targets(root)
    assert sorted(arrays_of(report)) == [
        ("", "bad_samples.jsonl"),
        ("", "x"),
        ("000000", "manifest/000000.json"),
        ("000002", "crop"),
        ("000002", "key"),
    ]
    assert report.repair == (
        f"mv {root}/x ELSEWHERE",
        f"milan-pipe extract-targets IMAGES {root} --redo 000000,000002",
    )


def test_one_stray_file_is_one_problem(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(), [3])
    (tmp_path / "t" / "x").touch()
    report = verify_targets(tmp_path / "t")
    assert report.problems == (
        Problem(shard="", array="x", what="is not part of the store", repair=f"mv {tmp_path / 't' / 'x'} ELSEWHERE"),
    )


def test_folders_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="store"):
        verify_targets(tmp_path / "nowhere")
    write_store(tmp_path / "t", header(), [3])
    (tmp_path / "t" / "shards" / "zarr.json").write_bytes(b"{}")
    with pytest.raises(DataError, match="header"):
        verify_targets(tmp_path / "t")


def test_progress_is_told_shard_by_shard(tmp_path: Path) -> None:
    write_store(tmp_path / "t", header(shards=3), [3, 3, 3])
    seen: list[tuple[int, int]] = []
    verify_targets(tmp_path / "t", on_progress=lambda *now: seen.append(now))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("store_format", FORMATS)
def test_a_store_in_a_bucket(bucket: str, store_format: str) -> None:
    head = header(format=store_format, shards=2)
    shards = [random_blocks(head, 5, number) for number in range(2)]
    shards[1] = [flat(0)(shards[1][0])]
    where = f"{bucket}/t"
    write_blocks(where, head, shards)
    writer = TargetStoreWriter(where, head)
    writer.location.write("stray", b"z")
    report = verify_targets(where)
    assert arrays_of(report) == [("", "stray"), ("000001", "attention")]
    assert report.repair == (
        f"move {where}/stray ELSEWHERE",
        f"milan-pipe extract-targets IMAGES {where} --redo 000001",
    )
    assert (report.shards, report.samples, report.views) == (2, 10, 20)
    assert report.files == sum(len(manifest.read_record(writer.location, name).files) for name in ("000000", "000001"))


# --- against the teacher ------------------------------------------------------------------------------------------


SETTINGS = ["views.count=2", "extract.threads=1", "extract.batch_size=16", "extract.device=cpu"]


def settings(*more: str) -> Params:
    return load_params(None, [*SETTINGS, *more])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "images"
    prepare("demo", folder, PrepareSettings(train_scenes=18, test_scenes=0, samples_per_shard=14), workers=1)
    return folder


@pytest.fixture(scope="module", params=["int8", "float16", "klt"])
def extracted(request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = tmp_path_factory.mktemp("extracted") / "t"
    extract_targets(images, targets, settings(f"codec.name={request.param}", "codec.fit_samples=16"))
    return targets


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose first shard has more than a block."""
    folder = tmp_path_factory.mktemp("two-blocks")
    prepare("demo", folder / "i", PrepareSettings(train_scenes=136, test_scenes=0, samples_per_shard=132), workers=1)
    extract_targets(folder / "i", folder / "t", settings())
    return folder / "t"


def blocks_of(store: TargetStore, shard: str) -> list[TargetBlock]:
    found = []
    for start in range(0, store.samples(shard), 128):
        runs = [store.read(shard, v, start, min(start + 128, store.samples(shard))) for v in range(2)]
        found.append(block_of(runs))
    return found


def block_of(runs: Sequence[ViewRun]) -> TargetBlock:
    scales = [run.scale_NS for run in runs if run.scale_NS is not None]
    return TargetBlock(
        keys=runs[0].keys,
        label_N=runs[0].label_N,
        code_KNST=np.stack([run.code_NST for run in runs]),
        scale_KNS=np.stack(scales) if scales else None,
        attention_KNL=np.stack([run.attention_NL for run in runs]),
        crop_KN4=np.stack([run.crop_N4 for run in runs]),
        flip_KN=np.stack([run.flip_N for run in runs]),
        jpegs=[run.jpegs for run in runs],
    )


def changed(extracted: Path, where: Path, change: Change) -> Path:
    """The store with every block of its first shard changed; all its checksums are right."""
    store = open_targets(extracted)
    shards = [[change(block) for block in blocks_of(store, "000000")], blocks_of(store, "000001")]
    write_blocks(where, store.header, shards)
    return where


def test_a_true_store_agrees_with_the_teacher(extracted: Path) -> None:
    for count in (1, 3, 1000):
        report = verify_targets(extracted, settings(), against_teacher=count)
        assert report.problems == ()
        assert (report.shards, report.samples, report.views) == (2, 18, 36)


def other_row(block: TargetBlock) -> TargetBlock:
    """Features of the image before."""
    scale = None if block.scale_KNS is None else np.roll(block.scale_KNS, 1, axis=1)
    return dataclasses.replace(block, code_KNST=np.roll(block.code_KNST, 1, axis=1), scale_KNS=scale)


def other_view(block: TargetBlock) -> TargetBlock:
    """Features of the other view."""
    scale = None if block.scale_KNS is None else block.scale_KNS[::-1]
    return dataclasses.replace(block, code_KNST=block.code_KNST[::-1], scale_KNS=scale)


def other_tokens(block: TargetBlock) -> TargetBlock:
    """Patches in another order."""
    order = np.r_[0, np.arange(1, block.code_KNST.shape[2])[::-1]]
    scale = None if block.scale_KNS is None else block.scale_KNS[:, :, order]
    return dataclasses.replace(block, code_KNST=block.code_KNST[:, :, order], scale_KNS=scale)


def other_attention(block: TargetBlock) -> TargetBlock:
    """As if every patch mattered as much."""
    return dataclasses.replace(
        block, attention_KNL=np.full_like(block.attention_KNL, 1 / block.attention_KNL.shape[-1])
    )


@pytest.mark.parametrize(
    ("change", "array"),
    [
        (other_row, "features"),
        (other_view, "features"),
        (other_tokens, "features"),
        (other_attention, "attention"),
    ],
)
def test_a_store_that_only_claims_its_teacher_is_told(
    extracted: Path, tmp_path: Path, change: Change, array: str
) -> None:
    false = changed(extracted, tmp_path / "t", change)
    assert verify_targets(false).problems == (), "its bytes are in order"
    report = verify_targets(false, settings(), against_teacher=3)
    assert set(arrays_of(report)) == {("000000", array)}
    assert len(report.problems) == 3
    assert len({problem.what.split(":")[0] for problem in report.problems}) == 3, "three views, each named"
    assert report.repair == (f"milan-pipe extract-targets IMAGES {false} --redo 000000",)


def test_views_to_compare_are_spread_over_the_whole_shard(two_blocks: Path, tmp_path: Path) -> None:
    """Wrong features behind the first block of a shard are met as well."""

    def late(block: TargetBlock) -> TargetBlock:
        return block if len(block.keys) == 128 else other_row(block)

    false = changed(two_blocks, tmp_path / "t", late)
    report = verify_targets(false, settings(), against_teacher=264)
    keys = set(open_targets(false).read("000000", 0, 128, 132).keys)
    assert len(report.problems) == 8
    assert {problem.what.split()[3].rstrip(":") for problem in report.problems} == keys


def test_another_teacher_than_the_stores_is_refused(extracted: Path) -> None:
    more = ("teacher.model=ViT-B-32", "teacher.pretrained=random")
    with pytest.raises(MismatchError, match="model"):
        verify_targets(extracted, settings(*more), against_teacher=1)
