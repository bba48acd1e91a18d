"""Pretrain vision transformers on stored CLIP features: MILAN as a two-stage offline pipeline.

Every command is a function of the same name; `open_targets` and `load_student` give what they wrote to other code.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from milan_pipe.api import (
        convert_targets,
        doctor,
        embed,
        export,
        extract_targets,
        finetune,
        import_published,
        inspect_student,
        inspect_targets,
        knn,
        lars_probe,
        linear_probe,
        plan,
        prepare,
        pretrain,
        push,
        replay,
        report,
        segment,
        segment_probe,
        train_clip,
        verify_targets,
    )
    from milan_pipe.config.params import Params, load_params
    from milan_pipe.interop.timm_layout import load_student
    from milan_pipe.loader.dataset import Target, TargetDataset, Targets, open_targets

__all__ = [
    "Params",
    "Target",
    "TargetDataset",
    "Targets",
    "convert_targets",
    "doctor",
    "embed",
    "export",
    "extract_targets",
    "finetune",
    "import_published",
    "inspect_student",
    "inspect_targets",
    "knn",
    "lars_probe",
    "linear_probe",
    "load_params",
    "load_student",
    "open_targets",
    "plan",
    "prepare",
    "pretrain",
    "push",
    "replay",
    "report",
    "segment",
    "segment_probe",
    "train_clip",
    "verify_targets",
]

_ELSEWHERE = {
    "Params": "milan_pipe.config.params",
    "Target": "milan_pipe.loader.dataset",
    "TargetDataset": "milan_pipe.loader.dataset",
    "Targets": "milan_pipe.loader.dataset",
    "load_params": "milan_pipe.config.params",
    "load_student": "milan_pipe.interop.timm_layout",
    "open_targets": "milan_pipe.loader.dataset",
}


def __getattr__(name: str) -> Any:
    # Late, so that `milan-pipe --help` does not wait for torch.
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "milan_pipe.api")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
