"""Features as colours: their three principal components are red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LOW, _HIGH = 1.0, 99.0


def _unit(features: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = features.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12))


@dataclass(frozen=True)
class FeatureColours:
    """A map from features to colours; one map for all that is to be compared.

    Attributes:
        mean_T: of the unit features that it was fitted to.
        axes_T3: principal components, the first with the largest variance.
        low_3, high_3: of the projections, what becomes 0 and 255.
    """

    mean_T: NDArray[np.float64]
    axes_T3: NDArray[np.float64]
    low_3: NDArray[np.float64]
    high_3: NDArray[np.float64]

    @classmethod
    def fit(cls, features_NT: NDArray[np.floating]) -> FeatureColours:
        """Fit to features, which are brought to unit length first, as the loss does.

        The outermost hundredths of each projection lie beyond black and full colour, so that a few odd patches do not
        take the contrast of all others. A component's sign is that of its largest entry: the same features have the
        same colours everywhere. Components that do not exist, as of two features, are constant.
        """
        unit_NT = _unit(features_NT)
        mean_T = unit_NT.mean(0)
        centred_NT = unit_NT - mean_T
        variance, axes = np.linalg.eigh(centred_NT.T @ centred_NT)
        axes_T3 = np.zeros((unit_NT.shape[1], 3))
        chosen = [i for i in np.argsort(variance)[::-1][:3] if variance[i] > 1e-9 * max(1.0, float(variance.sum()))]
        axes_T3[:, : len(chosen)] = axes[:, chosen]
        largest_3 = np.abs(axes_T3).argmax(0)
        axes_T3 = axes_T3 * np.where(axes_T3[largest_3, np.arange(3)] < 0, -1.0, 1.0)
        low_3, high_3 = np.percentile(centred_NT @ axes_T3, [_LOW, _HIGH], axis=0)
        return cls(mean_T, axes_T3, low_3, high_3)

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.uint8]:
        """(..., 3) colours of (..., T) features."""
        projected = (_unit(features) - self.mean_T) @ self.axes_T3
        span_3 = self.high_3 - self.low_3
        share = np.where(span_3 > 0, (projected - self.low_3) / np.where(span_3 > 0, span_3, 1), 0.5)
        return np.asarray((255 * np.clip(share, 0, 1)).round().astype(np.uint8))
