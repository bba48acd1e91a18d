"""A pretrained student, or one that was fine-tuned, in the layout that timm reads from a folder and from its hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import StoreError, system_reason
from milan_pipe.evaluation.backbone import student_of
from milan_pipe.evaluation.classifier import classifier_of, timm_sizes
from milan_pipe.storage import location_of
from milan_pipe.storage.local import file_mode
from milan_pipe.training.checkpoint import Checkpoint, open_checkpoint
from milan_pipe.weights_file import require_folder_name

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
# The centre crop that MAE and MILAN evaluate at: 224 of 256 pixels.
CROP = 0.875


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported: where to, and how timm is asked for it."""

    folder: str
    weights: str
    model: str
    model_args: dict[str, Any]
    parameters: int
    step: int
    classes: int


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    teacher = checkpoint.record.get("teacher")
    return {
        "step": checkpoint.record["step"],
        "epochs": checkpoint.record.get("epochs"),
        "package_version": checkpoint.record.get("package_version"),
        "teacher": teacher if isinstance(teacher, dict) else None,
    }


def input_of(config: StudentSettings, classes: int, crop: float) -> dict[str, Any]:
    """What timm is given of the input: its `resolve_data_config` reads it."""
    # In place of what timm says of its own weights of that name: tag, licence and origin are not these weights'.
    return {
        "architecture": config.model,
        "num_classes": classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
        "input_size": (3, config.image_size, config.image_size),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": crop,
    }


def export_student(checkpoint: str | Path, folder: str | Path) -> ExportReport:
    """Write the encoder of a checkpoint, and its classifier where it was fine-tuned, as FOLDER/model.safetensors.

    FOLDER/config.json stands beside it. `timm.create_model("local-dir:FOLDER", pretrained=True)` builds and loads both,
    as does the hub's `hf-hub:` where the folder was uploaded. The weights have timm's own names.

    Args:
        checkpoint: a checkpoint folder, or a run folder (its last checkpoint).
        folder: must not be there yet, or be empty.

    Raises:
        SettingError: FOLDER has the name of a weights file.
        MissingError, DataError, MismatchError: the checkpoint cannot be used.
        StoreError: the folder is taken or cannot be written.
    """
    require_folder_name(Path(folder), f"{WEIGHTS_FILE} and {CONFIG_FILE}")
    opened = open_checkpoint(checkpoint)
    tuned = opened.record.get("task") == "finetune"
    config, encoder = classifier_of(opened) if tuned else student_of(opened)
    arguments = timm_sizes(config) | ({"global_pool": "avg"} if tuned else {})
    names = opened.record.get("classes") if tuned else None
    labels = {"label_names": names} if isinstance(names, list) else {}
    # Absolute: a bare name such as `out` has no parent to make a sibling in.
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target} is there and not empty; name another folder, or remove this one first")
    location = location_of(target.parent)
    location.clear_scratch(target.name)
    scratch = location.scratch(target.name)
    try:
        described: Any = encoder
        described.pretrained_cfg = input_of(config, encoder.num_classes, opened.record["crop"] if tuned else CROP)
        save_for_hf(
            encoder,
            str(scratch),
            model_config={"milan_pipe": _origin(opened), **labels},
            model_args=arguments,
            safe_serialization=True,
        )
        file_mode(scratch / WEIGHTS_FILE, (scratch / CONFIG_FILE).stat().st_mode)
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
        weights=str(target / WEIGHTS_FILE),
        model=config.model,
        model_args=arguments,
        parameters=sum(tensor.numel() for tensor in encoder.parameters()),
        step=int(opened.record["step"]),
        classes=encoder.num_classes,
    )
