"""Pretrain vision transformers on stored CLIP features: MILAN as a two-stage offline pipeline."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from milan_pipe.commands import (
        export,
        extract_targets,
        import_published,
        knn,
        linear_probe,
        plan,
        prepare,
        pretrain,
        replay,
    )
    from milan_pipe.config import Params, load_params

__all__ = [
    "Params",
    "export",
    "extract_targets",
    "import_published",
    "knn",
    "linear_probe",
    "load_params",
    "plan",
    "prepare",
    "pretrain",
    "replay",
]

_HOMES = {
    "Params": "milan_pipe.config",
    "load_params": "milan_pipe.config",
    "export": "milan_pipe.commands",
    "extract_targets": "milan_pipe.commands",
    "import_published": "milan_pipe.commands",
    "knn": "milan_pipe.commands",
    "linear_probe": "milan_pipe.commands",
    "plan": "milan_pipe.commands",
    "prepare": "milan_pipe.commands",
    "pretrain": "milan_pipe.commands",
    "replay": "milan_pipe.commands",
}


def __getattr__(name: str) -> Any:
    # Late, so that `milan-pipe --help` does not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
