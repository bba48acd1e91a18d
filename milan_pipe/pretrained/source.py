"""What is known of a model before its weights are fetched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from milan_pipe.config.teacher import RANDOM
from milan_pipe.errors import DataError, MissingError, StoreError, one_line, resource_hint
from milan_pipe.pretrained.hub import quiet


class MeanStd(NamedTuple):
    """Per channel R, G, B, of pixels in 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def mean_std(config: Any) -> MeanStd | None:
    """What a description says under `mean` and `std`; None where it does not, or not three numbers each."""
    try:
        mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return MeanStd(mean, std) if len(mean) == len(std) == 3 and min(std) > 0 else None


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Who asks for a model, for messages.

    Attributes:
        what: what it is to them, as `teacher`.
        setting: the setting that names it, as `teacher.model`.
        weights: the setting that may name other weights than its own; None: there is none.
    """

    what: str
    setting: str
    weights: str | None = None

    @property
    def instead(self) -> str:
        """What will do where its weights cannot be had."""
        if self.weights is None:
            return f"A folder in timm's layout will do too: timm:local-dir:PATH as {self.setting}"
        return f"A local checkpoint will do too: --set {self.weights}=PATH"


UNBUILT: tuple[type[Exception], ...] = (
    *(TypeError, ValueError, RuntimeError, AssertionError),
    *(LookupError, ArithmeticError, AttributeError, MemoryError),
)
"""What open_clip and timm raise for a description, which may hold anything."""


_DEEPEST = 1000


def require_depth(description: Mapping[str, Any]) -> None:
    """Raise ValueError for a description of more blocks than any model has: they would be built one after another."""
    for name in ("layers", "depth", "depths"):
        value = description.get(name)
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and not number <= _DEEPEST:
                raise ValueError(f"{name} {number} is more than {_DEEPEST}")


def _unknown() -> None:
    return None


def what_is_wrong(error: Exception) -> str:
    """Why a description cannot be used, in a few words."""
    return f"no {error}" if isinstance(error, KeyError) else one_line(error)


@dataclass(frozen=True, kw_only=True)
class ModelSource(ABC):
    """A model that can be built.

    Attributes:
        model: its name, as it was given.
        asker: for whom it is.
        tag: open_clip's name of the weights, where they have one.
        checkpoint: fetches the weights' file; raises MissingError. None: untrained.
        file: that file, where the settings name it: a description beside it is its own.
        stated: mean and std by the model's description.
        origin: where the weights are published, as `hf-hub:ORG/NAME` or a URL; None for files of this machine.
        license: asks for the licence of the weights, once they are there; None where nobody says.
        structure: what a description builds around the weights, as JSON; empty where the name says it.
    """

    model: str
    asker: Asker
    tag: str | None = None
    checkpoint: Callable[[], Path] | None = None
    file: Path | None = None
    stated: MeanStd | None = None
    origin: str | None = None
    license: Callable[[], str | None] = _unknown
    structure: str = ""

    @abstractmethod
    def _build(self) -> nn.Module: ...

    @abstractmethod
    def load(self, model: nn.Module, path: Path) -> None:
        """Load weights into a model that `untrained` gave: all its tensors.

        Raises:
            MissingError, DataError: the file is not there, cannot be read, or holds no tensors.
            MismatchError: it is of another model.
        """

    def with_file(self, pretrained: str, problem: str) -> Self:
        """With the weights of a local file, or none for `random`; `problem` is what to say where there is no file."""
        if pretrained == RANDOM:
            return self
        file = Path(pretrained)
        if not file.is_file():
            raise MissingError(f"{self.asker.what} {self.model!r} {problem}")
        return replace(self, checkpoint=lambda: file, file=file)

    def with_own(self, pretrained: str | None, own: Callable[[], Path]) -> Self:
        """With the weights that the model brings, unless the settings name others."""
        if pretrained is None:
            return replace(self, checkpoint=own)
        problem = f"brings its own weights and has no tags, and there is no file {pretrained!r}; leave "
        return self.with_file(pretrained, f"{problem}{self.asker.weights} out, or name a local checkpoint or `random`")

    def trained(self) -> nn.Module:
        """The model with the weights that it names; raises as `untrained`, `checkpoint` and `load`."""
        assert self.checkpoint is not None, "no weights are named"
        model = self.untrained()
        self.load(model, self.checkpoint())
        return model

    def untrained(self) -> nn.Module:
        """The model, with the same random weights in every process, as targets of one store come from many.

        Raises:
            DataError: the description builds no model.
            StoreError: the machine has too little memory for it.
        """
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            try:
                return self._build().eval()
            except UNBUILT as error:
                if hint := resource_hint(error):
                    raise StoreError(f"{self.asker.what} {self.model!r} cannot be built: {hint}") from error
                raise DataError(
                    f"{self.asker.what} {self.model!r} cannot be built ({type(error).__name__}: "
                    f"{one_line(error)}); check its description, or update open_clip_torch and timm"
                ) from error
