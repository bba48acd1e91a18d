"""The commands as Python functions: the same names, the same settings, no terminal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milan_pipe.config.command import command_of
from milan_pipe.config.params import Params
from milan_pipe.errors import StoreError
from milan_pipe.evaluation.backbone import RANDOM
from milan_pipe.evaluation.features import LabelledFeatures
from milan_pipe.evaluation.finetune import finetune as _finetune
from milan_pipe.evaluation.knn import knn_accuracy
from milan_pipe.evaluation.lars_probe import lars_probe as _lars_probe
from milan_pipe.evaluation.linear_probe import linear_probe_accuracy
from milan_pipe.evaluation.segment import segment as _segment
from milan_pipe.evaluation.subjects import TEACHER, Subject, embed_both, subject_of
from milan_pipe.evaluation.supervised import SupervisedReport
from milan_pipe.extraction import run as extraction
from milan_pipe.extraction.against import TeacherCheck
from milan_pipe.extraction.run import ExtractProgress, ExtractReport
from milan_pipe.images import prepare as preparing
from milan_pipe.interop.published_file import ImportReport
from milan_pipe.interop.published_file import import_published as _import_published
from milan_pipe.interop.timm_layout import ExportReport, export_student
from milan_pipe.planning.doctor import DoctorReport
from milan_pipe.planning.doctor import doctor as _doctor
from milan_pipe.planning.run import DEFAULT_DEVICES, DEFAULT_SAMPLE, Elsewhere, PlanProgress, PlanReport
from milan_pipe.planning.run import plan as _plan
from milan_pipe.planning.speed import Lesson
from milan_pipe.pretraining.bad_batch import ReplayReport
from milan_pipe.pretraining.bad_batch import replay as _replay
from milan_pipe.pretraining.run import PretrainReport
from milan_pipe.pretraining.run import pretrain as _pretrain
from milan_pipe.reports import student as inspecting_student
from milan_pipe.reports import targets as inspecting_targets
from milan_pipe.reports.evaluations import FOLDER, Evaluation, keep_evaluation, make_folder
from milan_pipe.reports.inspect_student import InspectStudentReport
from milan_pipe.reports.inspect_targets import InspectTargetsReport
from milan_pipe.reports.report import ReportReport, write_report
from milan_pipe.storage import local_folder
from milan_pipe.targets import convert as conversion
from milan_pipe.targets import verify as verification
from milan_pipe.targets.convert import ConvertReport
from milan_pipe.targets.schema import StoreFormat
from milan_pipe.targets.verify import VerifyReport
from milan_pipe.teacher.demo_training import train_demo_teacher as _train_demo_teacher
from milan_pipe.teacher.online import teacher_of
from milan_pipe.training.checkpoint import run_of
from milan_pipe.training.recorder import TrainProgress
from milan_pipe.training.settings import Precision


def _ignore(*_: object) -> None:
    """Default listener."""


def prepare(
    source: str | Path,
    images: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[int, int], None] = _ignore,
) -> preparing.PrepareReport:
    """Write webdataset shards and an index from `demo` or a folder of pictures; see `milan_pipe.images.prepare`."""
    return preparing.prepare(source, images, (params or Params()).prepare, on_progress)


def plan(
    images: str | Path,
    targets: str | Path | None = None,
    params: Params | None = None,
    *,
    sample: int = DEFAULT_SAMPLE,
    pictures: int | None = None,
    devices: int = DEFAULT_DEVICES,
    tflops: float | None = None,
    on_progress: Callable[[PlanProgress], None] = _ignore,
) -> PlanReport:
    """Say what extraction and pretraining will take, from a few pictures; see `milan_pipe.planning.run`.

    Args:
        pictures: plan for so many, of which IMAGES are a sample, in shards of `prepare.samples_per_shard`.
        devices: that both stages will have.
        tflops: TFLOP/s that each sustains, in place of measuring teacher and student here.
    """
    settings = params or Params()
    return _plan(
        images,
        targets,
        teacher=settings.teacher,
        views=settings.views,
        codec=settings.codec,
        extract=settings.extract,
        lesson=Lesson(
            student=settings.student,
            decoder=settings.decoder,
            masking=settings.masking,
            target=settings.target,
            config=settings.pretrain,
        ),
        sample=sample,
        elsewhere=Elsewhere(
            pictures=pictures, per_shard=settings.prepare.samples_per_shard, devices=devices, tflops=tflops
        ),
        on_progress=on_progress,
    )


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
    settings = params or Params()
    return extraction.extract_targets(
        images,
        targets,
        teacher=settings.teacher,
        views=settings.views,
        view_size=settings.student.image_size,
        grid=settings.student.grid,
        codec=settings.codec,
        extract=settings.extract,
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
    settings = params or Params()
    if not against_teacher:
        return verification.verify_targets(targets, on_progress=on_progress)
    teacher = settings.teacher if settings.teacher.model_fields_set else None
    check = TeacherCheck(targets, teacher, settings.student.grid, settings.extract.device, against_teacher)
    return verification.verify_targets(targets, on_run=check, on_progress=on_progress)


def convert_targets(
    source: str | Path,
    destination: str | Path,
    *,
    format: StoreFormat,
    on_progress: Callable[[int, int], None] = _ignore,
) -> ConvertReport:
    """Write a store again in another format, without the teacher; see `milan_pipe.targets.convert`."""
    return conversion.convert_targets(source, destination, format=format, on_progress=on_progress)


def pretrain(
    targets: str | Path,
    run: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] = _ignore,
) -> PretrainReport:
    """Train a student on a target store; see `milan_pipe.pretraining.run`."""
    settings = params or Params()
    return _pretrain(
        targets,
        run,
        student=settings.student,
        decoder=settings.decoder,
        masking=settings.masking,
        target=settings.target,
        config=settings.pretrain,
        teacher_for=lambda header, device: teacher_of(
            settings.teacher if settings.teacher.model_fields_set else None, header, device, targets
        ),
        stated=_stated(settings),
        record={
            "settings": settings.model_dump(mode="json", include={"decoder", "masking", "target", "pretrain"}),
            "targets": str(targets),
            "command": command_of("pretrain", [targets, run], settings, _PRETRAIN_SECTIONS),
        },
        on_progress=on_progress,
    )


def inspect_targets(
    targets: str | Path,
    out: str | Path,
    params: Params | None = None,
    *,
    keys: Sequence[str] = (),
    count: int = inspecting_targets.DEFAULT_COUNT,
    epoch: int = 0,
    on_progress: Callable[[int, int], None] = _ignore,
) -> InspectTargetsReport:
    """Draw what is stored of a few samples; see `milan_pipe.reports.inspect_targets`."""
    masking = (params or Params()).masking
    return inspecting_targets.inspect_targets(
        targets, out, masking=masking, keys=keys, count=count, epoch=epoch, on_progress=on_progress
    )


def inspect_student(
    checkpoint: str | Path,
    targets: str | Path,
    out: str | Path,
    *,
    keys: Sequence[str] = (),
    count: int = inspecting_student.DEFAULT_COUNT,
    epoch: int = 0,
    view: int = 0,
    device: str = "auto",
    on_progress: Callable[[int, int], None] = _ignore,
) -> InspectStudentReport:
    """Draw what a student predicts of a few samples; see `milan_pipe.reports.inspect_student`."""
    return inspecting_student.inspect_student(
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
    return write_report(
        runs, out, targets=targets, evaluations=evaluations, extraction=extraction, on_progress=on_progress
    )


def doctor(places: Sequence[str | Path] = (), *, write: bool = False) -> DoctorReport:
    """What this machine has to work with, and whether places can be reached; see `milan_pipe.planning.doctor`."""
    return _doctor(places, write=write)


def replay(
    file: str | Path,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    on_progress: Callable[[int, int], None] = _ignore,
) -> ReplayReport:
    """Compute the batch that stopped a run again; see `milan_pipe.pretraining.bad_batch`."""
    return _replay(file, device=device, precision=precision, on_progress=on_progress)


def _stated(settings: Params) -> dict[str, dict[str, Any]]:
    """What the settings say of teacher and views, without what was left to defaults, as a store's header has it."""
    teacher = settings.teacher.model_dump(mode="json", include=settings.teacher.model_fields_set)
    teacher.update((name, value) for name, value in settings.teacher.header_fields().items() if name in teacher)
    if teacher.get("precision") == "auto":
        del teacher["precision"]
    return {
        "teacher": teacher,
        "views": settings.views.model_dump(mode="json", include=settings.views.model_fields_set),
    }


@dataclass(frozen=True, kw_only=True)
class KnnReport:
    """k-NN accuracy by number of neighbours; `best` is the highest of them; counts of pictures used and set aside.

    `kept` is the file that a report reads, if there is one.
    """

    subject: str
    accuracy: dict[int, float]
    best: float
    train: int
    test: int
    bad: int
    kept: str | None


@dataclass(frozen=True, kw_only=True)
class LinearProbeReport:
    """Accuracy of a linear classifier on frozen features; counts of pictures used and set aside; `kept` as of k-NN."""

    subject: str
    accuracy: float
    train_accuracy: float
    l2: float
    converged: bool
    train: int
    test: int
    bad: int
    kept: str | None


_PRETRAIN_SECTIONS = ("student", "masking", "decoder", "target", "pretrain")


def _student_sections(checkpoint: str | Path, *sections: str) -> tuple[str, ...]:
    """A checkpoint has its student's sizes; those of an untrained one are settings, and the teacher is."""
    of = {RANDOM: ("student",), TEACHER: ("student.image_size", "student.patch_size", "teacher")}
    return (*of.get(str(checkpoint), ()), *sections)


def _features(
    checkpoint: str | Path,
    train: str | Path,
    test: str | Path,
    settings: Params,
    features: str | Path | None,
    keep: str | Path | None,
    on_progress: Callable[[int], None],
) -> tuple[Subject, LabelledFeatures, LabelledFeatures, int]:
    if keep is not None:
        # Before the work, not after it.
        make_folder(local_folder(keep, "results"))
    subject = subject_of(
        checkpoint,
        student=settings.student,
        teacher=settings.teacher,
        embed=settings.embed,
        device=settings.pretrain.device,
        seed=settings.pretrain.seed,
    )
    bad: list[tuple[str, str]] = []
    first, second = embed_both(
        subject, train, test, settings.embed, lambda key, reason: bad.append((key, reason)), on_progress, features
    )
    return subject, first, second, len(bad)


def _kept(evaluation: Evaluation, keep: str | Path | None) -> str | None:
    """Keep a result in `keep`, or in the run that the checkpoint is of; the file, or None where there is neither."""
    if keep is not None:
        return str(keep_evaluation(Path(keep), evaluation))
    run = run_of(evaluation.subject)
    if run is None:
        return None
    try:
        return str(keep_evaluation(run / FOLDER, evaluation))
    except StoreError as error:
        # The result is there, and nobody asked for a file.
        warnings.warn(str(error), RuntimeWarning, stacklevel=3)
        return None


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
    settings = params or Params()
    subject, first, second, bad = _features(checkpoint, train, test, settings, features, keep, on_progress)
    accuracy = knn_accuracy(first, second, settings.knn)
    sections = _student_sections(checkpoint, "embed", "knn", "pretrain.seed")
    evaluation = Evaluation(
        task="knn",
        subject=subject.name,
        identity=subject.identity,
        scores={"best": max(accuracy.values()), **{f"k{k}": value for k, value in accuracy.items()}},
        data=f"{train} -> {test}",
        train=len(first.label_N),
        test=len(second.label_N),
        command=command_of("knn", [checkpoint, train, test], settings, sections),
    )
    return KnnReport(
        subject=subject.name,
        accuracy=accuracy,
        best=max(accuracy.values()),
        train=len(first.label_N),
        test=len(second.label_N),
        bad=bad,
        kept=_kept(evaluation, keep),
    )


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
    settings = params or Params()
    subject, first, second, bad = _features(checkpoint, train, test, settings, features, keep, on_progress)
    result = linear_probe_accuracy(first, second, settings.linear_probe)
    sections = _student_sections(checkpoint, "embed", "linear_probe", "pretrain.seed")
    evaluation = Evaluation(
        task="linear-probe",
        subject=subject.name,
        identity=subject.identity,
        scores={"accuracy": result.accuracy, "train": result.train_accuracy},
        data=f"{train} -> {test}",
        train=len(first.label_N),
        test=len(second.label_N),
        command=command_of("linear-probe", [checkpoint, train, test, "--quick"], settings, sections),
    )
    return LinearProbeReport(
        subject=subject.name,
        accuracy=result.accuracy,
        train_accuracy=result.train_accuracy,
        l2=result.l2,
        converged=result.converged,
        train=len(first.label_N),
        test=len(second.label_N),
        bad=bad,
        kept=_kept(evaluation, keep),
    )


def finetune(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] = _ignore,
) -> SupervisedReport:
    """Train student and classifier on labelled pictures; see `milan_pipe.evaluation.finetune`."""
    settings = params or Params()
    return _finetune(
        checkpoint,
        train,
        val,
        run,
        student=settings.student,
        augment=settings.augment,
        config=settings.finetune,
        record={
            "settings": settings.model_dump(mode="json", include={"finetune", "augment"}),
            "data": f"{train} -> {val}",
            "command": command_of(
                "finetune",
                [checkpoint, train, val, run],
                settings,
                _student_sections(checkpoint, "augment", "finetune"),
            ),
        },
        on_progress=on_progress,
    )


def segment(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] = _ignore,
) -> SupervisedReport:
    """Train UperNet on the student; see `milan_pipe.evaluation.segment`."""
    settings = params or Params()
    return _segment(
        checkpoint,
        train,
        val,
        run,
        student=settings.student,
        config=settings.segment,
        record={
            "settings": settings.model_dump(mode="json", include={"segment"}),
            "data": f"{train} -> {val}",
            "command": command_of(
                "segment", [checkpoint, train, val, run], settings, _student_sections(checkpoint, "segment")
            ),
        },
        on_progress=on_progress,
    )


def lars_probe(
    checkpoint: str | Path,
    train: str | Path,
    val: str | Path,
    run: str | Path,
    params: Params | None = None,
    *,
    on_progress: Callable[[TrainProgress], None] = _ignore,
) -> SupervisedReport:
    """Linear probe by protocol, with LARS; see `milan_pipe.evaluation.lars_probe`."""
    settings = params or Params()
    return _lars_probe(
        checkpoint,
        train,
        val,
        run,
        student=settings.student,
        config=settings.lars_probe,
        record={
            "settings": settings.model_dump(mode="json", include={"lars_probe"}),
            "data": f"{train} -> {val}",
            "command": command_of(
                "linear-probe", [checkpoint, train, val, run], settings, _student_sections(checkpoint, "lars_probe")
            ),
        },
        on_progress=on_progress,
    )


def export(checkpoint: str | Path, out: str | Path) -> ExportReport:
    """Write the student of a checkpoint in timm's layout; see `milan_pipe.interop.timm_layout`."""
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
    return _import_published(file, run, encoder_heads=encoder_heads, decoder_heads=decoder_heads, prefix=prefix)


def train_demo_teacher(out_dir: str | Path, params: Params | None = None) -> dict[str, float]:
    """Train the scenes' CLIP anew; takes about an hour on two cores. See `milan_pipe.teacher.demo_training`."""
    return _train_demo_teacher(Path(out_dir), (params or Params()).demo_teacher)
