"""One function a command: the same names and settings as on the command line, no terminal.

Each imports what it needs when it is called: torch and the libraries of teachers take seconds, and most commands need a
part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from milan_pipe.config.params import Params

if TYPE_CHECKING:
    import torch

    from milan_pipe.config.targets import StoreFormat
    from milan_pipe.config.training import Precision
    from milan_pipe.embeddings.run import EmbedProgress, EmbedReport
    from milan_pipe.evaluation.frozen import KnnReport, LinearProbeReport
    from milan_pipe.evaluation.probe import Probe
    from milan_pipe.evaluation.segment_probe import SegmentProbeReport
    from milan_pipe.extraction.run import ExtractProgress, ExtractReport
    from milan_pipe.images.prepare import PrepareReport
    from milan_pipe.interop.published_file import ImportReport
    from milan_pipe.interop.push import PushReport
    from milan_pipe.interop.timm_layout import ExportReport
    from milan_pipe.planning.doctor import DoctorReport
    from milan_pipe.planning.run import PlanProgress, PlanReport
    from milan_pipe.pretraining.bad_batch import ReplayReport
    from milan_pipe.pretraining.objective import Teach
    from milan_pipe.reports.inspect_student import InspectStudentReport
    from milan_pipe.reports.inspect_targets import InspectTargetsReport
    from milan_pipe.reports.report import ReportReport
    from milan_pipe.targets.convert import ConvertReport
    from milan_pipe.targets.schema import StoreHeader
    from milan_pipe.targets.verify import VerifyReport
    from milan_pipe.teacher.clip_training import ClipProgress, ClipReport
    from milan_pipe.training.recorder import TrainProgress
    from milan_pipe.training.task import RunReport


Where: TypeAlias = str | Path
"""A folder, a file or a URL."""

OnCount: TypeAlias = Callable[[int, int], None]
"""Called with what is done, and with all that is to do."""

OnTrain: TypeAlias = "Callable[[TrainProgress], None]"

DEFAULT = Params()


def _ignore(*_: object) -> None:
    """Default listener."""


def prepare(source: Where, images: Where, params: Params = DEFAULT, *, on_progress: OnCount = _ignore) -> PrepareReport:
    """Write webdataset shards and an index from images of any source; see `milan_pipe.images.prepare`."""
    from milan_pipe.images.prepare import prepare

    return prepare(source, images, params.prepare, on_progress, limits=params.images)


def plan(
    images: Where | None,
    targets: Where | None = None,
    params: Params = DEFAULT,
    *,
    views_from: Where | None = None,
    sample: int = 64,
    total: int | None = None,
    devices: int = 1,
    tflops: float | None = None,
    on_progress: Callable[[PlanProgress], None] = _ignore,
) -> PlanReport:
    """Say what extraction and pretraining will take, from a few images; see `milan_pipe.planning.run`."""
    from milan_pipe.planning.run import plan

    return plan(
        images,
        targets,
        params,
        views_from=views_from,
        sample=sample,
        total=total,
        devices=devices,
        tflops=tflops,
        on_progress=on_progress,
    )


def extract_targets(
    images: Where | None,
    targets: Where,
    params: Params = DEFAULT,
    *,
    shards: str | None = None,
    redo: Sequence[str] = (),
    verify_sources: bool = False,
    views_from: Where | None = None,
    on_progress: Callable[[ExtractProgress], None] = _ignore,
) -> ExtractReport:
    """Write teacher features, attention and views of all image shards; see `milan_pipe.extraction.run`.

    With `views_from` another teacher sees the views of that store, and there are no images.
    """
    from milan_pipe.extraction.run import extract_targets

    return extract_targets(
        images,
        targets,
        params,
        shards=shards,
        redo=redo,
        verify_sources=verify_sources,
        views_from=views_from,
        on_progress=on_progress,
    )


def verify_targets(
    targets: Where, params: Params = DEFAULT, *, against_teacher: int = 0, on_progress: OnCount = _ignore
) -> VerifyReport:
    """Check every byte of a store; with `against_teacher`, that many views per shard against the teacher run live."""
    if not against_teacher:
        from milan_pipe.targets.verify import verify_store

        return verify_store(targets, on_progress=on_progress)
    from milan_pipe.extraction.against import verify_against_teacher

    return verify_against_teacher(targets, params, against_teacher, on_progress=on_progress)


def convert_targets(
    source: Where,
    destination: Where,
    *,
    format: StoreFormat,
    zstd_level: int | None = None,
    redo: Sequence[str] = (),
    on_progress: OnCount = _ignore,
) -> ConvertReport:
    """Write a store again in either format, without the teacher; see `milan_pipe.targets.convert`."""
    from milan_pipe.targets.convert import convert_targets

    return convert_targets(
        source, destination, format=format, zstd_level=zstd_level, redo=redo, on_progress=on_progress
    )


def pretrain(
    targets: Where | Sequence[Where], run: Where, params: Params = DEFAULT, *, on_progress: OnTrain = _ignore
) -> RunReport:
    """Train a student on a target store, or on several of the same views; see `milan_pipe.pretraining.run`."""
    from milan_pipe.pretraining.run import pretrain

    def teacher_for(header: StoreHeader, device: torch.device) -> Teach:
        from milan_pipe.teacher.clip import load_teacher_of

        teacher = params.teacher if params.teacher.model_fields_set else None
        where = targets if isinstance(targets, str | Path) else targets[0]
        return load_teacher_of(header, teacher, device, where).online_targets

    def probe_for(device: torch.device) -> Probe:
        from milan_pipe.evaluation.probe import Probe

        return Probe(params, device)

    return pretrain(targets, run, params, teacher_for=teacher_for, probe_for=probe_for, on_progress=on_progress)


def inspect_targets(
    targets: Where,
    out: Where,
    params: Params = DEFAULT,
    *,
    keys: Sequence[str] = (),
    count: int = 4,
    epoch: int = 0,
    on_progress: OnCount = _ignore,
) -> InspectTargetsReport:
    """Draw what is stored of a few samples; see `milan_pipe.reports.inspect_targets`."""
    from milan_pipe.reports.inspect_targets import inspect_targets

    return inspect_targets(
        targets, out, masking=params.masking, keys=keys, count=count, epoch=epoch, on_progress=on_progress
    )


def inspect_student(
    checkpoint: Where,
    targets: Where,
    out: Where,
    *,
    keys: Sequence[str] = (),
    count: int = 8,
    epoch: int = 0,
    view: int = 0,
    device: str = "auto",
    on_progress: OnCount = _ignore,
) -> InspectStudentReport:
    """Draw what a student predicts of a few samples; see `milan_pipe.reports.inspect_student`."""
    from milan_pipe.reports.inspect_student import inspect_student

    return inspect_student(
        checkpoint, targets, out, keys=keys, count=count, epoch=epoch, view=view, device=device, on_progress=on_progress
    )


def report(
    runs: Sequence[Where],
    out: Where,
    *,
    targets: Where | None = None,
    evaluations: Sequence[Where] = (),
    extraction: Mapping[str, Any] | None = None,
    on_progress: OnCount = _ignore,
) -> ReportReport:
    """Write one HTML page about runs; see `milan_pipe.reports.report`."""
    from milan_pipe.reports.report import write_report

    return write_report(
        runs, out, targets=targets, evaluations=evaluations, extraction=extraction, on_progress=on_progress
    )


def doctor(locations: Sequence[Where] = (), *, write: bool = False) -> DoctorReport:
    """What this machine has to work with, and whether locations can be reached; see `milan_pipe.planning.doctor`."""
    from milan_pipe.planning.doctor import doctor

    return doctor(locations, write=write)


def replay(
    file: Where, *, device: str = "auto", precision: Precision | None = None, on_progress: OnCount = _ignore
) -> ReplayReport:
    """Compute the batch that stopped a run again; see `milan_pipe.pretraining.bad_batch`."""
    from milan_pipe.pretraining.bad_batch import replay

    return replay(file, device=device, precision=precision, on_progress=on_progress)


def knn(
    checkpoint: Where,
    train: Where,
    test: Where,
    params: Params = DEFAULT,
    *,
    features: Where | None = None,
    keep: Where | None = None,
    on_progress: Callable[[int], None] = _ignore,
) -> KnnReport:
    """k-nearest-neighbour accuracy of a checkpoint, a run, a model of timm, `random` or `teacher`.

    Args:
        features: folder that keeps what is embedded.
        keep: folder for the result, which `report` reads; none: `evaluations` in the run of the checkpoint.
    """
    from milan_pipe.evaluation.frozen import FrozenSets, knn

    return knn(FrozenSets(checkpoint, train, test, params, features=features, keep=keep, on_progress=on_progress))


def linear_probe(
    checkpoint: Where,
    train: Where,
    test: Where,
    params: Params = DEFAULT,
    *,
    features: Where | None = None,
    keep: Where | None = None,
    on_progress: Callable[[int], None] = _ignore,
) -> LinearProbeReport:
    """Quick linear probe of what `knn` takes; `features` and `keep` as there."""
    from milan_pipe.evaluation.frozen import FrozenSets, linear_probe

    sets = FrozenSets(checkpoint, train, test, params, features=features, keep=keep, on_progress=on_progress)
    return linear_probe(sets)


def embed(
    checkpoint: Where,
    images: Where,
    out: Where,
    params: Params = DEFAULT,
    *,
    patches: bool = False,
    shards: str | None = None,
    on_progress: Callable[[EmbedProgress], None] = _ignore,
) -> EmbedReport:
    """Write embeddings of images to parquet or zarr; see `milan_pipe.embeddings.run`."""
    from milan_pipe.embeddings.run import embed

    return embed(checkpoint, images, out, params, patches=patches, shards=shards, on_progress=on_progress)


def finetune(
    checkpoint: Where, train: Where, val: Where, run: Where, params: Params = DEFAULT, *, on_progress: OnTrain = _ignore
) -> RunReport:
    """Train student and classifier on labelled images; see `milan_pipe.evaluation.finetune`."""
    from milan_pipe.evaluation.finetune import FinetuneTask
    from milan_pipe.evaluation.supervised import run_supervised

    return run_supervised(FinetuneTask, checkpoint, train, val, run, params, on_progress)


def segment(
    checkpoint: Where, train: Where, val: Where, run: Where, params: Params = DEFAULT, *, on_progress: OnTrain = _ignore
) -> RunReport:
    """Train UperNet on the student; see `milan_pipe.evaluation.segment`."""
    from milan_pipe.evaluation.segment import SegmentTask
    from milan_pipe.evaluation.supervised import run_supervised

    return run_supervised(SegmentTask, checkpoint, train, val, run, params, on_progress)


def segment_probe(
    checkpoint: Where,
    train: Where,
    val: Where,
    params: Params = DEFAULT,
    *,
    keep: Where | None = None,
    on_progress: Callable[[int, int, str], None] = _ignore,
) -> SegmentProbeReport:
    """mIoU of frozen patch features by a linear head and by nearest neighbours; `keep` as of `knn`."""
    from milan_pipe.evaluation.segment_probe import segment_probe

    return segment_probe(checkpoint, train, val, params, keep=keep, on_progress=on_progress)


def lars_probe(
    checkpoint: Where, train: Where, val: Where, run: Where, params: Params = DEFAULT, *, on_progress: OnTrain = _ignore
) -> RunReport:
    """Linear probe by protocol, with LARS; see `milan_pipe.evaluation.lars_probe`."""
    from milan_pipe.evaluation.lars_probe import LarsProbeTask
    from milan_pipe.evaluation.supervised import run_supervised

    return run_supervised(LarsProbeTask, checkpoint, train, val, run, params, on_progress)


def export(checkpoint: Where, out: Where) -> ExportReport:
    """Write the student of a checkpoint in timm's layout; see `milan_pipe.interop.timm_layout`."""
    from milan_pipe.interop.timm_layout import export_student

    return export_student(checkpoint, out)


def push(
    source: Where,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    scores: Sequence[Where] = (),
    dry_run: bool = False,
) -> PushReport:
    """Upload a student or a target store to a model hub, with a card; see `milan_pipe.interop.push`."""
    from milan_pipe.interop.push import push

    return push(source, repository, private=private, revision=revision, license=license, scores=scores, dry_run=dry_run)


def import_published(
    file: Where, run: Where, *, encoder_heads: int | None = None, decoder_heads: int | None = None, prefix: str = ""
) -> ImportReport:
    """Make a checkpoint of a file with the published key names; see `milan_pipe.interop.published_file`."""
    from milan_pipe.interop.published_file import import_published

    return import_published(file, run, encoder_heads=encoder_heads, decoder_heads=decoder_heads, prefix=prefix)


def train_clip(
    images: Where,
    out: Where,
    params: Params = DEFAULT,
    *,
    val: Where | None = None,
    on_progress: Callable[[ClipProgress], None] = _ignore,
) -> ClipReport:
    """Train a small CLIP on captioned shards, to be a teacher; see `milan_pipe.teacher.clip_training`."""
    from milan_pipe.teacher.clip_training import train_clip

    return train_clip(images, out, params.clip, limits=params.images, val=val, on_progress=on_progress)
