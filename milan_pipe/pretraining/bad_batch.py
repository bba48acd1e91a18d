"""A batch whose loss or gradient is not finite: written with the weights that met it, and computed again."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from milan_pipe.config.params import Params
from milan_pipe.config.training import Precision
from milan_pipe.devices import memory_for, resolve_device
from milan_pipe.errors import DataError, MissingError, first_problem
from milan_pipe.loader.stream import Batch
from milan_pipe.pretraining.objective import build_objective
from milan_pipe.student.standardise import Standardise, standardise_of
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.training.optim import build_adamw
from milan_pipe.training.step import Stepper
from milan_pipe.weights_file import load_tensors, load_weights, metadata_of, mismatch, write_weights

_VERSION = "1"
_CODES = ("code_BST", "scale_BS")
_TENSORS = ("pixels_BHWC", *_CODES, "attention_BL")
_SECTIONS = ("student", "decoder", "masking", "target", "teachers", "pretrain")


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """The batch, computed again.

    Attributes:
        step, epoch: of the run; `step` is counted from 1, `epoch` from 0.
        loss, grad_norm: of the whole batch, the norm before clipping.
        loss_by_key: of each sample alone, the largest first.
        gradient: parameters whose gradient is not finite.
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


def bad_batch_file(run: Path, step: int) -> Path:
    """RUN/not-finite/step-NNNNNNNN.safetensors, `step` counted from 1."""
    return run / "not-finite" / f"step-{step:08d}.safetensors"


def write_bad_batch(
    file: Path, batch: Batch, weights: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]
) -> None:
    """Write a batch and the weights of `student` and `decoder` as they met it; StoreError if it cannot be written.

    Args:
        weights: also, under `statistics`, those of each store's features, by its number.
        metadata: step, epoch, headers of the stores, and the settings that rebuild the objective.
    """
    tensors = {f"batch/{name}": value for name in _TENSORS if (value := getattr(batch, name)) is not None}
    for number, codes in enumerate(batch.others, 1):
        named = zip(_CODES, codes, strict=True)
        tensors |= {f"others/{number}/{name}": value for name, value in named if value is not None}
    tensors |= {f"{part}/{name}": value for part, values in weights.items() for name, value in values.items()}
    kept = {name: metadata[name] for name in ("step", "epoch", "header", "others", *_SECTIONS)}
    write_weights(tensors, file, {"milan_pipe": json.dumps({"version": _VERSION, "keys": batch.keys, **kept})})


class _Metadata(BaseModel, extra="allow"):
    """What is read of a file beside its tensors and the settings."""

    version: str
    keys: tuple[str, ...]
    step: int
    epoch: int
    header: StoreHeader
    others: tuple[StoreHeader, ...] = ()


def _read(file: Path) -> tuple[_Metadata, dict[str, Tensor]]:
    expected = "expected a file that a run wrote under RUN/not-finite"
    if not file.is_file():
        raise MissingError(f"{file} is not there; {expected}")
    try:
        tensors = load_tensors(file)
    except DataError as error:
        raise DataError(f"{error}; {expected}") from error
    try:
        text = metadata_of(file)["milan_pipe"]
        version = json.loads(text)["version"]
        if version == _VERSION:
            metadata = _Metadata.model_validate_json(text)
            wanted = _expected(metadata)
    # A header of sizes that no tensor has is a RuntimeError or TypeError of torch.
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        what = f" ({first_problem(error)})" if isinstance(error, ValidationError) else ""
        raise DataError(f"{file} holds no batch of a run{what}; {expected}") from error
    if version != _VERSION:
        raise DataError(f"{file} has version {version}, this milan-pipe reads {_VERSION}")
    if problems := mismatch(tensors, wanted | {name: t for name, t in tensors.items() if _is_free(name)}):
        raise DataError(f"{file} holds no batch of its header: {problems}; {expected}")
    return metadata, tensors


def _is_free(name: str) -> bool:
    """Whether a tensor's shape is judged by the model."""
    return not name.startswith(("batch/", "others/"))


def _expected(metadata: _Metadata) -> dict[str, Tensor]:
    """Tensors of the batch, in shape alone."""
    count, header = len(metadata.keys), metadata.header
    shapes: dict[str, tuple[int, ...]] = {
        "batch/pixels_BHWC": (count, header.views.size, header.views.size, 3),
        "batch/attention_BL": (count, header.patches),
    }
    for part, one in ("batch", header), *((f"others/{n}", other) for n, other in enumerate(metadata.others, 1)):
        shapes[f"{part}/code_BST"] = count, one.tokens, one.teacher.width
        if codec_of(one.codec).has_scale:
            shapes[f"{part}/scale_BS"] = count, one.tokens
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _standardise(
    of: Mapping[str, Mapping[str, Tensor]], header: StoreHeader, others: Sequence[StoreHeader], params: Params
) -> list[Standardise]:
    statistics: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for full, value in of.get("statistics", {}).items():
        number, _, name = full.partition("/")
        statistics[int(number)][name] = value
    widths = [one.teacher.width for one in (header, *others)]
    return [standardise_of(params.teachers.standardise, statistics[n], widths[n]) for n in sorted(statistics)]


def _not_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor.float())).sum())


def replay(
    file: str | Path,
    *,
    device: str = "auto",
    precision: Precision | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> ReplayReport:
    """Compute a bad batch again with the weights that met it, without store or teacher.

    Args:
        precision: None is the run's.
        on_progress: called with samples done, samples.

    Raises:
        MissingError, DataError, StoreError: the file is missing or damaged, or cannot be read.
        SettingError: no such device.
        DeviceFullError: it describes a model that memory does not hold.
    """
    metadata, tensors = _read(Path(file))
    of: dict[str, dict[str, Any]] = defaultdict(dict)
    for full, value in tensors.items():
        part, _, name = full.partition("/")
        of[part][name] = value
    keys, where, chosen = metadata.keys, str(file), resolve_device(device)
    header, others, sections = metadata.header, metadata.others, metadata.model_extra or {}
    codes = [tuple(of["others"].get(f"{number}/{name}") for name in _CODES) for number in range(1, len(others) + 1)]
    batch = Batch(keys=keys, **{"scale_BS": None, **of["batch"], "others": tuple(codes)})
    params = Params.parse({name: sections[name] for name in _SECTIONS if name in sections}, where)
    # Not compiled, so that it shows where a value went wrong; whatever a file says, as that starts a compiler.
    settings = params.pretrain.model_copy(update={"compile": False})
    params = params.model_copy(update={"pretrain": settings})
    standardise = _standardise(of, header, others, params)
    with memory_for(f"the model that {where} describes", "is it the file that a run wrote?"):
        objective = build_objective(header, params, chosen, others=others, standardise=standardise)
    model = objective.student
    load_weights(model.encoder, of["student"], where)
    load_weights(model.decoder, of["decoder"], where)
    stepper = Stepper[Batch](
        build_adamw(model, lr=0.0, betas=settings.betas, weight_decay=0.0),
        objective,
        split=lambda whole: whole.parts(1),
        device=chosen,
        precision=precision or settings.precision,
    )
    by_key: dict[str, float] = {}
    for row, key in enumerate(keys):
        with torch.no_grad():
            by_key[key] = float(stepper.loss(batch.rows(row, row + 1), metadata.epoch))
        on_progress(row + 1, len(keys))
    result = stepper(batch, metadata.epoch, 0.0)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return ReplayReport(
        step=metadata.step,
        epoch=metadata.epoch,
        precision=precision or settings.precision,
        loss=float(result.loss),
        grad_norm=float(result.grad_norm),
        loss_by_key=dict(sorted(by_key.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf)),
        gradient=tuple(name for name, grad in gradients.items() if _not_finite(grad)),
        stored={
            **{name: _not_finite(value) for name, value in of["batch"].items()},
            "weights": sum(_not_finite(value) for part in ("student", "decoder") for value in of[part].values()),
        },
    )
