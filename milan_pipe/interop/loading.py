"""A student for other code: the timm model, with its weights and what timm wants to know of its input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer

from milan_pipe.errors import DataError, StoreError, resource_hint
from milan_pipe.evaluation.backbone import student_of
from milan_pipe.evaluation.classifier import classifier_of
from milan_pipe.interop.timm_layout import CONFIG_FILE, CROP, WEIGHTS_FILE, input_of
from milan_pipe.training.checkpoint import open_checkpoint
from milan_pipe.weights_file import require_opens


def load_student(path: str | Path) -> VisionTransformer:
    """The student of a checkpoint, a run, or a folder that `export` wrote, in evaluation mode on the CPU.

    `model.forward_features(images)` gives (B, 1 + L, D), CLS first; of a run of `finetune`, `model(images)` gives the
    logits. Images are RGB, normalised with ImageNet's mean and deviation:
    `timm.data.create_transform(**timm.data.resolve_model_data_config(model))` does all of it.

    Raises:
        MissingError: nothing is there.
        DataError: it is damaged, or holds no student.
        StoreError: it cannot be read.
        MismatchError: its tensors are not those of its student.
    """
    folder = Path(path)
    model: Any
    if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
        try:
            require_opens(folder / WEIGHTS_FILE)
            model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True)
        except (RuntimeError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if hint := resource_hint(error):
                raise StoreError(f"{folder} cannot be read: {hint}") from error
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{folder} is no model that timm can load ({reason}); export it again") from error
        return model.eval()  # type: ignore[no-any-return]
    opened = open_checkpoint(folder)
    tuned = opened.record.get("task") == "finetune"
    config, model = classifier_of(opened) if tuned else student_of(opened)
    model.pretrained_cfg = input_of(config, model.num_classes, opened.record["crop"] if tuned else CROP)
    model.default_cfg = model.pretrained_cfg
    return model.eval()  # type: ignore[no-any-return]
