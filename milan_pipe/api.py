"""One function a command: the same names and settings as on the command line, no terminal.

Each imports what it needs when it is called: torch and the libraries of teachers take seconds, and most commands need a
part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milan_pipe.config.params import Params

if TYPE_CHECKING:
    from milan_pipe.config.targets import StoreFormat
    from milan_pipe.config.training import Precision
    from milan_pipe.evaluation.frozen import KnnReport, LinearProbeReport
    from milan_pipe.extraction.run import ExtractProgress, ExtractReport
    from milan_pipe.images.prepare import PrepareReport
    from milan_pipe.interop.published_file import ImportReport
    from milan_pipe.interop.timm_layout import ExportReport
    from milan_pipe.planning.doctor import DoctorReport
    from milan_pipe.planning.run import PlanProgress, PlanReport
    from milan_pipe.pretraining.bad_batch import ReplayReport
    from milan_pipe.reports.inspect_student import InspectStudentReport
    from milan_pipe.reports.inspect_targets import InspectTargetsReport
    from milan_pipe.reports.report import ReportReport
    from milan_pipe.targets.convert import ConvertReport
    from milan_pipe.targets.verify import VerifyReport
    from milan_pipe.training.recorder import TrainProgress
    from milan_pipe.training.task import RunReport


def _ignore(*_: object) -> None:
    """Default listener."""


def prepare(
    source: str | Path,
    images: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[int, int], None] = _ignore,
) -> PrepareReport:
    """Write webdataset shards and an index from `demo` or a folder of images; see `milan_pipe.images.prepare`."""
    from milan_pipe.images.prepare import prepare

    return prepare(source, images, (params or Params()).prepare, on_progress)


def plan(
    images: str | Path,
    targets: str | Path | None = None,
    params: Params | None = None,
    *,
    sample: int | None = None,
    total: int | None = None,
    devices: int = 1,
    tflops: float | None = None,
    on_progress: Callable[[PlanProgress], None] = _ignore,
) -> PlanReport:
    """Say what extraction and pretraining will take, from a few images; see `milan_pipe.planning.run`.

    Args:
        sample: images to measure with; none: as many as `milan-pipe plan` takes.
        total: plan for so many images, of which IMAGES are a sample, in shards of `prepare.samples_per_shard`.
        devices: that both stages will have.
        tflops: TFLOP/s that each sustains, in place of measuring teacher and student here.
    """
    from milan_pipe.planning.run import DEFAULT_SAMPLE, Elsewhere, plan

    params = params or Params()
    elsewhere = Elsewhere(total=total, per_shard=params.prepare.samples_per_shard, devices=devices, tflops=tflops)
    return plan(images, targets, params, sample=sample or DEFAULT_SAMPLE, elsewhere=elsewhere, on_progress=on_progress)


def extract_targets(
    images: str | Path,
    targets: str | Path,
    params: Params | None = None,
    *,
    shards: str | None = None,
    redo: Sequence[str] = (),
    verify_sources: bool = False,
    on_progress: Callable[[ExtractProgress], None] = _ignore,
) -> ExtractReport:
    """Write teacher features, attention and views of all image shards; see `milan_pipe.extraction.run`."""
    from milan_pipe.extraction.run import extract_targets

    return extract_targets(
        images,
        targets,
        params or Params(),
        shards=shards,
        redo=redo,
        verify_sources=verify_sources,
        on_progress=on_progress,
    )


def verify_targets(
    targets: str | Path,
    params: Params | None = None,
    *,
    against_teacher: int = 0,
    on_progress: Callable[[int, int], None] = _ignore,
) -> VerifyReport:
    """Check every byte of a store; with `against_teacher`, that many views per shard against the teacher run live."""
    if not against_teacher:
        from milan_pipe.targets.verify import verify_store

        return verify_store(targets, on_progress=on_progress)
    from milan_pipe.extraction.against import verify_against_teacher

    return verify_against_teacher(targets, params or Params(), against_teacher, on_progress=on_progress)


def convert_targets(
    source: str | Path,
    destination: str | Path,
    *,
    format: StoreFormat,
    on_progress: Callable[[int, int], None] = _ignore,
) -> ConvertReport:
    """Write a store again in another format, without the teacher; see `milan_pipe.targets.convert`."""
    from milan_pipe.targets.convert import convert_targets

    return convert_targets(source, destination, format=format, on_progress=on_progress)


def pretrain(
    targets: str | Path,
    run: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] = _ignore,
) -> RunReport:
    """Train a student on a target store; see `milan_pipe.pretraining.run`."""
    from milan_pipe.pretraining.run import pretrain

    params = params or Params()
    teacher_for = None
    if params.pretrain.targets == "online":
        from milan_pipe.teacher.online import teacher_of

        teacher = params.teacher if params.teacher.model_fields_set else None
        teacher_for = partial(teacher_of, teacher, where=targets)
    return pretrain(targets, run, params, teacher_for=teacher_for, on_progress=on_progress)


def inspect_targets(
    targets: str | Path,
    out: str | Path,
    params: Params | None = None,
    *,
    keys: Sequence[str] = (),
    count: int = 4,
    epoch: int = 0,
    on_progress: Callable[[int, int], None] = _ignore,
) -> InspectTargetsReport:
    """Draw what is stored of a few samples; see `milan_pipe.reports.inspect_targets`."""
    from milan_pipe.reports.inspect_targets import inspect_targets

    masking = (params or Params()).masking
    return inspect_targets(targets, out, masking=masking, keys=keys, count=count, epoch=epoch, on_progress=on_progress)


def inspect_student(
    checkpoint: str | Path,
    targets: str | Path,
    out: str | Path,
    *,
    keys: Sequence[str] = (),
    count: int = 8,
    epoch: int = 0,
    view: int = 0,
    device: str = "auto",
    on_progress: Callable[[int, int], None] = _ignore,
) -> InspectStudentReport:
    """Draw what a student predicts of a few samples; see `milan_pipe.reports.inspect_student`."""
    from milan_pipe.reports.inspect_student import inspect_student

    return inspect_student(
        checkpoint, targets, out, keys=keys, count=count, epoch=epoch, view=view, device=device, on_progress=on_progress
    )


def report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    targets: str | Path | None = None,
    evaluations: Sequence[str | Path] = (),
    extraction: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = _ignore,
) -> ReportReport:
    """Write one HTML page about runs; see `milan_pipe.reports.report`."""
    from milan_pipe.reports.report import write_report

    return write_report(
        runs, out, targets=targets, evaluations=evaluations, extraction=extraction, on_progress=on_progress
    )


def doctor(locations: Sequence[str | Path] = (), *, write: bool = False) -> DoctorReport:
    """What this machine has to work with, and whether locations can be reached; see `milan_pipe.planning.doctor`."""
    from milan_pipe.planning.doctor import doctor

    return doctor(locations, write=write)


def replay(
    file: str | Path,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    on_progress: Callable[[int, int], None] = _ignore,
) -> ReplayReport:
    """Compute the batch that stopped a run again; see `milan_pipe.pretraining.bad_batch`."""
    from milan_pipe.pretraining.bad_batch import replay

    return replay(file, device=device, precision=precision, on_progress=on_progress)


def knn(
    checkpoint: str | Path,
    train: str | Path,
    test: str | Path,
    params: Params | None = None,
    *,
    features: str | Path | None = None,
    keep: str | Path | None = None,
    on_progress: Callable[[int], None] = _ignore,
) -> KnnReport:
    """k-nearest-neighbour accuracy of a checkpoint, a run, `random` or `teacher`.

    Args:
        features: folder that keeps what is embedded.
        keep: folder for the result, which `report` reads; none: `evaluations` in the run of the checkpoint.
    """
    from milan_pipe.evaluation.frozen import FrozenSets, knn

    params = params or Params()
    return knn(FrozenSets(checkpoint, train, test, params, features=features, keep=keep, on_progress=on_progress))


def linear_probe(
    checkpoint: str | Path,
    train: str | Path,
    test: str | Path,
    params: Params | None = None,
    *,
    features: str | Path | None = None,
    keep: str | Path | None = None,
    on_progress: Callable[[int], None] = _ignore,
) -> LinearProbeReport:
    """Quick linear probe of a checkpoint, a run, `random` or `teacher`; `features` and `keep` as of `knn`."""
    from milan_pipe.evaluation.frozen import FrozenSets, linear_probe

    params = params or Params()
    return linear_probe(
        FrozenSets(checkpoint, train, test, params, features=features, keep=keep, on_progress=on_progress)
    )


def finetune(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] = _ignore,
) -> RunReport:
    """Train student and classifier on labelled images; see `milan_pipe.evaluation.finetune`."""
    from milan_pipe.evaluation.finetune import finetune

    return finetune(checkpoint, train, val, run, params or Params(), on_progress=on_progress)


def segment(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] = _ignore,
) -> RunReport:
    """Train UperNet on the student; see `milan_pipe.evaluation.segment`."""
    from milan_pipe.evaluation.segment import segment

    return segment(checkpoint, train, val, run, params or Params(), on_progress=on_progress)


def lars_probe(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] = _ignore,
) -> RunReport:
    """Linear probe by protocol, with LARS; see `milan_pipe.evaluation.lars_probe`."""
    from milan_pipe.evaluation.lars_probe import lars_probe

    return lars_probe(checkpoint, train, val, run, params or Params(), on_progress=on_progress)


def export(checkpoint: str | Path, out: str | Path) -> ExportReport:
    """Write the student of a checkpoint in timm's layout; see `milan_pipe.interop.timm_layout`."""
    from milan_pipe.interop.timm_layout import export_student

    return export_student(checkpoint, out)


def import_published(
    file: str | Path,
    run: str | Path,
    *,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    prefix: str = "",
) -> ImportReport:
    """Make a checkpoint of a file with the published key names; see `milan_pipe.interop.published_file`."""
    from milan_pipe.interop.published_file import import_published

    return import_published(file, run, encoder_heads=encoder_heads, decoder_heads=decoder_heads, prefix=prefix)


def train_demo_teacher(out_dir: str | Path, params: Params | None = None) -> dict[str, float]:
    """Train the scenes' CLIP anew; takes about an hour on two cores. See `milan_pipe.teacher.demo_training`."""
    from milan_pipe.teacher.demo_training import train_demo_teacher

    return train_demo_teacher(Path(out_dir), (params or Params()).demo_teacher)
