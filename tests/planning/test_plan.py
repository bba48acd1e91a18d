"""`milan-pipe plan`: what it counts is right, what it estimates is near what extraction then writes, nothing stays."""

from __future__ import annotations

import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milan_pipe import api, cli
from milan_pipe.config.images import PrepareSettings
from milan_pipe.config.params import Params, load_params
from milan_pipe.config.teacher import TeacherSettings
from milan_pipe.errors import DataError
from milan_pipe.extraction import space
from milan_pipe.images.count import ImageCount, count_images, indexed_images
from milan_pipe.images.prepare import prepare
from milan_pipe.images.shards import expand_shards
from milan_pipe.planning import load as load_module
from milan_pipe.planning import speed as speed_module
from milan_pipe.planning import store as store_module
from milan_pipe.planning.load import SCHEDULER_TASK_SECONDS, cluster_load, limits, node_load
from milan_pipe.planning.run import PlanProgress, PlanReport
from milan_pipe.planning.speed import ExtractionHours, Speed, extraction_hours, pretraining_hours, teacher_flops
from milan_pipe.planning.store import StoreEstimate, sample_images
from milan_pipe.planning.tables import duration, rows
from milan_pipe.storage import location_of
from milan_pipe.teacher.clip import load_teacher
from milan_pipe.units import rate

SETTINGS = [
    "views.count=2", "extract.threads=1", "extract.teacher_threads=1",
    "pretrain.batch_size=16", "student.width=32", "student.depth=2", "decoder.depth=1",
]  # fmt: skip
CODECS = ("float16", "int8", "klt")


@pytest.fixture(scope="module", autouse=True)
def _short_measurements() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed_module, "_MOST_BATCHES", 2)
        patch.setattr(load_module, "_LOADER_SECONDS", 0.05)
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned") / "images"
    prepare("demo", folder, PrepareSettings(train_scenes=100, test_scenes=0, samples_per_shard=40), workers=1)
    return folder


def params(*more: str) -> Params:
    return load_params(None, [*SETTINGS, *more])


@pytest.fixture(scope="module")
def report(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> PlanReport:
    return api.plan(scenes, tmp_path_factory.mktemp("t") / "targets", params(), sample=48)


def nothing(*_: object) -> None:
    """For who does not listen."""


def counted(where: str | Path) -> ImageCount:
    return count_images(expand_shards(where), nothing)


# --- counting -----------------------------------------------------------------------------------------------------


def pack(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.ci
def test_a_second_teacher_is_planned_over_the_views_of_a_store(
    scenes: Path, report: PlanReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[dict[str, float]] = []

    class Kept(store_module.Clock):
        def take(self) -> dict[str, float]:
            measured.append(super().take())
            return measured[-1]

    first, second = tmp_path / "a", tmp_path / "b"
    api.extract_targets(str(scenes / "train-*.tar"), first, params("codec=float16"))
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "Clock", Kept)
        found = api.plan(None, second, params("teacher.pretrained=random"), views_from=first, sample=48)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert (str(found.images), found.views) == ("100 in 3 shards (records of the store)", 200)
    assert found.teacher_online is None
    assert rows(found)["online teacher"].endswith("(extrapolated; not estimated for two teachers)")
    # Views are decoded, and neither rendered nor encoded.
    (seconds,) = measured
    assert not {"crop", "jpeg"} & seconds.keys()
    assert found.render_views_per_second == pytest.approx(48 / seconds["decode"])
    # Both stores are read, the views of one.
    (wide,) = (one for one in report.stores if (one.codec, one.format) == ("float16", report.chosen.format))
    codes = found.node.bytes_per_second / found.node.images_per_second - wide.bytes_per_view
    assert 0.2 * report.chosen.bytes_per_view < codes < report.chosen.bytes_per_view
    api.extract_targets(None, second, params("teacher.pretrained=random"), views_from=first)
    assert sum(location_of(second).sizes().values()) == pytest.approx(found.chosen.bytes, rel=0.05)


def test_an_index_tells_without_a_look(scenes: Path) -> None:
    assert counted(scenes) == ImageCount(
        total=100, source="index", shards=3, looked_at=0, bytes=sum(p.stat().st_size for p in scenes.glob("*.tar"))
    )


def test_without_an_index_the_headers_tell(scenes: Path, tmp_path: Path) -> None:
    for path in scenes.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = counted(tmp_path)
    assert (found.total, found.source, found.looked_at) == (100, "headers", 3)


def test_an_index_that_no_longer_fits_is_not_believed(scenes: Path, tmp_path: Path) -> None:
    for path in scenes.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = min(tmp_path.glob("*.tar"))
    pack(first, [("a.jpg", b"x"), ("b.jpg", b"y")])
    assert (counted(tmp_path).total, counted(tmp_path).source) == (62, "headers")


def test_only_images_count_and_each_once(tmp_path: Path) -> None:
    names = ["a.jpg", "a.json", "b.PNG", "b.txt", "c.json", "dir/a.webp"]
    members = [(name, b"1") for name in names]
    pack(tmp_path / "x.tar", members)
    assert counted(tmp_path / "x.tar").total == 3


def test_many_shards_are_estimated_by_their_size(tmp_path: Path) -> None:
    for number in range(40):
        pack(tmp_path / f"{number:03d}.tar", [(f"{number}-{row}.jpg", bytes(3000)) for row in range(20 + number % 5)])
    found = counted(tmp_path)
    truth = sum(20 + number % 5 for number in range(40))
    assert (found.source, found.looked_at, found.shards) == ("estimate", 16, 40)
    assert found.total == pytest.approx(truth, rel=0.05)


def test_a_bucket_is_counted_from_the_beginnings_of_its_shards(bucket: str, scenes: Path) -> None:
    location = location_of(f"{bucket}/images")
    for path in sorted(scenes.glob("*.tar")):
        location.write(path.name, path.read_bytes())
    found = counted(f"{bucket}/images")
    assert found.shards == found.looked_at == 3
    assert found.total == pytest.approx(100, rel=0.05)


def test_shards_that_cannot_be_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.tar"):
        counted(tmp_path / "a.tar")
    pack(tmp_path / "b.tar", [("a.json", b"1")])
    with pytest.raises(DataError, match="no images"):
        counted(tmp_path / "b.tar")


# --- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_takes_what_was_estimated(scenes: Path, report: PlanReport, tmp_path: Path, codec: str) -> None:
    written = api.extract_targets(scenes, tmp_path / "zarr", params(f"codec.name={codec}"))
    # As if it had been extracted in this format.
    api.convert_targets(tmp_path / "zarr", tmp_path / "webdataset", format="webdataset")
    for estimated in report.stores:
        if estimated.codec == codec:
            sizes = [path.stat().st_size for path in (tmp_path / estimated.format).rglob("*") if path.is_file()]
            assert estimated.bytes == pytest.approx(sum(sizes), rel=0.07)
            assert estimated.files == len(sizes)
            assert 1 - estimated.mean_cosine == pytest.approx(1 - (written.mean_cosine or 0), rel=0.2)


def test_the_report_adds_up(report: PlanReport) -> None:
    assert (report.images.total, report.views, report.sample, report.sample_bad) == (100, 200, 48, 0)
    assert (report.chosen.codec, report.chosen.format) == ("int8", "zarr")
    assert len(report.stores) == 6
    assert report.teacher.per_second > 0
    assert report.student.per_second > 0
    assert report.space.needed_bytes == report.chosen.bytes
    assert report.space.free_bytes is not None
    hours = report.extraction.hours
    # Three shards are done by three devices at most.
    assert hours[1] == pytest.approx(3 * hours[8]) == pytest.approx(3 * hours[64])
    assert hours[1] * 3600 * report.extraction.views_per_second == pytest.approx(200)


def test_every_line_says_where_it_comes_from(report: PlanReport) -> None:
    lines = rows(report)
    assert lines["images"] == "100 in 3 shards (index.json)"
    assert lines["measured on"] == "48 images, one view of each"
    assert "of 3 shards each is done by one device" in lines["extraction"]
    for line in ("teacher", "rendering", "student"):
        assert "measured" in lines[line]
    for line in ("store", "extraction", "stored targets", "online teacher"):
        assert "extrapolated" in lines[line]


def test_images_that_cannot_be_read_are_reported(scenes: Path, tmp_path: Path) -> None:
    with tarfile.open(min(scenes.glob("*.tar"))) as tar:
        found = [(name, tar.extractfile(name)) for name in tar.getnames() if re.search(r"\d\.png$", name)]
        good = [(name, file.read()) for name, file in found if file is not None]
    (tmp_path / "images").mkdir()
    pack(tmp_path / "images" / "x.tar", [("0.jpg", b"no image"), *good[:30], ("z.jpg", b"nor this")])
    report = api.plan(tmp_path / "images", tmp_path / "t", params(), sample=64)
    assert (report.images.total, report.sample, report.sample_bad) == (32, 30, 2)
    assert any("2 of 32 sampled images cannot be read" in line for line in report.warnings)
    assert rows(report)["measured on"] == "30 images, one view of each; 2 more cannot be read"


def test_an_images_bucket_is_planned_for(scenes: Path, report: PlanReport, bucket: str) -> None:
    location = location_of(f"{bucket}/images")
    for path in scenes.iterdir():
        location.write(path.name, path.read_bytes())
    found = api.plan(f"{bucket}/images", f"{bucket}/targets", params(), sample=48)
    assert found.images == report.images
    # Of a bucket's shards other images may be taken.
    assert found.chosen.bytes == pytest.approx(report.chosen.bytes, rel=0.03)
    assert (found.space.free_bytes, found.space.short) == (None, False)
    assert "not checked" in rows(found)["free disk"]
    assert location_of(bucket).listing().folders == ("images",)


def test_nothing_stays(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    seen: list[PlanProgress] = []
    api.plan(scenes, tmp_path / "targets", params(), sample=8, on_progress=seen.append)
    assert {now.what for now in seen} >= {"render", "teacher", "codecs", "stores", "student"}
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch"]


# --- hours --------------------------------------------------------------------------------------------------------


def speed(rate: float, threads: int = 0) -> Speed:
    device = "cpu" if threads else "cuda"
    return Speed(per_second=rate, device=device, precision="float32", batch_size=64, threads=threads, batches=8)


def test_what_limits_an_extraction() -> None:
    assert extraction_hours(3600, 1, speed(10), 0.01, threads=8, cores=8).limited_by == "teacher"
    slow = extraction_hours(3600, 1, speed(1000), 0.1, threads=4, cores=8)
    assert (slow.limited_by, slow.views_per_second) == ("rendering", pytest.approx(40))
    shared = extraction_hours(3600, 1, speed(10, threads=2), 0.1, threads=2, cores=2)
    assert (shared.limited_by, shared.views_per_second) == ("processors", pytest.approx(1 / 0.15))


@pytest.mark.parametrize(
    ("shards", "expected"), [(1, (10, 10, 10)), (8, (10, 1.25, 1.25)), (10, (10, 2, 1)), (640, (10, 1.25, 0.15625))]
)
def test_a_shard_keeps_one_device_busy(shards: int, expected: tuple[float, ...]) -> None:
    found = extraction_hours(36000, shards, speed(1), 0.0, threads=1, cores=1)
    assert tuple(found.hours) == (1, 8, 64)
    assert tuple(found.hours.values()) == pytest.approx(expected)


def test_short_times_are_not_told_as_nothing() -> None:
    texts = [duration(hours) for hours in (12345, 26.04, 1, 0.5, 0.004, 0.0002, 0.000001)]
    assert texts == ["12345 h", "26.0 h", "1.0 h", "30.0 min", "14.4 s", "0.7 s", "0.004 s"]


def test_rates_are_written_out() -> None:
    assert [rate(value) for value in (123456.7, 1000, 999.96, 41.25, 4.192, 0.1234)] == [
        "123,457", "1,000", "1000", "41.25", "4.192", "0.12",
    ]  # fmt: skip


@given(
    epochs=st.integers(1, 1000),
    student=st.floats(1, 1e4),
    teacher=st.floats(1, 1e4),
    extraction=st.floats(0.001, 1e4),
)
def test_hours_saved(epochs: int, student: float, teacher: float, extraction: float) -> None:
    plan = pretraining_hours(10**6, epochs, speed(student), speed(teacher), extraction)
    assert plan.saved_hours == pytest.approx(plan.online_hours - plan.pretrain_hours - extraction, rel=1e-6, abs=1e-6)
    assert plan.pays_from_epochs is not None
    pays = pretraining_hours(10**6, plan.pays_from_epochs, speed(student), speed(teacher), extraction)
    assert pays.saved_hours > 0
    if plan.pays_from_epochs > 1:
        before = pretraining_hours(10**6, plan.pays_from_epochs - 1, speed(student), speed(teacher), extraction)
        assert before.saved_hours <= 1e-9


def test_pixels_need_no_teacher() -> None:
    plan = pretraining_hours(1000, 5, speed(10), None, 1.0)
    assert (plan.saved_hours, plan.pays_from_epochs) == (-1.0, None)


# --- images and devices that are not here -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> PlanReport:
    settings = params("prepare.samples_per_shard=10000", "pretrain.epochs=8", "extract.threads=12")
    targets = tmp_path_factory.mktemp("far") / "targets"
    return api.plan(scenes, targets, settings, sample=16, total=10**9, devices=64, tflops=39.0)


def test_a_billion_images_like_these(elsewhere: PlanReport, report: PlanReport) -> None:
    assert (elsewhere.images.total, elsewhere.images.shards, elsewhere.views) == (10**9, 100_000, 2 * 10**9)
    assert str(elsewhere.images) == "1,000,000,000 in 100,000 shards (as given)"
    assert elsewhere.chosen.bytes / elsewhere.views == pytest.approx(report.chosen.bytes_per_view, rel=0.05)
    assert elsewhere.cluster.tasks == 100_000
    hours = elsewhere.extraction.hours
    assert set(hours) == {1, 8, 64}
    assert hours[1] * 3600 == pytest.approx(2e9 / elsewhere.extraction.views_per_second)
    assert elsewhere.cluster.shard_hours == pytest.approx(hours[1] / 100_000)


def test_rates_follow_from_counted_arithmetic(elsewhere: PlanReport) -> None:
    for speed in (elsewhere.teacher, elsewhere.student, elsewhere.teacher_online):
        assert speed is not None
        assert speed.source == "counted"
        assert speed.per_second > 1000
    lines = rows(elsewhere)
    assert "GFLOP each at 39 TFLOP/s" in lines["teacher"]
    assert "GFLOP each at 39 TFLOP/s" in lines["student"]
    assert not any("was measured on a batch" in line for line in elsewhere.warnings)


def test_what_is_counted_is_what_a_transformer_does(scenes: Path) -> None:
    """Products of the bundled teacher, by hand: patches, the blocks' attention and MLP, the projection."""
    model = load_teacher(TeacherSettings())
    visual: Any = model.visual
    blocks, tokens = len(visual.transformer.resblocks), 65
    width = visual.conv1.weight.shape[0]
    hidden = visual.transformer.resblocks[0].mlp.c_fc.out_features
    expected = 64 * width * 8 * 8 * 3
    expected += blocks * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden)
    expected += tokens * width * model.info.width
    pixels = sample_images(expand_shards(scenes), load_params(None), 1, nothing).pixels_NHWC
    assert teacher_flops(model, pixels) == pytest.approx(2 * expected, rel=0.005)


def test_a_node_reads_what_its_devices_take(elsewhere: PlanReport) -> None:
    node = elsewhere.node
    assert node.devices == 8
    assert node.images_per_second == pytest.approx(8 * elsewhere.student.per_second)
    assert node.bytes_per_second == pytest.approx(node.images_per_second * elsewhere.chosen.bytes_per_view)
    assert node.cores == pytest.approx(node.images_per_second / node.loader_per_core)


def test_what_gives_in_first_comes_first(elsewhere: PlanReport) -> None:
    shares = [limit.share for limit in elsewhere.limits]
    assert shares == sorted(shares, reverse=True)
    first = elsewhere.limits[0]
    assert (first.name, first.share > 1) == ("free disk", True)
    line = rows(elsewhere)["gives in first"]
    assert line.startswith("free disk: ")
    assert first.advice in line
    assert {limit.name for limit in elsewhere.limits} >= {"scheduler", "shards", "start again", "names of shards"}


def limit_of(**more: Any) -> dict[str, float]:
    values: dict[str, Any] = {"shards": 1000, "hours": 10.0, "devices": 8, "cores": 4, "files": 10**6, **more}
    images = ImageCount(total=10**6, source="given", shards=values["shards"], looked_at=0, bytes=0)
    store = StoreEstimate(
        codec="int8", format="zarr", bytes_per_view=1e5, bytes=10**11, files=10**5, record_bytes=10**9, mean_cosine=1
    )
    extraction = ExtractionHours(views_per_second=1, limited_by="teacher", hours={1: values["hours"]})
    found = limits(
        images,
        store,
        space.FreeSpace(folder="t", needed_bytes=10**11, free_bytes=10**12),
        values["files"],
        cluster_load(images, extraction, values["devices"]),
        node_load(speed(100), store.bytes_per_view, 1000, values["devices"]),
        values["cores"],
    )
    return {limit.name: limit.share for limit in found}


def test_each_limit_is_a_share_of_what_there_is() -> None:
    usual = limit_of()
    assert usual["free disk"] == pytest.approx(0.1)
    assert usual["number of files"] == pytest.approx(0.1)
    assert usual["shards"] == pytest.approx(8 / 1000)
    assert usual["length of a shard"] == pytest.approx(10 / 1000)
    assert usual["processors of a node"] == pytest.approx(0.8 / 4)
    assert usual["names of shards"] == pytest.approx(1e-3)
    # 8 shards of 36 seconds at a time.
    assert usual["scheduler"] == pytest.approx(8 / 36 * SCHEDULER_TASK_SECONDS)
    assert limit_of(devices=64)["processors of a node"] == usual["processors of a node"]
    assert limit_of(shards=4, devices=8)["shards"] == 2
    assert "number of files" not in limit_of(files=None)


def test_files_that_can_be_made_are_counted_where_the_store_will_lie(tmp_path: Path, bucket: str) -> None:
    assert space.free_files(location_of(tmp_path / "not" / "yet")) == space.free_files(location_of(tmp_path))
    assert space.free_files(location_of(f"{bucket}/t")) is None


# --- free disk ----------------------------------------------------------------------------------------------------


def short_of_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_a_disk_without_room_is_told(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_disk(monkeypatch, 100_000)
    report = api.plan(scenes, tmp_path / "t", params(), sample=8)
    assert report.space.short
    (line,) = [line for line in report.warnings if "free at" in line]
    assert "will need about" in line
    assert "100.00 KB are free" in line


def test_extraction_warns_before_the_first_view(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    short_of_disk(monkeypatch, 100_000)
    images = max(scenes.glob("*.tar"))
    api.extract_targets(images, tmp_path / "t", params())
    warned = [str(warning.message) for warning in recwarn if "free at" in str(warning.message)]
    assert len(warned) == 1
    assert "may need up to" in warned[0]
    # Nothing is left to be done, so nothing more is needed.
    recwarn.clear()
    api.extract_targets(images, tmp_path / "t", params())
    assert [warning for warning in recwarn if "free at" in str(warning.message)] == []


def test_a_disk_with_room_and_a_bucket_are_not_reported(scenes: Path, bucket: str) -> None:
    shards = expand_shards(scenes)
    assert space.free_space_warning(space.free_space(location_of("somewhere/new"), 1)) is None
    assert space.free_space(location_of(f"{bucket}/t"), 10**18).free_bytes is None
    assert indexed_images(shards) == 100


# --- the command --------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["milan-pipe", "plan", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize("far", [False, True])
def test_the_command(
    scenes: Path, far: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milan_pipe.cli.console.console.width", 80)
    words = [part for text in SETTINGS for part in ("--set", text)]
    more = ["--total", 10**9, "--devices", 512, "--tflops", 39] if far else []
    code, out, err = run(capsys, monkeypatch, scenes, "--sample", 8, "--json", *more, *words)
    assert code == 0
    values: dict[str, Any] = json.loads(out)
    assert values["images"]["total"] == (10**9 if far else 100)
    assert ("512" in values["extraction"]["hours"]) == far
    assert [store["codec"] for store in values["stores"]] == ["float16", "float16", "int8", "int8", "klt", "klt"]
    assert max(len(line) for line in err.splitlines() if "warning:" not in line) <= 80
    assert "…" not in err


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["nowhere"], "nowhere"),
        (["SCENES", "--set", "teacher.model=no-such"], "no-such"),
        (["SCENES", "--set", "student.image_size=60"], "60"),
        (["SCENES", "--set", "codec.name=best"], "codec.name"),
    ],
)
def test_mistakes_are_one_line(
    scenes: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    word: str,
) -> None:
    code, out, err = run(capsys, monkeypatch, *[str(scenes) if word == "SCENES" else word for word in words])
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out, len(errors)) == (2, "", 1)
    assert word in errors[0]
