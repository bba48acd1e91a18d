"""A student, pretrained or fine-tuned, as timm's model, and in the layout that timm reads from a folder and its hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from safetensors import SafetensorError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from timm.models._hub import load_model_config_from_path
from torch import Tensor

from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import DataError, SettingError, StoreError, one_line, resource_hint, system_reason
from milan_pipe.evaluation.backbone import Backbone, student_of
from milan_pipe.evaluation.classifier import classifier_of
from milan_pipe.interop.card import CARD, Score, model_card, own_scores, scores_of
from milan_pipe.pretrained.source import UNBUILT, require_depth
from milan_pipe.storage import location_of
from milan_pipe.storage.kinds import require_outside_stores
from milan_pipe.storage.local import file_mode, read_regular
from milan_pipe.student.encoder import Encoder, timm_options
from milan_pipe.training.checkpoint import Checkpoint, open_checkpoint, run_of
from milan_pipe.weights_file import require_folder_name, require_opens, weights_digest

_WEIGHTS_FILE, _CONFIG_FILE = "model.safetensors", "config.json"
STUDENT_FILES = (_CONFIG_FILE, _WEIGHTS_FILE)
# The centre crop that MAE and MILAN evaluate at: 224 of 256 pixels.
_CROP = 0.875
_UNREAD: tuple[type[Exception], ...] = (OSError, SafetensorError, *UNBUILT)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported: where to, and what `timm.create_model` takes to build it."""

    folder: str
    weights: str
    model: str
    model_args: dict[str, Any]
    parameters: int
    step: int
    classes: int


def _model_of(checkpoint: Checkpoint) -> tuple[StudentSettings, Encoder]:
    """A checkpoint's student, with its classifier where it was fine-tuned, described as timm describes models."""
    tuned = checkpoint.record.get("task") == "finetune"
    settings, model = classifier_of(checkpoint) if tuned else student_of(checkpoint)
    crop = checkpoint.record.get("crop") if tuned else _CROP
    if not isinstance(crop, float | int):
        raise DataError(f"{checkpoint.path} does not say how much of an image its classifier sees; train it again")
    # timm's own weights of that name have another tag, licence and origin.
    described: Any = model
    described.pretrained_cfg = described.default_cfg = {
        "architecture": settings.model,
        "num_classes": model.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
        "input_size": (3, settings.image_size, settings.image_size),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": crop,
    }
    return settings, model


def load_student(path: str | Path) -> Encoder:
    """The student of a checkpoint, a run, or a folder that `export` wrote, in evaluation mode on the CPU.

    `model.forward_features(images)` gives (B, 1 + L, D), CLS first; a model with registers has them between CLS and
    patches, and one without class token has no CLS. Of a run of `finetune`, `model(images)` gives the logits.
    `timm.data.create_transform(**timm.data.resolve_model_data_config(model))` prepares images for it.

    Raises:
        MissingError: nothing is there.
        DataError: it is damaged, or holds no student.
        StoreError: it cannot be read.
        MismatchError: its tensors are not those of its student.
    """
    folder = Path(path)
    if not ((folder / _CONFIG_FILE).is_file() and (folder / _WEIGHTS_FILE).is_file()):
        return _model_of(open_checkpoint(folder))[1].eval()
    try:
        require_opens(folder / _WEIGHTS_FILE)
        require_depth(load_model_config_from_path(folder)[2])
        model: Any = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True)
    except _UNREAD as error:
        if hint := resource_hint(error):
            raise StoreError(f"{folder} cannot be read: {hint}") from error
        raise DataError(f"{folder} is no model that timm can load ({one_line(error)}); export it again") from error
    require_exported(folder, model.state_dict())
    return cast("Encoder", model.eval())


def _scores(
    checkpoint: Checkpoint, settings: StudentSettings, encoder: Encoder, others: Sequence[str | Path]
) -> list[Score]:
    """What is known of a student, or of a classifier."""
    if encoder.num_classes:
        if others:
            raise SettingError(f"{checkpoint.path} is fine-tuned, and no run begins with it; leave --scores out")
        return own_scores(checkpoint)
    run = run_of(checkpoint.path) or checkpoint.path
    identity = Backbone(name=str(checkpoint.path), settings=settings, weights=encoder.state_dict()).digest()
    return scores_of(run, identity, others)


def require_exported(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights of a folder of `export` that are not those that were exported, as far as it says which.

    Raises:
        DataError: they are damaged, or others.
        StoreError: what it says cannot be read.
    """
    try:
        described = json.loads(read_regular(folder / _CONFIG_FILE))
        # Other tools, and earlier versions, say none.
        digest = described.get("milan_pipe", {}).get("weights_sha256")
    except OSError as error:
        raise StoreError(f"{folder / _CONFIG_FILE} cannot be read: {system_reason(error)}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder / _CONFIG_FILE} is damaged ({one_line(error)}); export it again") from error
    if digest is not None and digest != weights_digest(tensors):
        raise DataError(
            f"{folder / _WEIGHTS_FILE} does not fit its digest in {_CONFIG_FILE}: it is damaged, or was changed; "
            "export it again, or take milan_pipe.weights_sha256 out if the change is yours"
        )


def export_student(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    license: str | None = None,
    scores: Sequence[str | Path] = (),
) -> ExportReport:
    """Write the encoder of a checkpoint, and its classifier where it was fine-tuned, in timm's layout, with a card.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, as does `hf-hub:` once the folder is uploaded.

    Args:
        checkpoint: a checkpoint folder, or a run folder (its last checkpoint).
        folder: must not be there yet, or be empty; gets model.safetensors, config.json and README.md.
        license: of the student, for the card; the hub's name of it.
        scores: runs that began with this student, whose scores the card names beside those in its own run.

    Raises:
        SettingError: FOLDER has the name of a weights file.
        MissingError, DataError, MismatchError: the checkpoint or one of `scores` cannot be used.
        StoreError: the folder is not empty, lies in a target store or cannot be written.
    """
    require_folder_name(Path(folder), f"{_WEIGHTS_FILE} and {_CONFIG_FILE}")
    require_outside_stores(Path(folder))
    opened = open_checkpoint(checkpoint)
    settings, encoder = _model_of(opened)
    record, arguments = opened.record, timm_options(settings, classifies=encoder.num_classes > 0)
    origin = {name: record.get(name) for name in ("step", "epochs", "package_version", "teacher")}
    origin["weights_sha256"] = weights_digest(encoder.state_dict())
    described: dict[str, Any] = {"milan_pipe": origin}
    if encoder.num_classes and isinstance(record["classes"], list):
        described["label_names"] = record["classes"]
    known = _scores(opened, settings, encoder, scores)
    card = model_card(opened, settings, encoder.num_classes, known, license)
    # Absolute: a bare name such as `out` has no parent to make a sibling in.
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target} exists and is not empty; name another folder, or remove this one first")
    location = location_of(target.parent)
    location.clear_scratch(target.name)
    scratch = location.scratch(target.name)
    try:
        save_for_hf(encoder, str(scratch), model_config=described, model_args=arguments, safe_serialization=True)
        file_mode(scratch / _WEIGHTS_FILE, (scratch / _CONFIG_FILE).stat().st_mode)
        (scratch / CARD).write_text(card, encoding="utf-8")
        if target.exists():
            target.rmdir()
        location.publish(scratch, target.name)
    except StoreError:
        raise
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{target} cannot be written: {system_reason(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ExportReport(
        folder=str(target),
        weights=str(target / _WEIGHTS_FILE),
        model=settings.model,
        model_args=arguments,
        parameters=sum(tensor.numel() for tensor in encoder.parameters()),
        step=int(record["step"]),
        classes=encoder.num_classes,
    )
