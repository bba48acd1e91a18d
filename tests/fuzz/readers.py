"""Every reader of what comes from outside, with small files that the project's own writers made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz.harness import Files, Reader, each
from huggingface_hub.utils import _http as hub_http
from PIL import Image
from safetensors.torch import save_file
from support.images import image, labelled_shard, mask, png, write_tar
from support.targets import differences, header, joined, random_blocks, write_blocks
from support.timm_models import timm_folder

from milan_pipe.cli.reports import _extraction
from milan_pipe.config.images import IMAGE_LIMITS, PrepareSettings
from milan_pipe.config.params import Params, load_params
from milan_pipe.config.pretraining import PretrainSettings
from milan_pipe.config.student import DecoderSettings, StudentSettings
from milan_pipe.digests import sha256_of, with_digest
from milan_pipe.embeddings.run import embed
from milan_pipe.errors import DataError
from milan_pipe.evaluation.backbone import student_of
from milan_pipe.evaluation.batches import BadImages
from milan_pipe.evaluation.classifier import classifier_of
from milan_pipe.evaluation.features import LabelledFeatures, kept_features
from milan_pipe.evaluation.results import FOLDER, Evaluation, keep_evaluation, read_evaluations
from milan_pipe.images.count import count_images
from milan_pipe.images.decode import decode_image, decode_pixels, stored_suffix
from milan_pipe.images.index import ImageIndex, ShardRecord, begin_index, read_index, write_index
from milan_pipe.images.labelled import labelled_images
from milan_pipe.images.masked import MaskRule, decode_mask, masked_images, read_classes
from milan_pipe.images.shards import expand_shards
from milan_pipe.images.source_table import find_tables, table_source
from milan_pipe.images.tar import read_shard
from milan_pipe.interop.published_file import import_published
from milan_pipe.interop.push import push
from milan_pipe.interop.timm_layout import export_student, load_student
from milan_pipe.pretraining.bad_batch import replay, write_bad_batch
from milan_pipe.pretraining.run import configuration_of, pretrain
from milan_pipe.pretraining.start import Start, keep_start, kept_start, start_from
from milan_pipe.pretraining.statistics import keep_statistics, statistics_of
from milan_pipe.reports import report
from milan_pipe.reports.inspect_student import teachers_of
from milan_pipe.reports.runs import read_runs
from milan_pipe.reports.store_facts import store_facts
from milan_pipe.storage.hub import HubFolder
from milan_pipe.student.encoder import build_encoder
from milan_pipe.student.model import build_student
from milan_pipe.student.published import published_state_dict
from milan_pipe.student.standardise import standardise_of
from milan_pipe.targets import manifest
from milan_pipe.targets.checksum import crc32c
from milan_pipe.targets.codec import decode_run
from milan_pipe.targets.schema import ViewDigest, ViewRun
from milan_pipe.targets.store import HEADER_FILES, open_targets
from milan_pipe.targets.verify import verify_store
from milan_pipe.teacher.normalization import normalization_of
from milan_pipe.teacher.source import find_source
from milan_pipe.training.checkpoint import open_checkpoint, require_same_configuration, save_checkpoint
from milan_pipe.training.distributed import joined as joined_ranks
from milan_pipe.training.lock import only_writer
from milan_pipe.training.metrics import MetricWriter, cut_metrics

STUDENT = StudentSettings(image_size=16, patch_size=8, width=8, depth=1, heads=2)
PARAMS = Params(
    student=STUDENT,
    decoder=DecoderSettings(width=8, depth=1, heads=2),
    pretrain=PretrainSettings(epochs=2, batch_size=3, device="cpu", precision="float32", log_every=1),
)


def _ignore(*_: object) -> None:
    pass


def _shared(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that several readers of one run of the tests begin with; it costs seconds."""
    found = folder.parents[1] / f"shared-{name}"
    if not found.exists():
        scratch = folder / "scratch"
        make(scratch)
        shutil.rmtree(found, ignore_errors=True)
        scratch.rename(found)
    return found


# --- images -------------------------------------------------------------------------------------------------------


def _image_files(folder: Path) -> None:
    folder.mkdir()
    pixels, deep = image(3, 1), np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, values, given in (
        ("plain.jpg", pixels, {"quality": 80}),
        ("turned.jpg", pixels, {"quality": 80, "exif": exif}),
        ("grey.jpg", pixels[..., 0], {"progressive": True}),
        ("plain.png", pixels, {}),
        ("deep.png", deep, {}),
        ("mask.png", mask(3), {}),
        ("plain.webp", pixels, {"quality": 50}),
        ("plain.bmp", pixels[:4], {}),
    ):
        Image.fromarray(values).save(folder / name, **given)
    Image.fromarray(pixels).quantize(16).save(folder / "colours.gif", transparency=1)
    Image.fromarray(pixels).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.dstack([pixels, pixels[..., 0]])).save(folder / "clear.png")


def _read_image(folder: Path) -> None:
    rule = MaskRule(classes=3, ignore_index=255, zero_is_ignored=False)
    data = next((path.read_bytes() for path in folder.iterdir()), b"")
    each(
        lambda: stored_suffix(data),
        lambda: decode_image(data),
        lambda: decode_pixels(data),
        lambda: decode_pixels(data, lambda *_: 2),
        lambda: decode_mask(data, rule, (20, 23), "k"),
    )


def _one_image(folder: Path) -> None:
    made = folder / "scratch"
    _image_files(made)
    for number, path in enumerate(sorted(made.iterdir())):
        (folder / str(number)).mkdir()
        path.rename(folder / str(number) / path.name)
    made.rmdir()


def _shards(folder: Path) -> None:
    labelled_shard(folder / "0" / "a-000000.tar", range(3))
    labelled_shard(folder / "1" / "b-000000.tar", range(2), masks=True)
    members = {
        "dir/a.jpg": png(image(1, 0)),
        "dir/a.json": b'{"label": 2, "caption": "two bees", "n": [1, 2.5, null]}',
        "dir/b.png": png(image(2, 1)),
        "dir/b.txt": "ein Käfer".encode(),
        "dir/b.cls": b"1",
        "dir/" + "c" * 120 + ".png": png(image(4, 1)),
    }
    write_tar(folder / "2" / "c-000000.tar", members)
    for number, masks in enumerate((None, ("bee", "cat"), None)):
        shards = [
            ShardRecord(name=path.name, split="train", samples=3, bytes=path.stat().st_size, sha256="0" * 64)
            for path in sorted((folder / str(number)).glob("*.tar"))
        ]
        index = ImageIndex(
            source={"kind": "demo"}, classes=("ant", "bee", "cat"), mask_classes=masks, shards=tuple(shards)
        )
        write_index(folder / str(number), index)


def _read_shards(folder: Path) -> None:
    shards = expand_shards(folder)

    def samples(*, locate: bool) -> None:
        for sample in read_shard(shards[0], _ignore, locate=locate):
            assert sample.label >= -1
            sample.key.encode()

    def labelled() -> None:
        found = labelled_images(folder, _ignore)
        for number in range(len(found)):
            found.read(number)

    def masked() -> None:
        found = masked_images(folder, "train", _ignore)
        for number in range(len(found)):
            found.image(number)
            found.mask(number)

    each(
        lambda: samples(locate=False),
        lambda: samples(locate=True),
        lambda: count_images(shards, _ignore),
        labelled,
        masked,
    )


def _read_index(folder: Path) -> None:
    each(
        lambda: read_index(folder),
        lambda: count_images(expand_shards(folder), _ignore),
        lambda: labelled_images(folder, _ignore),
        lambda: begin_index(folder, {"kind": "demo"}),
    )


def _indexes(folder: Path) -> None:
    _shards(folder)
    # Prepared by halves.
    shutil.copytree(folder / "0", folder / "3")
    (folder / "3" / "index.json").unlink()
    (folder / "3" / ".prepare-is-running").write_text('{"kind": "demo", "seed": 1}\n')


def _class_lists(folder: Path) -> None:
    for name, text in (
        ("classes.txt", "ant\nbee\n\ncat, tabby\n"),
        ("classes.json", '["ant", "bee", "cat"]'),
        (
            "objectInfo150.txt",
            "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t11\t1\t1\twall\n2\t0.1\t6\t1\t1\tbuilding, edifice\n",
        ),
    ):
        (folder / f"{name}-folder").mkdir()
        (folder / f"{name}-folder" / name).write_text(text)


def _read_class_list(where: Path) -> None:
    read_classes(where / where.name.removesuffix("-folder"))


# --- tables -------------------------------------------------------------------------------------------------------


def _lists(folder: Path) -> None:
    for number, (suffix, separator) in enumerate((("csv", ","), ("tsv", "\t"))):
        root = folder / str(number)
        (root / "images").mkdir(parents=True)
        lines = [separator.join(("path", "label", "caption"))]
        for one in range(4):
            (root / "images" / f"{one}.png").write_bytes(png(image(one, 0)))
            label = ("ant", "bee", "", "ant")[one] if number else str(one % 2)
            lines.append(separator.join((f"images/{one}.png", label, f'"a ""caption"" {one}"')))
        (root / f"list.{suffix}").write_text("\n".join(lines) + "\n")


def _tables(folder: Path) -> None:
    for number in range(3):
        root = folder / str(number)
        root.mkdir()
        images = [png(image(one, 0)) for one in range(4)]
        held: Any = images if number == 0 else [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)]
        columns = {"image": held, "label": [0, 1, 1, 0], "caption": ["a", "b", None, "d"]}
        if number == 2:
            columns["label"] = ["ant", "bee", "ant", "bee"]
        table = pa.table(columns)
        if number == 1:
            features = {"label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / "train-00000-of-00001.parquet", row_group_size=2)


def _refuse_download(*_: object) -> bytes:
    raise DataError("no network here")


def _read_tables(folder: Path) -> None:
    # No case may ask the network.
    with mock.patch("milan_pipe.images.source_table.download", _refuse_download):
        for path in sorted(folder.glob("*.*")):
            settings, bad = PrepareSettings(samples_per_shard=3, downloads=1), []
            source = table_source(path, find_tables(path), settings, IMAGE_LIMITS)
            for job in source.jobs:
                for key, members in job.part.members(bad):
                    assert key.isprintable()
                    assert members
            json.dumps(bad)


def _listing(folder: Path) -> None:
    root = folder / "0"
    root.mkdir()
    entries = [
        {"type": "file", "oid": "a" * 40, "size": 123, "path": "data/train-000000.tar"},
        {"type": "directory", "oid": "b" * 40, "path": "data/more"},
        {
            "type": "file",
            "oid": "c" * 40,
            "size": 12345,
            "path": "data/train.parquet",
            "lfs": {"oid": "d" * 64, "size": 12345, "pointerSize": 130},
            "lastCommit": {"id": "e" * 40, "title": "x", "date": "2024-01-01T00:00:00.000Z"},
        },
    ]
    (root / "tree.json").write_text(json.dumps(entries))
    (root / "info.json").write_text(json.dumps({"id": "a/b", "sha": "f" * 40, "siblings": [], "tags": []}))


def _read_listing(folder: Path) -> None:
    """The hub's answers, by the client of huggingface_hub without a network below it."""
    client = getattr(hub_http, "httpx2", None) or hub_http.httpx

    def answer(request: Any) -> Any:
        name = "tree.json" if "/tree/" in request.url.path else "info.json"
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        return client.Response(200, content=content, headers={"content-type": "application/json"})

    hub_http.set_client_factory(lambda: client.Client(transport=client.MockTransport(answer)))
    where = HubFolder("hf://datasets/a/b/data")
    for paths in (where.sizes(), where.listing().files):
        for path, size in paths.items():
            assert not {"", ".", ".."} & {*path.split("/")}
            assert isinstance(size, int)


# --- target stores ------------------------------------------------------------------------------------------------

_FILES_OF_STORE = r"(?!truth).*"
_CODECS = (("int8", 1), ("float16", 0), ("klt", 1))


@cache
def _blocks(codec: str, store_format: str, level: int) -> tuple[Any, Any]:
    head = header(codec, format=store_format, zstd_level=level, width=4)
    return head, random_blocks(head, 3, seed=7)


def _stores(folder: Path, store_format: str, *, done: bool = True) -> None:
    for number, (codec, level) in enumerate(_CODECS):
        head, blocks = _blocks(codec, store_format, level)
        where = folder / f"{number}-{codec}-{level}"
        write_blocks(where, head, [blocks])
        if not done:
            (where / "manifest.json").unlink()


def _runs_of(where: Path) -> dict[int, ViewRun]:
    """All reads that training and others do; a MilanError where one refuses."""
    store = open_targets(where)
    count, views = store.samples("000000") if "000000" in store.shards else 0, store.header.views.count
    runs = {}
    for view in range(min(views, 3)):
        runs[view] = (
            store.read("000000", view, 0, min(count, 128)) if count else store.read(store.shards[0], view, 0, 1)
        )
    if count:
        store.keys("000000")
        store.read("000000", 0, 0, 1, with_views=False)
        store.read("000000", 0, 0, 1, with_features=False)
    return runs


def _read_store(store_format: str, where: Path) -> None:
    """What is read is what was written: nothing here fits a digest to what was changed."""
    _, codec, level = where.name.split("-")
    runs = _runs_of(where)
    _, blocks = _blocks(codec, store_format, int(level))
    for view, run in runs.items():
        wrong = differences(run, joined(blocks, view))
        assert not wrong, f"view {view} has other {wrong}"


def _read_sealed_store(where: Path) -> None:
    """Whoever fits all digests vouches for the values: they must be of the sizes and types that the header says."""
    head = open_targets(where).header

    def runs() -> None:
        for run in _runs_of(where).values():
            count = len(run.keys)
            assert run.code_NST.shape == (count, head.tokens, head.teacher.width)
            assert run.attention_NL.shape == (count, head.patches)
            assert (run.scale_NS is None) or run.scale_NS.shape == (count, head.tokens)
            assert (run.crop_N4.shape, run.flip_N.shape, run.label_N.shape) == ((count, 4), (count,), (count,))
            assert len(run.jpegs) == count
            assert all(isinstance(key, str) for key in run.keys)
            decode_run(head.codec, run)

    each(runs, lambda: store_facts(open_targets(where)))


def _seal_store(files: Files, changed: str) -> None:
    """Fit digests of a store to its files; those of JSON that cannot be parsed stay as they are."""
    name = next((name for name in HEADER_FILES if name in files), "")
    if changed == name:
        try:
            content = json.loads(files[name])
            inner = content.get("attributes", content)
            values = dict(inner["milan_pipe"])
            values.pop("sha256", None)
            inner["milan_pipe"] = with_digest(values)
            files[name] = json.dumps(content).encode()
        except (ValueError, LookupError, TypeError, RecursionError, AttributeError):
            return
    for path in [path for path in files if path.startswith("manifest/")]:
        try:
            record = json.loads(files[path])
            record.pop("sha256", None)
            shard = path.removeprefix("manifest/").removesuffix(".json")
            if path != changed:
                for inside, file in record["files"].items():
                    data = files.get(f"shards/{shard}/{inside}")
                    if data is not None:
                        file.update(bytes=len(data), sha256=sha256_of(data))
                for inside, blocks in record["blocks"].items():
                    data = files.get(f"shards/{shard}/{inside}", b"")
                    ends = [start for start, _ in blocks[1:]] or [len(data)]
                    for block, end in zip(blocks, ends, strict=False):
                        block[1] = crc32c(data[block[0] : end])
            files[path] = manifest.to_file(record)
        except (ValueError, LookupError, TypeError, RecursionError, AttributeError):
            return


def _sidecars(folder: Path) -> None:
    head, blocks = _blocks("int8", "webdataset", 1)
    for number in range(2):
        where = folder / str(number)
        write_blocks(where / "store", head, [blocks])
        with mock.patch("milan_pipe.targets.schema.BLOCK_SAMPLES", 128):
            store = open_targets(where / "store")
            keep_statistics(statistics_of(store, where / "run", 0), store, where / "run", 0)
        if number:
            shutil.rmtree(where / "run")


def _read_sidecars(where: Path) -> None:
    store = open_targets(where / "store")
    found = statistics_of(store, where / "run", 0)
    for kind in ("none", "scale", "phi-s"):
        module = standardise_of(kind, found, store.header.teacher.width)  # type: ignore[arg-type]
        assert module(torch.ones(1, store.header.tokens, store.header.teacher.width)).shape[-1] == 4


# --- runs ---------------------------------------------------------------------------------------------------------


def _trained(scratch: Path) -> None:
    scratch.mkdir()
    head = header(size=16)
    write_blocks(scratch / "targets", head, [random_blocks(head, 6)])
    pretrain(scratch / "targets", scratch / "run", PARAMS)


@cache
def _views() -> list[str]:
    """Of the store that the run was trained on."""
    digest = ViewDigest()
    for block in random_blocks(header(size=16), 6):
        digest.add(block)
    return [digest.value()]


def _run(folder: Path) -> Path:
    return _shared(folder, "run", _trained) / "run"


def _checkpoints(folder: Path) -> None:
    shutil.copytree(_run(folder), folder / "0")
    encoder = build_encoder(STUDENT)
    torch.manual_seed(0)
    record = {
        "task": "finetune",
        "student": STUDENT.model_dump(mode="json"),
        "classes": ["ant", "bee"],
        "scores": {"top1": 0.5},
        "crop": 0.875,
        "finished": False,
        "configuration": {"student": {"weights": "0" * 64}},
    }
    from milan_pipe.evaluation.classifier import build_vit

    save_checkpoint(folder / "1", 3, {"model": build_vit(STUDENT, 2).state_dict()}, record)
    save_checkpoint(folder / "2", 3, {"student": encoder.state_dict()}, {"student": STUDENT.model_dump(mode="json")})


def _seal_checkpoint(files: Files, changed: str) -> None:
    for path in [path for path in files if path.endswith("checkpoint.json")]:
        try:
            record = json.loads(files[path])
            record.pop("sha256", None)
            if path != changed:
                for name, file in record["files"].items():
                    data = files[f"{path.rpartition('/')[0]}/{name}"]
                    file.update(bytes=len(data), sha256=sha256_of(data))
            files[path] = json.dumps(with_digest(record), indent=2, sort_keys=True).encode()
        except (ValueError, LookupError, TypeError, RecursionError, AttributeError):
            return


def _read_checkpoint(where: Path) -> None:
    found = open_checkpoint(where)
    head = header(size=16)

    def weights() -> None:
        for part in ("student", "decoder", "model"):
            if (found.path / f"{part}.safetensors").is_file():
                found.weights(part)

    each(
        weights,
        lambda: student_of(found),
        lambda: classifier_of(found),
        lambda: require_same_configuration(found, configuration_of([head], (6,), PARAMS, views=_views()), where),
        lambda: load_student(where),
        lambda: start_from(str(where), STUDENT.model, build_encoder(STUDENT)),
        lambda: teachers_of(found.record),
    )


def _runs(folder: Path) -> None:
    run = _run(folder)
    for number in range(2):
        shutil.copytree(run, folder / str(number))
        evaluation = Evaluation(
            task="knn", subject="run", identity="0" * 64, scores={"k=5": 0.5, "k=1": 0.25}, data="a -> b", train=4,
            test=2, command="milan-pipe knn run a b",
        )  # fmt: skip
        keep_evaluation(folder / str(number) / FOLDER, evaluation)
        start = Start(init="x", sha256="0" * 64, source=None, license=None, trains_positions=False)
        keep_start(folder / str(number), start)
        (folder / str(number) / "bad.jsonl").write_text('{"key": "a", "reason": "b"}\n{"key": "c", "reason": "d"}\n')
        (folder / str(number) / "times.json").write_text(
            json.dumps({"views": 9, "seconds": 2.5, "views_per_second": 3.6, "phases": {"teacher": 1.5, "jpeg": 0.5}})
        )


def _read_run(where: Path) -> None:
    def metrics() -> None:
        cut_metrics(where / "metrics", 1)
        MetricWriter(where / "metrics", resume=True).point(2, {"train/loss": 0.5})

    each(
        lambda: read_runs([where]),
        lambda: report._times(_extraction(where / "times.json")),
        lambda: read_evaluations(where / FOLDER),
        lambda: kept_start(where),
        lambda: BadImages(where / "bad.jsonl").add("e", "f"),
        metrics,
        lambda: pretrain_again(where),
    )


def pretrain_again(where: Path) -> None:
    from milan_pipe.training.runner import _finished

    _finished(where, open_checkpoint(where))


def _read_report(where: Path) -> None:
    # Charts take most of the time, and get numbers alone.
    with mock.patch.multiple(report, line_chart=lambda *_: "", bar_chart=lambda *_: ""):
        out = where / "page" / "report.html"
        report.write_report([where], out, evaluations=[where / FOLDER], extraction=_extraction(where / "times.json"))
        text = out.read_text(encoding="utf-8")
        assert "<b>m</b>" not in text


def _locks(folder: Path) -> None:
    (folder / "0").mkdir()
    (folder / "0" / ".lock").write_text('{"host": "a", "pid": 12, "since": "2024-01-01 00:00:00+00:00"}\n')


def _read_lock(where: Path) -> None:
    with joined_ranks("cpu", lambda: "") as ranks, only_writer(where, ranks):
        pass


def _batches(folder: Path) -> None:
    from milan_pipe.loader.stream import Batch

    head = header(size=16)
    student = build_student(STUDENT, PARAMS.decoder, head.teacher.width)
    (block,) = random_blocks(head, 2)
    assert block.scale_KNS is not None
    batch = Batch(
        keys=("a", "b"),
        pixels_BHWC=torch.zeros(2, 16, 16, 3, dtype=torch.uint8),
        code_BST=torch.from_numpy(block.code_KNST[0]),
        scale_BS=torch.from_numpy(block.scale_KNS[0]),
        attention_BL=torch.from_numpy(block.attention_KNL[0]),
    )
    sections = {name: getattr(PARAMS, name) for name in ("student", "decoder", "masking", "teachers", "pretrain")}
    metadata = {
        "step": 3,
        "epoch": 0,
        "header": head.model_dump(mode="json"),
        "others": [],
        "target": "clip",
        **{name: section.model_dump(mode="json") for name, section in sections.items()},
    }
    weights = {"student": student.encoder.state_dict(), "decoder": student.decoder.state_dict(), "statistics": {}}
    (folder / "0").mkdir()
    write_bad_batch(folder / "0" / "step-00000003.safetensors", batch, weights, metadata)


def _read_batch(where: Path) -> None:
    replay(where / "step-00000003.safetensors", device="cpu")


def _embeddings(folder: Path) -> None:
    for number, kind in enumerate(("parquet", "zarr")):
        where = folder / str(number)
        labelled_shard(where / "images" / "a-000000.tar", range(2))
        embed("random", where / "images", where / "out", _embedding(kind))


def _embedding(kind: str) -> Params:
    return Params(student=STUDENT, embed={"format": kind, "batch_size": 2, "threads": 1})  # type: ignore[arg-type]


def _read_embeddings(where: Path) -> None:
    kind = "parquet" if where.name == "0" else "zarr"
    embed("random", where / "images", where / "out", _embedding(kind))


def _features(folder: Path) -> None:
    (folder / "0").mkdir()
    _kept(folder / "0")


def _kept(where: Path) -> LabelledFeatures:
    def compute() -> LabelledFeatures:
        return LabelledFeatures(features_NF=torch.ones(3, 4), label_N=torch.tensor([0, 1, 1]))

    return kept_features(where, {"a": 1}, compute)


# --- weights of others --------------------------------------------------------------------------------------------


def _published(folder: Path) -> None:
    for number, kind in enumerate(("prompting", "plain", "prompting")):
        torch.manual_seed(number)
        student = build_student(STUDENT, DecoderSettings(kind=kind, width=8, depth=1, heads=2), 6)  # type: ignore[arg-type]
        state = published_state_dict(student)
        root = folder / str(number)
        root.mkdir()
        if number == 0:
            torch.save({"model": state, "epoch": 399}, root / "published.pth")
        elif number == 1:
            torch.save(state, root / "published.pth", _use_new_zipfile_serialization=False)
        else:
            save_file(dict(state), root / "published.safetensors")


def _read_published(where: Path) -> None:
    file = next(iter(sorted(where.glob("published.*"))), where / "published.pth")
    import_published(file, where / "run", encoder_heads=2, decoder_heads=2)


_TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 4},
    "text_cfg": {"context_length": 4, "vocab_size": 4, "width": 8, "heads": 2, "layers": 1},
}
_OPEN_CLIP_WORDS = (
    "vision_cfg", "timm_model_name", "timm_model_pretrained", "timm_pool", "resnet50", "vit_tiny_patch16_224", "layers",
    "attentional_pool", "pool_type", "patch_dropout", "act_kwargs", "norm_kwargs", "block_type", "quick_gelu",
    "hf-hub:a/b", "local-dir:/tmp", "output_tokens", "embed_dim", "image_size", "no_ln_pre", "pos_embed_type",
    "attn_pooler_queries", "final_ln_after_pool", "image_mean", "mean", "std", "cast_dtype", "custom_text",
)  # fmt: skip
_CARD = "---\nlicense: apache-2.0\ntags:\n- a\n---\n\n# a\n"


def _clip_folders(folder: Path) -> None:
    for number in range(2):
        root = folder / str(number)
        root.mkdir()
        torch.manual_seed(1)
        config = {
            "model_cfg": _TINY_CLIP,
            "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "size": 16},
        }
        (root / "open_clip_config.json").write_text(json.dumps(config))
        state = open_clip.model.CLIP(**_TINY_CLIP).state_dict()
        if number:
            torch.save(state, root / "open_clip_pytorch_model.bin")
        else:
            save_file(state, root / "open_clip_model.safetensors")
        (root / "words.txt").write_text("ant\nbee\n")
        (root / "README.md").write_text(_CARD)


def _read_clip_folder(where: Path) -> None:
    def teacher() -> None:
        source = find_source(f"local-dir:{where}", None)
        source.license()
        model = source.trained()
        normalization_of("clip", source, model)

    def beside() -> None:
        """The description beside a checkpoint that a setting names."""
        file = next((path for path in sorted(where.glob("open_clip_*")) if path.suffix != ".json"), where / "none")
        source = find_source("ViT-B-32", str(file))
        normalization_of("clip", source, torch.nn.Identity())

    each(teacher, beside)


def _timm_folders(folder: Path) -> None:
    for number, kind in enumerate(("plain", "map")):
        timm_folder(folder / str(number), kind)
        (folder / str(number) / "README.md").write_text(_CARD)


_TIMM_WORDS = (
    "architecture", "pretrained_cfg", "model_args", "hf_hub_id", "url", "file", "source", "hf-hub", "checkpoint_path",
    "num_classes", "img_size", "depth", "embed_dim", "act_layer", "norm_layer", "global_pool", "resnet18",
    "custom_load", "state_dict", "classifier", "first_conv", "vit_base_patch16_224", "local-dir:/tmp", "pretrained",
)  # fmt: skip


def _read_timm_folder(where: Path) -> None:
    source = find_source(f"timm:local-dir:{where}", None)
    source.license()
    normalization_of("clip", source, source.trained())


def _exported(folder: Path) -> None:
    export_student(_run(folder), folder / "0")


def _read_exported(where: Path) -> None:
    each(
        lambda: load_student(where),
        lambda: start_from(str(where), STUDENT.model, build_encoder(STUDENT)),
        lambda: push(where, "org/name", dry_run=True),
    )


# --- settings -----------------------------------------------------------------------------------------------------

_PARAMS_FILE = """\
views: {count: 2, scale: [0.5, 1.0], seed: 3}
teacher: {model: demo, precision: float32}
codec: klt
masking: random
student: {model: vit_tiny_patch16_224, width: 32, depth: 2, heads: 2}
decoder: {kind: plain, width: 16, depth: 1}
target: clip
teachers: {standardise: phi-s}
pretrain:
  batch_size: 16
  betas: [0.9, 0.95]
  lr: 1.0e-3
knn: {neighbours: [1, 5]}
linear_probe: {l2: [0.1, 1.0]}
about: {summary: for tests}
"""


def _params(folder: Path) -> None:
    for number, text in enumerate((_PARAMS_FILE, "a: 1\n")):
        (folder / str(number)).mkdir()
        lines = [line for line in text.splitlines(keepends=True) if not line.startswith(("about", "a:"))]
        (folder / str(number) / "params.yaml").write_text("".join(lines) or "views: {count: 2}\n")


def _read_params(where: Path) -> None:
    found = load_params(where / "params.yaml", ["views.seed=4"])
    found.model_dump_json()


# A description says how large a model is: what it takes is bounded by what the machine gives.
_AS_DESCRIBED = 2**32
# pyarrow makes room for a page of up to 2 GiB before it sees that the file ends.
_PAGE = 5 * 2**29
READERS = {
    reader.name: reader
    for reader in (
        Reader(name="image", make=_one_image, read=_read_image),
        Reader(name="image-tar", make=_shards, read=_read_shards, changed=r".*\.tar"),
        Reader(name="image-index", make=_indexes, read=_read_index, changed=r".*index\.json|\.prepare-is-running"),
        Reader(name="class-list", make=_class_lists, read=_read_class_list),
        Reader(
            name="list", make=_lists, read=_read_tables, changed=r"list\..*", may_read_outside=True,
            words=("path", "label", "caption", "images/0.png", '"', '""', "url", "1.0", "-1"),
        ),
        Reader(name="parquet", make=_tables, read=_read_tables, memory=_PAGE),
        Reader(name="hub-listing", make=_listing, read=_read_listing, words=("data", "data/../x", "data/.."),),
        Reader(
            name="store-zarr", make=partial(_stores, store_format="zarr"),
            read=partial(_read_store, "zarr"),
        ),
        Reader(
            name="store-zarr-sealed", make=partial(_stores, store_format="zarr", done=False),
            read=_read_sealed_store, seal=_seal_store,
        ),
        Reader(
            name="store-webdataset", make=partial(_stores, store_format="webdataset"),
            read=partial(_read_store, "webdataset"),
        ),
        Reader(
            name="store-webdataset-sealed", make=partial(_stores, store_format="webdataset", done=False),
            read=_read_sealed_store, seal=_seal_store,
        ),
        Reader(
            name="verify-targets", make=partial(_stores, store_format="zarr", done=False), read=verify_store,
            seal=_seal_store,
        ),
        Reader(name="statistics", make=_sidecars, read=_read_sidecars, changed=r".*\.safetensors"),
        Reader(name="params", make=_params, read=_read_params),
        Reader(name="checkpoint", make=_checkpoints, read=_read_checkpoint, changed=r".*checkpoints/.*"),
        Reader(
            name="checkpoint-sealed", make=_checkpoints, read=_read_checkpoint, changed=r".*checkpoints/.*",
            seal=_seal_checkpoint, memory=_AS_DESCRIBED,
        ),
        Reader(name="run", make=_runs, read=_read_run, changed=r"(?!checkpoints).*"),
        Reader(name="report", make=_runs, read=_read_report, seal=_seal_checkpoint, memory=_AS_DESCRIBED),
        Reader(name="lock", make=_locks, read=_read_lock),
        Reader(name="bad-batch", make=_batches, read=_read_batch, memory=_AS_DESCRIBED),
        Reader(name="embeddings", make=_embeddings, read=_read_embeddings, changed=r"out/.*json"),
        Reader(name="kept-features", make=_features, read=_kept),
        Reader(name="published", make=_published, read=_read_published),
        Reader(
            name="teacher-clip", make=_clip_folders, read=_read_clip_folder, memory=_AS_DESCRIBED,
            words=_OPEN_CLIP_WORDS,
        ),
        Reader(
            name="teacher-timm", make=_timm_folders, read=_read_timm_folder, memory=_AS_DESCRIBED,
            words=_TIMM_WORDS,
        ),
        Reader(
            name="exported", make=_exported, read=_read_exported, memory=_AS_DESCRIBED, words=_TIMM_WORDS,
        ),
    )
}  # fmt: skip
