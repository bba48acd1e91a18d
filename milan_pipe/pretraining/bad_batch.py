"""The batch that a run could not learn from: written with the weights that met it, and computed again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from milan_pipe.config.params import Params
from milan_pipe.config.training import Precision
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError, MissingError
from milan_pipe.loader.stream import Batch
from milan_pipe.pretraining.objective import build_objective
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.step import Stepper
from milan_pipe.weights_file import load_tensors, load_weights, write_weights

_VERSION = "1"
_TENSORS = ("pixels_BHWC", "code_BST", "scale_BS", "attention_BL")


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What came out when the batch was computed again.

    Attributes:
        step: of the run, and `epoch`, counted from 0.
        loss: of the whole batch.
        grad_norm: of the whole batch, before clipping.
        loss_by_key: each sample alone.
        gradient: names of parameters whose gradient is not finite.
        stored: number of values that are not finite, by stored tensor; weights are under `weights`.
    """

    step: int
    epoch: int
    precision: str
    loss: float
    grad_norm: float
    loss_by_key: dict[str, float]
    gradient: tuple[str, ...]
    stored: dict[str, int]


def write_bad_batch(
    run: Path,
    batch: Batch,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    step: int,
    epoch: int,
    header: StoreHeader,
    configuration: Mapping[str, Any],
) -> Path:
    """Write RUN/not-finite/step-NNNNNNNN.safetensors.

    Args:
        weights: of `student` and `decoder`, as they met the batch.
        step: counted from 1.
        configuration: of the run; see `configuration_of`.

    Raises:
        StoreError: it cannot be written.
    """
    file = run / "not-finite" / f"step-{step:08d}.safetensors"
    tensors = {f"batch/{name}": value for name in _TENSORS if (value := getattr(batch, name)) is not None}
    for part, values in weights.items():
        tensors.update({f"{part}/{name}": value for name, value in values.items()})
    metadata = {
        "version": _VERSION,
        "step": step,
        "epoch": epoch,
        "keys": batch.keys,
        "header": header.model_dump(mode="json"),
        **{name: configuration[name] for name in ("student", "decoder", "masking", "target", "pretrain")},
    }
    write_weights(tensors, file, {"milan_pipe": json.dumps(metadata)})
    return file


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not file.is_file():
        raise MissingError(f"{file} is not there; expected a file that a run wrote under RUN/not-finite")
    try:
        tensors = load_tensors(file)
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {})["milan_pipe"])
        version = metadata["version"]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}); expected a file that a run wrote under RUN/not-finite"
        ) from error
    if version != _VERSION:
        raise DataError(f"{file} has version {version}, this milan-pipe reads {_VERSION}")
    return metadata, tensors


def _not_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor.float())).sum())


def replay(
    file: str | Path,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> ReplayReport:
    """Compute a bad batch again with the weights that met it; no store and no teacher is needed.

    Args:
        precision: none takes the run's.
        on_progress: called with samples done, samples.

    Raises:
        MissingError, DataError, StoreError: no such file, or it is damaged or cannot be read.
        SettingError: no such device.
    """
    metadata, tensors = _read(Path(file))
    of = {
        part: {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}
        for part in ("batch", "student", "decoder")
    }
    keys = tuple(metadata["keys"])
    batch = Batch(keys=keys, **{"scale_BS": None, **of["batch"]})  # type: ignore[arg-type]
    where = str(file)
    chosen = resolve_device(device)
    # Not compiled, whatever the run was: what is compiled hides where a value went wrong.
    sections = ("student", "decoder", "masking", "target", "pretrain")
    params = Params.parse({name: metadata[name] for name in sections}, where)
    config = params.pretrain
    objective = build_objective(StoreHeader.model_validate(metadata["header"]), params, chosen)
    model = objective.student
    load_weights(model.encoder, of["student"], where)
    load_weights(model.decoder, of["decoder"], where)
    stepper = Stepper(
        build_adamw(model, lr=0.0, betas=config.betas, weight_decay=0.0),
        objective,
        split=lambda whole: whole.parts(1),
        device=chosen,
        precision=precision or config.precision,
        clip_grad=None,
    )
    by_key: dict[str, float] = {}
    for row, key in enumerate(keys):
        with torch.no_grad():
            by_key[key] = float(stepper.loss(batch.rows(row, row + 1), metadata["epoch"]))
        on_progress(row + 1, len(keys))
    result = stepper(batch, metadata["epoch"], 0.0)
    gradient = tuple(
        name for name, value in model.named_parameters() if value.grad is not None and _not_finite(value.grad)
    )
    return ReplayReport(
        step=metadata["step"],
        epoch=metadata["epoch"],
        precision=precision or config.precision,
        loss=float(result.loss),
        grad_norm=float(result.grad_norm),
        loss_by_key=dict(sorted(by_key.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf)),
        gradient=gradient,
        stored={
            **{name: _not_finite(value) for name, value in of["batch"].items()},
            "weights": sum(_not_finite(value) for part in ("student", "decoder") for value in of[part].values()),
        },
    )
