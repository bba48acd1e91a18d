"""What extraction and pretraining will cost, before either is begun: counted, measured, extrapolated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from milan_pipe.config.params import Params
from milan_pipe.config.targets import CodecSettings, StoreFormat
from milan_pipe.errors import DataError, SettingError
from milan_pipe.extraction.space import FreeSpace, free_files, free_space, free_space_warning
from milan_pipe.extraction.stored import Images, StoredShard, require_one_source, stored_shards, with_views_of
from milan_pipe.extraction.worker import load_extraction_teacher
from milan_pipe.images.ahead import thread_count
from milan_pipe.images.count import ImageCount, count_images, like_these
from milan_pipe.images.shards import ShardFile, expand_shards
from milan_pipe.planning import load, speed, store
from milan_pipe.planning.speed import Speed
from milan_pipe.planning.store import EncodedSample, ImageSample
from milan_pipe.pretraining.objective import require_fit
from milan_pipe.storage import location_of
from milan_pipe.student.objectives import is_taught
from milan_pipe.targets.convert import require_apart
from milan_pipe.targets.schema import CodecInfo, StoreHeader
from milan_pipe.targets.several import open_several
from milan_pipe.targets.store import TargetStore, open_targets
from milan_pipe.teacher.clip import TeacherOutput

DEFAULT_TARGETS = "targets"


@dataclass(frozen=True, kw_only=True)
class PlanProgress:
    """A step of a plan that is under way, and how far it is; `total` is None where it is not known."""

    what: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan; each part says what of it is measured and what is extrapolated.

    Attributes:
        sample, sample_bad: images measured with, and met that could not be read.
        stores: of every codec that fits, in both formats.
        chosen: the one of these that the settings name.
        teacher: on batches of `extract.batch_size`.
        stores_read: by pretraining: 1, or 2 with `views_from`.
        teacher_online: on batches as large as the student's; None where the target needs no teacher, or two.
        render_views_per_second: of one thread.
        render_threads: that will render.
        cluster, node: with the devices planned for.
        limits: the tightest first.
        warnings: lines that a user should read before going on.
    """

    images: ImageCount
    views_per_image: int
    views: int
    sample: int
    sample_bad: int
    stores: tuple[store.StoreEstimate, ...]
    chosen: store.StoreEstimate
    teacher_model: str
    teacher_image_size: int
    teacher: Speed
    stores_read: int
    teacher_online: Speed | None
    student: Speed
    render_views_per_second: float
    render_threads: int
    extraction: speed.ExtractionHours
    pretraining: speed.PretrainingHours
    cluster: load.ClusterLoad
    node: load.NodeLoad
    limits: tuple[load.Limit, ...]
    space: FreeSpace
    warnings: tuple[str, ...]


def plan(
    images: str | Path | None,
    targets: str | Path | None,
    params: Params,
    *,
    views_from: str | Path | None = None,
    sample: int,
    total: int | None,
    devices: int,
    tflops: float | None,
    on_progress: Callable[[PlanProgress], None],
) -> PlanReport:
    """Count the images, measure teacher, codecs, store and student on a few of them, and extrapolate.

    Nothing is left behind: what is written goes to the temporary folder and is removed.

    Args:
        images: folder of shards, or shard paths with braces or globs; local or a URL. None with `views_from`.
        targets: where the store is meant to lie; none: a folder `targets` here. It need not exist, and a store there
            is not read.
        views_from: plan a second store, of the views of this one, and pretraining on both.
        sample: images to measure with.
        total: plan for this number of images, of which those present are a sample, in shards of
            `prepare.samples_per_shard`; none plans for these.
        devices: for extraction and pretraining.
        tflops: that a device sustains, in TFLOP/s; none measures teacher and student here.

    Raises:
        MissingError, DataError: images are missing or cannot be read.
        SettingError: unknown teacher, device or student, a number that is not above 0, or neither or both of `images`
            and `views_from`.
        MismatchError: student and teacher do not fit each other, or settings of views the store.
        StoreError: the temporary folder cannot be written.
    """
    for name, value in {"sample": sample, "total": total, "devices": devices, "tflops": tflops}.items():
        if value is not None and not value > 0:
            raise SettingError(f"{name} is {value}; a plan needs a number above 0")

    def progress(what: str, steps: int | None = None) -> Callable[[int], None]:
        return lambda done: on_progress(PlanProgress(what=what, done=done, total=steps))

    location = location_of(targets if targets is not None else DEFAULT_TARGETS)
    shards: Sequence[Images]
    first: TargetStore | None = None
    require_one_source(images, views_from)
    if images is not None:
        shards = expand_shards(images)
    elif views_from is not None:
        require_apart(location_of(views_from), location)
        if not is_taught(params.target):
            raise SettingError(f"target {params.target!r} needs no features, and a second teacher's are planned")
        first = open_targets(views_from, complete=True)
        shards, params = list(stored_shards(first).values()), with_views_of(params, first.header, views_from)
    views, codec, extract, pretrain = params.views, params.codec, params.extract, params.pretrain

    def planned(codec: CodecInfo, store_format: StoreFormat) -> StoreHeader:
        header = store.planned_header(params, info, codec, store_format)
        return header if first is None else header.model_copy(update={"views": first.header.views})

    progress("load teacher")(0)
    with speed.same_threads():
        model = load_extraction_teacher(params)
        info = model.info
        require_fit(planned(CodecInfo(name=codec.name), extract.format), params.student, images or views_from)
        counted = _counted(shards, lambda done, steps: progress("count", steps)(done))
        if total is not None:
            counted = like_these(counted, total, params.prepare.samples_per_shard)
        drawn = store.sample_images(shards, params, sample, progress("render", sample))
        progress("teacher")(0)
        output, teacher = speed.run_teacher(model, drawn.pixels_NHWC, extract.batch_size)
        if tflops is not None:
            flops = speed.teacher_flops(model, drawn.pixels_NHWC)
            teacher = speed.speed_at(tflops, flops, extract.batch_size)
        online: Speed | None = teacher
        batch_size = min(pretrain.batch_size, len(drawn.rendered))
        if not is_taught(params.target) or first is not None:
            online = None
        elif tflops is None and batch_size != teacher.batch_size:
            # As it would run beside the student in every step.
            _, online = speed.run_teacher(model, drawn.pixels_NHWC, batch_size)
        encoded, refused = _encodings(drawn, output, codec, progress("codecs", len(store.CODECS)))
    kinds = [(one, store_format) for one in encoded.values() for store_format in store.FORMATS]
    stores = []
    for done, (one, store_format) in enumerate(kinds):
        progress("stores", len(kinds))(done)
        stores.append(store.estimate_store(planned(one.codec, store_format), drawn, one, counted))
    chosen = next(found for found in stores if (found.codec, found.format) == (codec.name, extract.format))
    # What pretraining reads, the first store first.
    read = [(planned(encoded[codec.name].codec, extract.format), encoded[codec.name])]
    bytes_per_image = chosen.bytes_per_view
    if first is not None:
        read.insert(0, (first.header, store.stored_codes(first, drawn)))
        # Of the second one views are not read.
        bytes_per_image += (
            store.estimate_store(first.header, drawn, read[0][1], counted).bytes_per_view - drawn.jpeg_bytes
        )
    headers = [header for header, _ in read]
    others = tuple((one.batch.code_BST, one.batch.scale_BS) for _, one in read[1:])
    batch = replace(read[0][1].batch, others=others)
    progress("student")(0)
    if tflops is None:
        student = speed.run_student(params, headers, batch.rows(0, batch_size))
    else:
        student = speed.speed_at(tflops, speed.student_flops(params, headers, batch), pretrain.batch_size)
    progress("loader")(0)
    with ExitStack() as stack:
        folders = [stack.enter_context(store.sample_store(header, drawn, one)) for header, one in read]
        per_core = load.loader_images_per_core(
            open_several(folders, params.teachers.importance), with_targets=is_taught(params.target)
        )

    threads = thread_count(extract.threads)
    # Of a device that is not here, `extract.threads` says how many processors it has beside it.
    cores = thread_count(0) if tflops is None else threads
    extraction = speed.extraction_hours(
        counted.total * views.count, counted.shards, teacher, drawn.render_seconds, threads, cores, devices
    )
    cluster = load.cluster_load(counted, extraction, devices)
    node = load.node_load(student, bytes_per_image, per_core, devices)
    space = free_space(location, chosen.bytes)
    node_cores = cores if tflops is None else node.devices * threads
    return PlanReport(
        images=counted,
        views_per_image=views.count,
        views=counted.total * views.count,
        sample=len(drawn.rendered),
        sample_bad=drawn.bad,
        stores=tuple(stores),
        chosen=chosen,
        teacher_model=info.model,
        teacher_image_size=info.image_size,
        teacher=teacher,
        stores_read=len(read),
        teacher_online=online,
        student=student,
        render_views_per_second=1 / drawn.render_seconds,
        render_threads=threads,
        extraction=extraction,
        pretraining=speed.pretraining_hours(counted.total, pretrain.epochs, student, online, extraction.hours[1]),
        cluster=cluster,
        node=node,
        limits=load.limits(counted, chosen, space, free_files(location), cluster, node, node_cores),
        space=space,
        warnings=(*_warnings(counted, drawn, student, pretrain.batch_size, space), *refused),
    )


def _counted(shards: Sequence[Images], on_progress: Callable[[int, int], None]) -> ImageCount:
    stored = [shard for shard in shards if isinstance(shard, StoredShard)]
    if not stored:
        return count_images([shard for shard in shards if isinstance(shard, ShardFile)], on_progress)
    total, size = sum(shard.entry.samples for shard in stored), sum(shard.source.bytes for shard in stored)
    return ImageCount(total=total, source="store", shards=len(stored), looked_at=0, bytes=size)


def _encodings(
    sample: ImageSample, output: TeacherOutput, codec: CodecSettings, on_progress: Callable[[int], None]
) -> tuple[dict[str, EncodedSample], list[str]]:
    """The sample in every codec, and why another than the chosen one does not fit."""
    encoded, refused = {}, []
    for done, name in enumerate(store.CODECS):
        on_progress(done)
        try:
            encoded[name] = store.encode_sample(sample, output, codec.model_copy(update={"name": name}))
        except DataError as error:
            if name == codec.name:
                raise
            refused.append(f"codec {name} is left out: {error}")
    return encoded, refused


def _warnings(
    images: ImageCount, sample: ImageSample, student: Speed, batch_size: int, space: FreeSpace
) -> Iterator[str]:
    measured = len(sample.rendered)
    if (short := free_space_warning(space)) is not None:
        yield short
    if images.total < batch_size:
        yield (
            f"pretrain cannot begin: {images.total} images are fewer than one batch of {batch_size}; lower "
            "pretrain.batch_size"
        )
    elif student.batches and measured < batch_size:
        yield (
            f"the student was measured on a batch of {measured} and not of {batch_size}, which an accelerator does "
            f"faster; take --sample {batch_size} to measure what will run"
        )
    if sample.bad:
        yield (
            f"{sample.bad} of {sample.bad + measured} sampled images cannot be read; extract-targets skips such, and "
            "they are counted here"
        )
