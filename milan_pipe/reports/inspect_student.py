"""Images of what a student predicts, beside what it should have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from milan_pipe.config.params import Params
from milan_pipe.devices import resolve_device
from milan_pipe.drawing.patches import FeatureColours, heat, on_pixels, only_visible, overlaid
from milan_pipe.drawing.sheet import Panel, Row, Sheet
from milan_pipe.errors import DataError, MismatchError, SettingError
from milan_pipe.loader.dataset import Targets, open_targets
from milan_pipe.loader.stream import read_batch
from milan_pipe.pretraining.objective import Objective, build_objective, require_fit
from milan_pipe.pretraining.statistics import kept_standardise
from milan_pipe.reports.gallery import write_gallery
from milan_pipe.reports.samples import choose_samples
from milan_pipe.storage import local_folder
from milan_pipe.student.objectives import is_taught
from milan_pipe.targets.schema import NOT_COMPARED, StoreHeader, TeacherInfo
from milan_pipe.training.checkpoint import Checkpoint, open_checkpoint, run_of
from milan_pipe.weights_file import load_weights

_SECTIONS = ("decoder", "masking", "target", "teachers")


@dataclass(frozen=True, kw_only=True)
class InspectStudentReport:
    """What was drawn: `page` is self-contained, `images` has one PNG for each of `keys`.

    Attributes:
        cosine: of each sample, the mean over all its patches.
        masked_cosine: the same over those that the student did not see.
    """

    page: str
    images: tuple[str, ...]
    keys: tuple[str, ...]
    step: int
    cosine: tuple[float, ...]
    masked_cosine: tuple[float, ...]


@dataclass(frozen=True)
class _Prediction:
    """What is drawn of one sample; per patch, `predicted_LT` and `target_LT` of one width."""

    key: str
    pixels_HWC: NDArray[np.uint8]
    attention_L: NDArray[np.float32]
    visible_L: NDArray[np.bool_]
    target_LT: NDArray[np.float32]
    predicted_LT: NDArray[np.float32]
    cosine_L: NDArray[np.float32]

    @property
    def means(self) -> tuple[float, float]:
        """Mean cosine of all patches, and of hidden ones, of all where none is hidden."""
        hidden_L = ~self.visible_L if not self.visible_L.all() else self.visible_L
        return float(self.cosine_L.mean()), float(self.cosine_L[hidden_L].mean())


def teachers_of(record: Mapping[str, Any]) -> list[Any]:
    """What a run's record says of its stores' teachers, in their order."""
    return [record.get("teacher"), *(other["teacher"] for other in record.get("others", []))]


def number_of(teacher: TeacherInfo, teachers: Sequence[Any]) -> int | None:
    """Which of a run's teachers this is: the same in all that targets depend on, or else of the same weights."""
    whole = teacher.model_dump(mode="json", exclude=set(NOT_COMPARED))
    records = [{} if one is None else {name: one[name] for name in one if name not in NOT_COMPARED} for one in teachers]
    if whole in records:
        return records.index(whole)
    digests = [one.get("weights_sha256") for one in records]
    return digests.index(teacher.weights_sha256) if teacher.weights_sha256 in digests else None


def pretrained_objective(checkpoint: Checkpoint, header: StoreHeader, device: torch.device) -> tuple[Objective, int]:
    """Student and decoder of a checkpoint, with the masks and the target that it was trained on.

    Returns:
        The objective, and which of the stores that it learned from the header is of, by its teacher.

    Raises:
        DataError: the checkpoint is not one of pretraining.
        MismatchError: it does not fit the targets: grid, input size, width of the features, or teacher.
    """
    where, record = str(checkpoint.path), checkpoint.record
    settings = record.get("settings")
    if record.get("task") is not None or not isinstance(settings, dict) or "decoder" not in settings:
        raise DataError(f"{where} holds no decoder; name a checkpoint that `milan-pipe pretrain` wrote")
    trained = {"student": record["student"], **{k: v for k, v in settings.items() if k in _SECTIONS}}
    params: Params = Params.parse(trained, where)
    require_fit(header, params.student, "the store")
    teachers = teachers_of(record)
    headers, number = [header], 0
    if is_taught(params.target) and teachers[0] is not None:
        found = number_of(header.teacher, teachers)
        if found is None:
            learned = " and ".join(f"{one['model']!r} (weights {one['weights_sha256'][:12]})" for one in teachers)
            raise MismatchError(
                f"{where} learned from teacher {learned}, the store "
                f"is of {header.teacher.model!r} (weights {header.teacher.weights_sha256[:12]}); name the targets that "
                "it was trained on, or others of the same teacher"
            )
        number = found
        # Of the other stores, only how wide their features are counts here.
        headers = [header.model_copy(update={"teacher": TeacherInfo.parse(one, where)}) for one in teachers]
        headers[number] = header
    digests = record.get("configuration", {}).get("statistics", {})
    standardise = kept_standardise(run_of(checkpoint.path) or checkpoint.path, headers, params, digests)
    objective = build_objective(headers[0], params, device, others=headers[1:], standardise=standardise)
    load_weights(objective.student.encoder, checkpoint.weights("student"), where)
    load_weights(objective.student.decoder, checkpoint.weights("decoder"), where)
    return objective.eval(), number


def _predict(targets: Targets, sample: int, view: int, objective: Objective, store: int, epoch: int) -> _Prediction:
    batch = read_batch(targets.store, targets.block(sample, view))
    with torch.no_grad():
        predicted = objective.predict(batch, epoch, only=store)
    predicted_LT, target_LT = (values_BLT[0].cpu() for values_BLT in predicted.parts[0].patches)
    return _Prediction(
        key=batch.keys[0],
        pixels_HWC=batch.pixels_BHWC[0].numpy(),
        attention_L=batch.attention_BL[0].float().numpy(),
        visible_L=~predicted.split.masked_map()[0].cpu().numpy(),
        target_LT=target_LT.numpy(),
        predicted_LT=predicted_LT.numpy(),
        cosine_L=F.cosine_similarity(predicted_LT, target_LT, dim=-1).numpy(),
    )


def _panels(one: _Prediction, grid: tuple[int, int], colours: FeatureColours, view: int) -> list[Panel]:
    def painted(values_L3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return on_pixels(values_L3.reshape(*grid, 3), *one.pixels_HWC.shape[:2])

    mean, hidden = one.means
    seen = f"seen: {int(one.visible_L.sum())} of {len(one.visible_L)} patches"
    share_L = one.attention_L / max(float(one.attention_L.max()), 1e-12)
    return [
        Panel(one.pixels_HWC, f"view {view}"),
        Panel(overlaid(one.pixels_HWC, share_L.reshape(grid)), "teacher's attention"),
        Panel(only_visible(one.pixels_HWC, one.visible_L.reshape(grid)), seen),
        Panel(painted(colours(one.target_LT)), "target"),
        Panel(painted(colours(one.predicted_LT)), "prediction"),
        Panel(painted(heat(one.cosine_L)), f"cosine {mean:.3f}, hidden {hidden:.3f}"),
    ]


def student_sheets(
    targets: Targets,
    samples: Sequence[int],
    objective: Objective,
    store: int,
    *,
    epoch: int,
    view: int,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[list[Sheet], list[tuple[float, float]]]:
    """Sheets of samples, all in the colours of their targets; mean cosine of all and of hidden patches of each.

    Args:
        store: number of the store that the targets are, among those that the objective is of.

    Raises:
        DataError: the store is damaged.
        SettingError: the store has no such view.
    """
    if not 0 <= view < targets.views:
        raise SettingError(f"view {view}: {targets.store.location} has views 0 to {targets.views - 1}")
    found = []
    for number, sample in enumerate(samples):
        found.append(_predict(targets, sample, view, objective, store, epoch))
        on_progress(number + 1, len(samples))
    colours = FeatureColours(np.concatenate([one.target_LT for one in found]))
    sheets = [Sheet(one.key, [Row("", _panels(one, targets.grid, colours, view))]) for one in found]
    return sheets, [one.means for one in found]


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
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> InspectStudentReport:
    """Draw what a student predicts of a few samples: view, mask, target, prediction, cosine of each patch.

    Args:
        checkpoint: folder of a checkpoint, or of a run.
        out: local folder; OUT/index.html is one self-contained page, OUT/KEY.png one image a sample.
        keys: of the samples; none takes `count` of them, spread over the store.
        epoch: whose masks are drawn, counted from 0.

    Raises:
        MissingError: no such checkpoint, store or key.
        DataError: one of them is damaged, or the checkpoint is not one of pretraining.
        MismatchError: checkpoint and targets do not fit.
        SettingError: no such view or device, or OUT is a URL.
        StoreError: OUT cannot be written.
    """
    folder = local_folder(out, "images")
    opened = open_checkpoint(checkpoint)
    chosen = open_targets(targets)
    objective, store = pretrained_objective(opened, chosen.header, resolve_device(device))
    samples = choose_samples(chosen, keys, count)
    sheets, cosines = student_sheets(chosen, samples, objective, store, epoch=epoch, view=view, on_progress=on_progress)
    cosine, masked_cosine = zip(*cosines, strict=True)
    facts = {
        "checkpoint": str(opened.path),
        "targets": str(chosen.store.location),
        "target": objective.target,
        "masks": f"{objective.masking.kind}, {objective.visible} of {objective.patches} patches seen, those of epoch "
        f"{epoch + 1}",
        "colours": "three principal components of the targets shown, prediction in the same",
        "cosine": f"dark 0 or below, bright 1; mean {np.mean(cosine):.3f}, of hidden patches "
        f"{np.mean(masked_cosine):.3f}",
    }
    page, images = write_gallery(folder, "Predictions", facts, sheets)
    return InspectStudentReport(
        page=page,
        images=images,
        keys=tuple(sheet.title for sheet in sheets),
        step=int(opened.record["step"]),
        cosine=cosine,
        masked_cosine=masked_cosine,
    )
