"""What extraction and pretraining will cost, before either is begun: counted, measured, extrapolated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from milan_pipe.config.params import Params
from milan_pipe.config.targets import CodecSettings
from milan_pipe.errors import DataError, SettingError
from milan_pipe.extraction.space import FreeSpace, free_files, free_space, free_space_warning
from milan_pipe.extraction.worker import load_extraction_teacher
from milan_pipe.images.ahead import thread_count
from milan_pipe.images.count import ImageCount, count_images, like_these
from milan_pipe.images.shards import expand_shards
from milan_pipe.planning.flops import speed_at, student_flops, teacher_flops
from milan_pipe.planning.load import (
    ClusterLoad,
    Limit,
    NodeLoad,
    cluster_load,
    limits,
    loader_images_per_core,
    node_load,
)
from milan_pipe.planning.speed import (
    DEVICES,
    ExtractionHours,
    PretrainingHours,
    Speed,
    extraction_hours,
    pretraining_hours,
    run_student,
    run_teacher,
    same_threads,
)
from milan_pipe.planning.store import (
    CODECS,
    FORMATS,
    EncodedSample,
    ImageSample,
    StoreEstimate,
    encode_sample,
    estimate_store,
    header_of,
    sample_images,
    sample_store,
)
from milan_pipe.pretraining.objective import require_fit
from milan_pipe.storage import location_of
from milan_pipe.targets.schema import CodecInfo
from milan_pipe.targets.store import open_targets
from milan_pipe.teacher.clip import Teacher, TeacherOutput

DEFAULT_SAMPLE = 64
DEFAULT_TARGETS = "targets"


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Images and devices to plan for that are not here.

    Attributes:
        total: images of which those present are a sample; none plans for these.
        per_shard: images of a shard, where `total` says how many there are.
        devices: for extraction and pretraining.
        tflops: that a device sustains, in TFLOP/s; none measures teacher and student here.
    """

    total: int | None = None
    per_shard: int = 1
    devices: int = 1
    tflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("total", "per_shard", "devices", "tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"{name} is {value}; a plan needs a number above 0")


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
        teacher_online: on batches as large as the student's; None where the target needs no teacher.
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
    stores: tuple[StoreEstimate, ...]
    chosen: StoreEstimate
    teacher_model: str
    teacher_image_size: int
    teacher: Speed
    teacher_online: Speed | None
    student: Speed
    render_views_per_second: float
    render_threads: int
    extraction: ExtractionHours
    pretraining: PretrainingHours
    cluster: ClusterLoad
    node: NodeLoad
    limits: tuple[Limit, ...]
    space: FreeSpace
    warnings: tuple[str, ...]


def plan(
    images: str | Path,
    targets: str | Path | None,
    params: Params,
    *,
    sample: int = DEFAULT_SAMPLE,
    elsewhere: Elsewhere | None = None,
    on_progress: Callable[[PlanProgress], None] = lambda _: None,
) -> PlanReport:
    """Count the images, measure teacher, codecs, store and student on a few of them, and extrapolate.

    Nothing is left behind: what is written goes to the temporary folder and is removed.

    Args:
        images: folder of shards, or shard paths with braces or globs; local or a URL.
        targets: where the store is meant to lie; none: a folder `targets` here. It need not exist, and a store there
            is not read.
        sample: images to measure with, at least 1.
        elsewhere: images and devices that are not here; none plans for those that are.

    Raises:
        MissingError, DataError: images are missing or cannot be read.
        SettingError: unknown teacher, device or student.
        MismatchError: student and teacher do not fit each other.
        StoreError: the temporary folder cannot be written.
    """

    def progress(what: str, total: int | None = None) -> Callable[[int], None]:
        return lambda done: on_progress(PlanProgress(what=what, done=done, total=total))

    views, codec, extract, size = params.views, params.codec, params.extract, params.student.image_size
    meant = elsewhere or Elsewhere()
    location = location_of(targets if targets is not None else DEFAULT_TARGETS)
    shards = expand_shards(images)
    progress("load teacher")(0)
    with same_threads():
        model = load_extraction_teacher(params)
        require_fit(
            header_of(model.info, views, size, CodecInfo(name=codec.name), extract.format), params.student, images
        )
        counted = count_images(shards, lambda done, total: progress("count", total)(done))
        if meant.total is not None:
            counted = like_these(counted, meant.total, meant.per_shard)
        drawn = sample_images(shards, views, size, sample, progress("render", sample))
        progress("teacher")(0)
        output, teacher = run_teacher(model, drawn.pixels_NHWC, extract.batch_size)
        if meant.tflops is not None:
            teacher = speed_at(meant.tflops, teacher_flops(model, drawn.pixels_NHWC), extract.batch_size)
        online = _online(model, drawn, teacher, params)
        encoded, warnings = _encodings(output, codec, progress("codecs", len(CODECS)))
    kinds = [(one, store_format) for one in encoded.values() for store_format in FORMATS]
    stores = []
    for done, (one, store_format) in enumerate(kinds):
        progress("stores", len(kinds))(done)
        stores.append(estimate_store(header_of(model.info, views, size, one.info, store_format), drawn, one, counted))
    chosen = next(store for store in stores if (store.codec, store.format) == (codec.name, extract.format))
    header = header_of(model.info, views, size, encoded[codec.name].info, extract.format)
    progress("student")(0)
    if meant.tflops is None:
        student = run_student(params, header, drawn, encoded[codec.name])
    else:
        flops = student_flops(params, header, drawn, encoded[codec.name])
        student = speed_at(meant.tflops, flops, params.pretrain.batch_size)
    progress("loader")(0)
    with sample_store(header, drawn, encoded[codec.name]) as folder:
        per_core = loader_images_per_core(open_targets(folder), with_targets=params.target == "clip")

    threads = thread_count(extract.threads)
    # Of a device that is not here, `extract.threads` says how many processors it has beside it.
    cores = thread_count(0) if meant.tflops is None else threads
    extraction = extraction_hours(
        counted.total * views.count,
        counted.shards,
        teacher,
        drawn.render_seconds,
        threads,
        cores,
        tuple(sorted({*DEVICES, meant.devices})),
    )
    cluster = cluster_load(counted, extraction, meant.devices)
    node = node_load(student, chosen, per_core, meant.devices)
    space = free_space(location, chosen.bytes)
    node_cores = cores if meant.tflops is None else node.devices * threads
    return PlanReport(
        images=counted,
        views_per_image=views.count,
        views=counted.total * views.count,
        sample=len(drawn.rendered),
        sample_bad=drawn.bad,
        stores=tuple(stores),
        chosen=chosen,
        teacher_model=model.info.model,
        teacher_image_size=model.info.image_size,
        teacher=teacher,
        teacher_online=online,
        student=student,
        render_views_per_second=1 / drawn.render_seconds,
        render_threads=threads,
        extraction=extraction,
        pretraining=pretraining_hours(counted.total, params.pretrain.epochs, student, online, extraction.hours[1]),
        cluster=cluster,
        node=node,
        limits=limits(counted, chosen, space, free_files(location), cluster, node, node_cores),
        space=space,
        warnings=(*_warnings(counted, drawn, student, params, space), *warnings),
    )


def _encodings(
    output: TeacherOutput, codec: CodecSettings, on_progress: Callable[[int], None]
) -> tuple[dict[str, EncodedSample], list[str]]:
    """The sample in every codec, and why another than the chosen one does not fit."""
    encoded, refused = {}, []
    for done, name in enumerate(CODECS):
        on_progress(done)
        try:
            encoded[name] = encode_sample(output, codec.model_copy(update={"name": name}))
        except DataError as error:
            if name == codec.name:
                raise
            refused.append(f"codec {name} is left out: {error}")
    return encoded, refused


def _online(model: Teacher, image_sample: ImageSample, speed: Speed, params: Params) -> Speed | None:
    """The teacher on batches of the student's size: as it would run beside the student in every step."""
    if params.target != "clip":
        return None
    batch_size = min(params.pretrain.batch_size, len(image_sample.rendered))
    if batch_size == speed.batch_size or not speed.batches:
        return speed
    return run_teacher(model, image_sample.pixels_NHWC, batch_size)[1]


def _warnings(
    images: ImageCount, image_sample: ImageSample, student: Speed, params: Params, space: FreeSpace
) -> list[str]:
    found = []
    short = free_space_warning(space)
    if short is not None:
        found.append(short)
    batch_size = params.pretrain.batch_size
    if images.total < batch_size:
        found.append(
            f"pretrain cannot begin: {images.total} images are fewer than one batch of {batch_size}; lower "
            "pretrain.batch_size"
        )
    elif student.batches and len(image_sample.rendered) < batch_size:
        found.append(
            f"the student was measured on a batch of {len(image_sample.rendered)} and not of {batch_size}, which an "
            f"accelerator does faster; take --sample {batch_size} to measure what will run"
        )
    if image_sample.bad:
        found.append(
            f"{image_sample.bad} of {image_sample.bad + len(image_sample.rendered)} sampled images cannot be read; "
            "extract-targets skips such, and they are counted here"
        )
    return found
