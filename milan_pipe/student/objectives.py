"""What a student learns, as data: which tokens it predicts, from what, with which loss.

Which patches it sees is in the settings `masking`. Shape suffixes are explained in `milan_pipe.student`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from milan_pipe.errors import DataError, SettingError
from milan_pipe.student.hog import hog_target, hog_width
from milan_pipe.student.loss import Tokens, feature_loss, mse, pixel_target, smooth_l1

Distance = Callable[[Tensor, Tensor], Tensor]
"""Prediction and target, (B, N, T) both, to a float32 scalar."""

GROUP = "milan_pipe.objectives"
"""Entry points under which installed packages bring objectives of their own."""


class Source(ABC):
    """What is predicted.

    Attributes:
        stored: whether it is made of the stored features.
    """

    stored: ClassVar[bool] = False

    @abstractmethod
    def width(self, features: int, patch: int) -> int:
        """T, of stored features of a width and patches of a side in pixels."""

    @abstractmethod
    def target(self, images_BCHW: Tensor, features_BST: Tensor | None, patch: int) -> Tensor:
        """(B, S, T), CLS first, or (B, L, T) where it has no CLS; `features_BST` is there if `stored`."""


@dataclass(frozen=True)
class Features(Source):
    """The stored features; `normalised`: each token to mean 0 and deviation 1, as a layer norm without weights does."""

    normalised: bool = False
    stored: ClassVar[bool] = True

    def width(self, features: int, patch: int) -> int:  # noqa: ARG002
        return features

    def target(self, images_BCHW: Tensor, features_BST: Tensor | None, patch: int) -> Tensor:  # noqa: ARG002
        assert features_BST is not None
        return F.layer_norm(features_BST.float(), features_BST.shape[-1:]) if self.normalised else features_BST


class Pixels(Source):
    """Each patch's own pixels; see `pixel_target`."""

    def width(self, features: int, patch: int) -> int:  # noqa: ARG002
        return 3 * patch**2

    def target(self, images_BCHW: Tensor, features_BST: Tensor | None, patch: int) -> Tensor:  # noqa: ARG002
        return pixel_target(images_BCHW, patch)


class Gradients(Source):
    """Histograms of each patch's gradients; see `hog_target`."""

    def width(self, features: int, patch: int) -> int:  # noqa: ARG002
        return hog_width(patch)

    def target(self, images_BCHW: Tensor, features_BST: Tensor | None, patch: int) -> Tensor:  # noqa: ARG002
        return hog_target(images_BCHW, patch)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss: `tokens` are compared with `source` by `distance`.

    Attributes:
        head: visible tokens are predicted by one linear layer on the encoder's output, and no decoder takes part; else
            the decoder predicts.
        weight: in the sum of an objective's terms.
    """

    source: Source
    tokens: Tokens
    distance: Distance
    head: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.head and self.tokens != "visible":
            raise SettingError(f"a head on the encoder's output predicts visible tokens, not {self.tokens!r} ones")


Terms = tuple[Term, ...]
"""All that one student learns."""

OBJECTIVES: dict[str, Terms] = {
    # arXiv 2208.06049, section 3.1.
    "clip": (Term(source=Features(), tokens="all", distance=feature_loss),),
    # MAE, arXiv 2111.06377, section 3.
    "pixels": (Term(source=Pixels(), tokens="masked", distance=mse),),
    # MaskFeat, arXiv 2112.09133, section 3.1.
    "hog": (Term(source=Gradients(), tokens="masked", distance=mse),),
    # Unmasked teacher, arXiv 2303.16058, section 3.1; CAE v2, arXiv 2211.09799; MaskAlign, arXiv 2211.08887. With
    # masking.ratio 0: dense distillation.
    "clip-visible": (Term(source=Features(), tokens="visible", distance=feature_loss, head=True),),
    # MR-MAE, arXiv 2303.05475, section 3.2: mimic what is seen, reconstruct the pixels of what is not.
    "clip-visible+pixels": (
        Term(source=Features(normalised=True), tokens="visible", distance=mse, head=True),
        Term(source=Pixels(), tokens="masked", distance=mse),
    ),
    # MaskDistill, arXiv 2210.10615, equation 1 and section 3.
    "clip-masked": (Term(source=Features(normalised=True), tokens="masked", distance=smooth_l1),),
}
"""By the name that the setting `target` takes."""


def register_objective(name: str, *terms: Term) -> None:
    """Add an objective under a name of its own, for this process.

    Raises:
        SettingError: the name is taken, or there is no term.
    """
    if name in OBJECTIVES or not terms:
        raise SettingError(f"objective {name!r} {'is there already' if terms else 'has no term'}")
    OBJECTIVES[name] = terms


@cache
def _installed() -> Mapping[str, Callable[[], Terms]]:
    return {point.name: point.load for point in entry_points(group=GROUP)}


def objective_of(name: str) -> Terms:
    """The objective of a name: built in, registered, or an entry point of an installed package.

    Raises:
        SettingError: there is none of that name.
        DataError: what a package brings under it is no tuple of terms.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if name not in _installed():
        known = ", ".join([*OBJECTIVES, *_installed()])
        raise SettingError(f"target: there is no objective {name!r}; known are {known}")
    found = _installed()[name]()
    if not (isinstance(found, tuple) and found and all(isinstance(term, Term) for term in found)):
        raise DataError(f"the entry point {name!r} of {GROUP} is {found!r}, expected a tuple of Term")
    return found


def is_taught(name: str) -> bool:
    """Whether students of an objective learn from stored features; True where its package is not installed."""
    try:
        return any(term.source.stored for term in objective_of(name))
    except SettingError:
        return True
