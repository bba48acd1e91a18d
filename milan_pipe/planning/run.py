"""What extraction and pretraining will cost, before either is begun: counted, measured, extrapolated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from milan_pipe.config.images import ViewSettings
from milan_pipe.config.params import Params
from milan_pipe.config.targets import CodecSettings
from milan_pipe.errors import DataError, SettingError
from milan_pipe.extraction.space import FreeSpace, free_files, free_space, free_space_warning
from milan_pipe.extraction.worker import load_extraction_teacher
from milan_pipe.images.ahead import thread_count
from milan_pipe.images.count import ImageCount, count_images, like_these
from milan_pipe.images.shards import ShardFile, expand_shards
from milan_pipe.planning.flops import speed_at, student_flops, teacher_flops
from milan_pipe.planning.limits import Limit, limits
from milan_pipe.planning.load import ClusterLoad, NodeLoad, cluster_load, loader_images_per_core, node_load
from milan_pipe.planning.speed import (
    ExtractionHours,
    PretrainingHours,
    Speed,
    device_counts,
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
from milan_pipe.storage import Location, location_of
from milan_pipe.targets.schema import CodecInfo, StoreHeader, TeacherInfo
from milan_pipe.targets.store import open_targets
from milan_pipe.teacher.clip import Teacher, TeacherOutput

DEFAULT_SAMPLE = 64
DEFAULT_DEVICES = 1
DEFAULT_TARGETS = "targets"


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """What is planned for is not here: another number of images, other devices.

    Attributes:
        total: images of which those that are there are a sample; none plans for these.
        per_shard: images of a shard, where `total` says how many there are.
        devices: for extraction and pretraining.
        tflops: that a device sustains, in TFLOP/s; none measures teacher and student here.
    """

    total: int | None = None
    per_shard: int = 1
    devices: int = DEFAULT_DEVICES
    tflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("total", "per_shard", "devices", "tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"{name} is {value}; a plan needs a number above 0")


@dataclass(frozen=True, kw_only=True)
class PlanProgress:
    """Reported while a plan is made: which of its steps goes on, and how far that is; `total` None: not known."""

    what: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """A plan. What is measured and what is extrapolated is said where each part is defined.

    Attributes:
        sample, sample_bad: images measured with, and met that could not be read.
        stores: of every codec that fits, in both formats.
        chosen: the one of these that the settings name.
        teacher: on batches of `extract.batch_size`.
        teacher_online: on batches as large as the student's; None where the target needs no teacher.
        render_views_per_second: of one thread.
        render_threads: that will render.
        cluster, node: with the devices that were asked for.
        limits: what gives in first comes first.
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


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Stage 1, counted and measured; `refused` says which codecs do not fit, and why."""

    images: ImageCount
    sample: ImageSample
    info: TeacherInfo
    teacher: Speed
    online: Speed | None
    encoded: dict[str, EncodedSample]
    refused: tuple[str, ...]


def _measure(
    shards: Sequence[ShardFile],
    model: Teacher,
    params: Params,
    sample: int,
    elsewhere: Elsewhere,
    on_progress: Callable[[PlanProgress], None],
) -> _Measured:
    def counted(done: int, total: int) -> None:
        on_progress(PlanProgress(what="count", done=done, total=total))

    def rendered(done: int) -> None:
        on_progress(PlanProgress(what="render", done=done, total=sample))

    images = count_images(shards, counted)
    if elsewhere.total is not None:
        images = like_these(images, elsewhere.total, elsewhere.per_shard)
    image_sample = sample_images(shards, params.views, params.student.image_size, sample, rendered)
    on_progress(PlanProgress(what="teacher"))
    output, speed = run_teacher(model, image_sample.pixels_NHWC, params.extract.batch_size)
    if elsewhere.tflops is not None:
        speed = speed_at(elsewhere.tflops, teacher_flops(model, image_sample.pixels_NHWC), params.extract.batch_size)
    encoded, refused = _encodings(output, params.codec, on_progress)
    return _Measured(
        images=images,
        sample=image_sample,
        info=model.info,
        teacher=speed,
        online=_online(model, image_sample, speed, params),
        encoded=encoded,
        refused=refused,
    )


def _encodings(
    output: TeacherOutput, codec: CodecSettings, on_progress: Callable[[PlanProgress], None]
) -> tuple[dict[str, EncodedSample], tuple[str, ...]]:
    """The sample in every codec, and why another than the chosen one does not fit."""
    encoded, refused = {}, []
    for done, name in enumerate(CODECS):
        on_progress(PlanProgress(what="codecs", done=done, total=len(CODECS)))
        try:
            encoded[name] = encode_sample(output, codec.model_copy(update={"name": name}))
        except DataError as error:
            if name == codec.name:
                raise
            refused.append(f"codec {name} is left out: {error}")
    return encoded, tuple(refused)


def _stores(
    measured: _Measured, views: ViewSettings, size: int, on_progress: Callable[[PlanProgress], None]
) -> tuple[StoreEstimate, ...]:
    kinds = [(encoded, store_format) for encoded in measured.encoded.values() for store_format in FORMATS]
    estimates = []
    for done, (encoded, store_format) in enumerate(kinds):
        on_progress(PlanProgress(what="stores", done=done, total=len(kinds)))
        header = header_of(measured.info, views, size, encoded.info, store_format)
        estimates.append(estimate_store(header, measured.sample, encoded, measured.images))
    return tuple(estimates)


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
        targets: where the store is meant to lie; none: a folder `targets` here. It need not be there, and a store that
            is there is not looked at.
        sample: images to measure with, at least 1.
        elsewhere: images and devices that are not here; none plans for those that are.

    Raises:
        MissingError, DataError: images are not there or cannot be read.
        SettingError: unknown teacher, device or student.
        MismatchError: student and teacher do not fit each other.
        StoreError: the temporary folder cannot be written.
    """
    views, codec, extract, size = params.views, params.codec, params.extract, params.student.image_size
    asked = elsewhere or Elsewhere()
    location = location_of(targets if targets is not None else DEFAULT_TARGETS)
    shards = expand_shards(images)
    on_progress(PlanProgress(what="load teacher"))
    with same_threads():
        model = load_extraction_teacher(params)
        require_fit(
            header_of(model.info, views, size, CodecInfo(name=codec.name), extract.format), params.student, images
        )
        measured = _measure(shards, model, params, sample, asked, on_progress)
    stores = _stores(measured, views, size, on_progress)
    encoded = measured.encoded[codec.name]
    header = header_of(model.info, views, size, encoded.info, extract.format)
    on_progress(PlanProgress(what="student"))
    if asked.tflops is None:
        student = run_student(params, header, measured.sample, encoded)
    else:
        flops = student_flops(params, header, measured.sample, encoded)
        student = speed_at(asked.tflops, flops, params.pretrain.batch_size)
    on_progress(PlanProgress(what="loader"))
    per_core = _loader(header, measured.sample, encoded, params)
    chosen = next(store for store in stores if (store.codec, store.format) == (codec.name, extract.format))
    return _report(measured, stores, chosen, student, per_core, params, asked, location)


def _loader(header: StoreHeader, sample: ImageSample, encoded: EncodedSample, params: Params) -> float:
    with sample_store(header, sample, encoded) as folder:
        return loader_images_per_core(open_targets(folder), with_targets=params.target == "clip")


def _report(
    measured: _Measured,
    stores: tuple[StoreEstimate, ...],
    chosen: StoreEstimate,
    student: Speed,
    per_core: float,
    params: Params,
    asked: Elsewhere,
    location: Location,
) -> PlanReport:
    views, extract = params.views, params.extract
    images, rendering = measured.images, measured.sample.render_seconds
    threads, cores = thread_count(extract.threads), thread_count(0)
    extraction = extraction_hours(
        images.total * views.count,
        images.shards,
        measured.teacher,
        rendering,
        threads,
        # Of a device that is not here, `extract.threads` says how many processors it has beside it.
        cores if asked.tflops is None else threads,
        device_counts(asked.devices),
    )
    cluster = cluster_load(images, extraction, asked.devices)
    node = node_load(student, chosen, per_core, asked.devices)
    space = free_space(location, chosen.bytes)
    return PlanReport(
        images=images,
        views_per_image=views.count,
        views=images.total * views.count,
        sample=len(measured.sample.rendered),
        sample_bad=measured.sample.bad,
        stores=stores,
        chosen=chosen,
        teacher_model=measured.info.model,
        teacher_image_size=measured.info.image_size,
        teacher=measured.teacher,
        teacher_online=measured.online,
        student=student,
        render_views_per_second=1 / rendering,
        render_threads=threads,
        extraction=extraction,
        pretraining=pretraining_hours(
            images.total, params.pretrain.epochs, student, measured.online, extraction.hours[1]
        ),
        cluster=cluster,
        node=node,
        limits=limits(
            images,
            chosen,
            space,
            free_files(location),
            cluster,
            node,
            cores if asked.tflops is None else node.devices * threads,
        ),
        space=space,
        warnings=(*_warnings(images, measured.sample, student, params, space), *measured.refused),
    )


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
