"""Where a student's weights come from when it does not begin with random ones."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from milan_pipe.config.student import StudentSettings
from milan_pipe.config.teacher import FOLDER, HUB, TIMM
from milan_pipe.errors import DataError, MismatchError, MissingError
from milan_pipe.pretrained.source import Asker
from milan_pipe.pretrained.timm_source import TimmSource, find_timm_source, is_timm_folder
from milan_pipe.storage.local import read_regular, write_file
from milan_pipe.student.encoder import Encoder, build_encoder, position_table, positioned_prefix
from milan_pipe.training.checkpoint import Checkpoint, open_checkpoint
from milan_pipe.weights_file import load_weights, mismatch, read_weights, weights_digest

_ASKER = Asker(what="student.init", setting="student.init")
# A classifier's, which a student does not have.
_OF_HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
_FILE = "init.json"


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run began with.

    Attributes:
        init: the setting.
        sha256: digest over names and values of the weights.
        source, license: where they are published, and under what; None where nobody says.
        trains_positions: they had position embeddings of their own, which are trained on; else these are the fixed
            table.
    """

    init: str
    sha256: str
    source: str | None
    license: str | None
    trains_positions: bool


def _heads(encoder: nn.Module) -> int | None:
    """Of its blocks, which leave no trace in the weights."""
    heads = getattr(getattr(next(iter(getattr(encoder, "blocks", ())), None), "attn", None), "num_heads", None)
    return heads if isinstance(heads, int) else None


def _found(init: str) -> tuple[dict[str, Tensor], int | None, str | None, str | None]:
    """Weights by timm's names, the heads that they were trained with, their source and licence."""
    name = f"{TIMM}{FOLDER}:{init}" if is_timm_folder(init) else init
    if name.partition(":")[0] in (FOLDER, HUB):
        name = f"{TIMM}{name}"
    if name.startswith(TIMM):
        source = find_timm_source(name, None, _ASKER, TimmSource)
        model = source.trained()
        return dict(model.state_dict()), _heads(model), source.origin, source.license()
    if Path(init).is_file():
        return dict(read_weights(Path(init))), None, None, None
    expected = "a run, a checkpoint, a folder or file of weights in timm's layout, timm:NAME or hf-hub:ORG/NAME"
    opened = _run(init, "student", expected)
    sizes, weights = opened.record.get("student"), dict(opened.weights("student"))
    settings = None if sizes is None else StudentSettings.parse(sizes, f"{opened.path}, student")
    return weights, None if settings is None else _heads(build_encoder(settings)), None, None


def _run(init: str, part: str, expected: str) -> Checkpoint:
    """A checkpoint of pretraining."""
    if not Path(init).exists():
        raise MissingError(f"{part}.init: {init} is not there; expected {expected}")
    opened = open_checkpoint(Path(init))
    if task := opened.record.get("task"):
        raise DataError(f"{part}.init: {opened.path} holds what `milan-pipe {task}` trained; name a run of pretrain")
    return opened


def load_decoder(init: str, decoder: nn.Module, heads: int) -> None:
    """Load a run's decoder into a fresh one of that many heads, in place.

    Raises:
        MissingError, DataError: there is no such run, or it is damaged.
        MismatchError: its decoder has other sizes or heads, or predicts something else; names the first tensors that do
            not fit.
    """
    opened = _run(init, "decoder", "a run or a checkpoint of pretrain")
    weights = dict(opened.weights("decoder"))
    if problems := mismatch(weights, dict(decoder.state_dict())):
        raise MismatchError(f"decoder.init: {init} does not fit this decoder and target: {problems}")
    if (own := opened.record.get("settings", {}).get("decoder", {}).get("heads", heads)) != heads:
        raise MismatchError(
            f"decoder.init: {init} was trained with {own} heads, this decoder has {heads}: the same weights would "
            f"compute something else. Set decoder.heads={own}"
        )
    load_weights(decoder, weights, init)


@torch.no_grad()
def start_from(init: str, model: str, encoder: Encoder) -> Start:
    """Load weights into a fresh encoder, in place; what is of a classifier is left out.

    Of weights whose last norm is after the mean of the patches alone, the student has that norm after its blocks.

    Position embeddings of another grid are interpolated, bicubic with antialiasing, as timm does. Those that are the
    fixed sin-cos table, as of every student of this package, stay that table; others are trained.

    Raises:
        MissingError, DataError, StoreError: the weights are not there, damaged, or cannot be read.
        MismatchError: they are of another model; names the first tensors that do not fit, or the heads.
        SettingError: timm has no such model.
    """
    weights, heads, source, license_ = _found(init)
    digest = weights_digest(weights)
    own: dict[str, Tensor] = dict(encoder.state_dict())
    if "norm.weight" in own and "norm.weight" not in weights:
        weights = {name.removeprefix("fc_") if name.startswith("fc_norm.") else name: weights[name] for name in weights}
    weights = {name: value for name, value in weights.items() if not name.startswith(_OF_HEADS)}
    position, table = weights.get("pos_embed"), own.get("pos_embed")
    trains = False
    if position is not None and table is not None and position.ndim == 3:
        prefix = positioned_prefix(encoder)
        trains = not _is_table(position, prefix)
        if not trains:
            weights["pos_embed"] = table
        elif _side(position, prefix) and position.shape[1] != table.shape[1] and position.shape[2] == table.shape[2]:
            grid = list(encoder.patch_embed.grid_size)
            weights["pos_embed"] = resample_abs_pos_embed(position.float(), grid, num_prefix_tokens=prefix)
    if problems := mismatch(weights, own):
        raise MismatchError(
            f"student.init: {init} does not fit {model!r}: {problems}. Set student.model and its sizes to the weights'"
        )
    if heads is not None and heads != _heads(encoder):
        raise MismatchError(
            f"student.init: {init} was trained with {heads} heads, {model!r} has {_heads(encoder)}: the same weights "
            f"would compute something else. Set student.heads={heads}"
        )
    load_weights(encoder, weights, init)
    if encoder.pos_embed is not None:
        encoder.pos_embed.requires_grad_(trains)
    return Start(init=init, sha256=digest, source=source, license=license_, trains_positions=trains)


def _side(position_1SD: Tensor, prefix: int) -> int:
    """Of the square that they are of; 0 where they are of none."""
    patches = position_1SD.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    return side if len(position_1SD) == 1 and side * side == patches else 0


def _is_table(position_1SD: Tensor, prefix: int) -> bool:
    side = _side(position_1SD, prefix)
    if not side or position_1SD.shape[2] % 4:
        return False
    table_1SD = position_table(position_1SD.shape[2], (side, side), prefix)
    return bool(torch.allclose(position_1SD.float(), table_1SD, atol=1e-5))


def keep_start(run: Path, start: Start) -> None:
    """Write RUN/init.json; StoreError where it cannot be written."""
    write_file(run / _FILE, json.dumps(asdict(start), indent=2) + "\n")


def kept_start(run: Path) -> Start:
    """What a run began with.

    Raises:
        DataError: its file is lost or damaged.
    """
    try:
        return TypeAdapter(Start).validate_json(read_regular(run / _FILE), strict=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{run / _FILE}, which says what the run began with, cannot be read ({type(error).__name__}); name another "
            "folder for a new run"
        ) from error
