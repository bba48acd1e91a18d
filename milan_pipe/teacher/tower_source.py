"""What is known of a teacher before its weights are fetched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import nn

from milan_pipe.config.teacher import RANDOM
from milan_pipe.errors import DataError, MissingError, one_line
from milan_pipe.teacher.hub import quiet
from milan_pipe.teacher.normalization import MeanStd


def _unknown() -> None:
    return None


def what_is_wrong(error: Exception) -> str:
    """Why a description cannot be used, in a few words."""
    return f"no {error}" if isinstance(error, KeyError) else one_line(error)


@dataclass(frozen=True, kw_only=True)
class TowerSource(ABC):
    """A model whose image tower can be built.

    Attributes:
        model: its name in the settings.
        tag: open_clip's name of the weights, where they have one.
        checkpoint: fetches the weights' file; raises MissingError. None: untrained.
        file: that file, where the settings name it: a description beside it is its own.
        stated: mean and std by the model's description.
        origin: where the weights are published, as `hf-hub:ORG/NAME` or a URL; None for files of this machine.
        license: asks for the licence of the weights, once they are there; None where nobody says.
    """

    model: str
    tag: str | None = None
    checkpoint: Callable[[], Path] | None = None
    file: Path | None = None
    stated: MeanStd | None = None
    origin: str | None = None
    license: Callable[[], str | None] = _unknown

    @abstractmethod
    def _build(self) -> nn.Module: ...

    @abstractmethod
    def load(self, visual: nn.Module, path: Path) -> None:
        """Load weights into a tower that `untrained` gave: all its tensors.

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
            raise MissingError(f"teacher {self.model!r} {problem}")
        return replace(self, checkpoint=lambda: file, file=file)

    def with_own(self, pretrained: str | None, own: Callable[[], Path]) -> Self:
        """With the weights that the model brings, unless the settings name others."""
        if pretrained is None:
            return replace(self, checkpoint=own)
        problem = f"brings its own weights and has no tags, and there is no file {pretrained!r}; leave "
        return self.with_file(pretrained, f"{problem}teacher.pretrained out, or name a local checkpoint or `random`")

    def untrained(self) -> nn.Module:
        """The tower, with the same random weights in every process, as targets of one store come from many.

        Raises:
            DataError: the description builds no tower.
        """
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            try:
                return self._build().eval()
            # What a description holds is anyone's: open_clip and timm raise of every kind.
            except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, ArithmeticError) as error:
                raise DataError(
                    f"the image tower of teacher {self.model!r} cannot be built ({type(error).__name__}: "
                    f"{one_line(error)}); check its description, or update open_clip_torch and timm"
                ) from error
