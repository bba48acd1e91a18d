"""A batch as it is stored becomes a loss. Shape suffixes are explained in `milan_pipe.pretraining`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milan_pipe.config.params import Params
from milan_pipe.config.student import StudentSettings
from milan_pipe.errors import MismatchError, SettingError
from milan_pipe.loader.stream import Batch, Codes, DrawNoise
from milan_pipe.student.encoder import grid_of
from milan_pipe.student.loss import chosen_tokens
from milan_pipe.student.masking import MaskSplit, draw_split, noise_for, visible_count
from milan_pipe.student.model import MaskedStudent, build_student
from milan_pipe.student.objectives import Term, is_taught, objective_of
from milan_pipe.student.pixels import normalise
from milan_pipe.student.standardise import Standardise
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import StoreHeader

Teach = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels (B, H, W, 3) uint8 to features (B, S, T) and importance (B, L), float16 as in a store."""


@dataclass(frozen=True)
class Output:
    """`width` values of each predicted token: a term, of stored features with the number of their store."""

    term: Term
    store: int
    width: int
    weight: float


@dataclass(frozen=True)
class Part:
    """What is predicted of one output, (B, S, T), CLS first, zero where nothing is; its target may lack CLS."""

    output: Output
    prediction_BST: Tensor
    target: Tensor

    def loss(self, split: MaskSplit) -> Tensor:
        """The loss times its weight; ShapeError where the two do not fit."""
        term, weight = self.output.term, self.output.weight
        found = term.distance(*chosen_tokens(self.prediction_BST, self.target, split, term.tokens))
        return found if weight == 1 else weight * found

    @property
    def patches(self) -> tuple[Tensor, Tensor]:
        """Prediction and target of the patches, (B, L, T) both, float32."""
        predicted_BLT = self.prediction_BST[:, 1:]
        return predicted_BLT.float(), self.target[:, -predicted_BLT.shape[1] :].float()


@dataclass(frozen=True)
class Prediction:
    """What a student predicts of a batch, output by output."""

    split: MaskSplit
    parts: tuple[Part, ...]

    def loss(self) -> Tensor:
        """The sum over all outputs, a scalar."""
        losses = [part.loss(self.split) for part in self.parts]
        return sum(losses[1:], losses[0])


class Objective(nn.Module):
    """Student, masking and loss: a stored batch becomes a scalar, all of it on the training device.

    Args:
        header: of the store, or of the first of several.
        teach: makes targets of the pixels; None takes the stored ones.
        others: headers of the stores that are read beside the first.
        standardise: of each store, the first one's first; none leaves features as they are.
    """

    def __init__(
        self,
        student: MaskedStudent,
        header: StoreHeader,
        params: Params,
        teach: Teach | None = None,
        *,
        others: Sequence[StoreHeader] = (),
        standardise: Sequence[Standardise] = (),
    ) -> None:
        super().__init__()
        self.student, self.teach = student, teach
        self.codecs = [codec_of(one.codec) for one in (header, *others)]
        self.standardise = nn.ModuleList(standardise)
        self.masking, self.target, self.patch_size = params.masking, params.target, _patch_size(params)
        self.outputs = outputs_of((header, *others), params, standardise)
        self.grid, self.patches = header.teacher.grid, header.patches
        self.visible = visible_count(header.patches, params.masking.ratio)
        # Of an epoch and the samples' keys: (B, L), on the CPU. Other processes get a copy.
        self.draw_noise: DrawNoise = partial(noise_for, self.masking, grid=self.grid)

    def predict(self, batch: Batch, epoch: int, only: int | None = None) -> Prediction:
        """Prediction and target of one batch, with the masks of an epoch.

        Args:
            only: number of the store that the batch is read from, where it is not from all; others have no part then.
        """
        device = next(self.student.parameters()).device
        if batch.noise_BL is None:
            batch = replace(batch, noise_BL=self.draw_noise(epoch, batch.keys))
        batch = batch.to(device)
        assert batch.noise_BL is not None
        images_BCHW = normalise(batch.pixels_BHWC)
        taught = self.teach(batch.pixels_BHWC) if self.teach is not None else None
        attention_BL = batch.attention_BL if taught is None else taught[1]
        importance_BL = attention_BL.float() if self.masking.kind == "semantic" else None
        split = draw_split(importance_BL, batch.noise_BL, self.visible)
        predictions = self.student(images_BCHW, split).split([output.width for output in self.outputs], dim=-1)
        features: dict[int, Tensor] = {}
        parts = []
        for output, prediction_BST in zip(self.outputs, predictions, strict=True):
            number, source = output.store, output.term.source
            if source.stored and only not in (None, number):
                continue
            if source.stored and number not in features:
                codes = batch.codes[number if only is None else 0]
                features[number] = self._features(number, codes) if taught is None else taught[0]
            target = source.target(images_BCHW, features.get(number), self.patch_size)
            parts.append(Part(output, prediction_BST, target))
        return Prediction(split, tuple(parts))

    def _features(self, number: int, codes: Codes) -> Tensor:
        """(B, S, T) of one store, standardised."""
        features_BST = self.codecs[number].decode(*codes)
        if not self.standardise:
            return features_BST
        standardised_BST: Tensor = self.standardise[number](features_BST)
        return standardised_BST

    def forward(self, batch: Batch, epoch: int) -> Tensor:
        """Loss of one batch. A sample's mask depends on (seed, epoch, key), not on its neighbours."""
        return self.predict(batch, epoch).loss()

    @torch.no_grad()
    def cosine(self, batch: Batch, epoch: int) -> tuple[MaskSplit, Tensor]:
        """The masks of a batch, and the cosine (B, L) of the first output's prediction with its target, by patch."""
        found = self.predict(batch, epoch)
        return found.split, F.cosine_similarity(*found.parts[0].patches, dim=-1)


def outputs_of(
    headers: Sequence[StoreHeader], params: Params, standardise: Sequence[Standardise] = ()
) -> tuple[Output, ...]:
    """What the student predicts, in order, that of the head first.

    Raises:
        SettingError: there is no such target, it predicts masked patches and there are none, it needs no store's
            features and there are several, or weights are not one of each store.
    """
    terms = sorted(objective_of(params.target), key=lambda term: not term.head)
    if params.masking.ratio == 0 and any(term.tokens == "masked" for term in terms):
        found = f"target {params.target!r} predicts masked patches, and masking.ratio is 0"
        raise SettingError(f"{found}; raise it, or take a target of visible tokens")
    if len(headers) > 1 and not is_taught(params.target):
        raise SettingError(f"target {params.target!r} needs no features, and {len(headers)} stores are named; name one")
    weights = _weights(len(headers), params, standardise)
    outputs: list[Output] = []
    for term in terms:
        for number, header in enumerate(headers if term.source.stored else headers[:1]):
            width = term.source.width(header.teacher.width, _patch_size(params))
            of_store = weights[number] if term.source.stored else 1.0
            outputs.append(Output(term, number, width, term.weight * of_store))
    return tuple(outputs)


def _weights(stores: int, params: Params, standardise: Sequence[Standardise]) -> list[float]:
    """Of each store's losses, with a sum of 1."""
    chosen = params.teachers.weights
    if chosen == "equal" or stores == 1:
        weights = [1.0] * stores
    elif chosen == "balanced":
        weights = [1 / max(float(one.spread), 1e-6) for one in standardise] or [1.0] * stores
    else:
        weights = list(chosen)
        if len(weights) != stores or sum(weights) <= 0:
            raise SettingError(
                f"teachers.weights has {weights} for {stores} stores; expected a number for each, above 0 in sum"
            )
    return [weight / sum(weights) for weight in weights]


def require_fit(header: StoreHeader, student: StudentSettings, where: object) -> None:
    """Refuse targets that do not fit this student.

    Raises:
        MismatchError: view size or grid differ; says both.
    """
    if header.views.size != student.image_size:
        raise MismatchError(
            f"{where} has views of {header.views.size} pixels, the student reads {student.image_size}; set "
            f"student.image_size={header.views.size}, or extract with student.image_size={student.image_size}"
        )
    theirs, ours = header.teacher.grid, grid_of(student)
    if tuple(theirs) != tuple(ours):
        raise MismatchError(
            f"{where} has a grid of {theirs[0]} x {theirs[1]} patches (teacher {header.teacher.model!r} at "
            f"{header.teacher.image_size} pixels), the student has {ours[0]} x {ours[1]}; change student.patch_size, "
            "or extract with another teacher.image_size"
        )


def build_objective(
    header: StoreHeader,
    params: Params,
    device: torch.device,
    teach: Teach | None = None,
    *,
    others: Sequence[StoreHeader] = (),
    standardise: Sequence[Standardise] = (),
) -> Objective:
    """A fresh student with its loss, on its device; arguments as `Objective`.

    Raises:
        SettingError: there is no such student, decoder or target, or they do not fit each other.
    """
    settings = params.pretrain
    outputs = outputs_of((header, *others), params, standardise)
    of_head, of_decoder = (sum(one.width for one in outputs if one.term.head is head) for head in (True, False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_student(params.student, params.decoder, of_decoder, of_head).to(device)
    model.checkpoint_activations(settings.checkpoint_activations)
    if settings.compile:
        # What FSDP gathers one at a time is compiled one at a time.
        for module in model.units() if settings.parallel == "fsdp" else [model]:
            module.compile(dynamic=False)
    return Objective(model, header, params, teach, others=others, standardise=standardise).to(device)


def _patch_size(params: Params) -> int:
    return params.student.image_size // grid_of(params.student)[0]
