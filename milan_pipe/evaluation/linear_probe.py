"""A linear classifier on frozen features."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from milan_pipe.config.evaluation import LinearProbeSettings
from milan_pipe.errors import DataError
from milan_pipe.evaluation.features import LabelledFeatures, check_same_task
from milan_pipe.random_bits import permutation

_LOGITS_FOR_THREADS = 2**21
"""Samples times classes from which a BLAS of several threads is the faster one; below, they wait for each other."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracy, 0..1, on test and train images, and the strength that was chosen.

    `converged` is False where the last fit stopped at `max_iterations` or made no progress: raise `max_iterations`, or
    drop the smallest strengths.
    """

    accuracy: float
    l2: float
    train_accuracy: float
    converged: bool


def linear_probe_accuracy(
    train: LabelledFeatures, test: LabelledFeatures, settings: LinearProbeSettings
) -> ProbeResult:
    """Fit multinomial logistic regression on `train`, report it on `test`.

    Features are standardised, constant ones become 0. The strength is chosen on a held-out part of `train` (the
    strongest of equals), then the classifier is fitted to all of `train`. The result is reproducible, up to the
    arithmetic of the machine's BLAS.

    Raises:
        DataError: fewer than two classes, no train image to hold out, or as `check_same_task`.
        ShapeError: as `check_same_task`.
    """
    check_same_task(train, test)
    features_NF, label_N = _arrays(train)
    if len(np.unique(label_N)) < 2:
        raise DataError(f"all train images are of class {label_N[0]}; a linear probe needs two classes at least")
    l2 = settings.l2[0] if len(set(settings.l2)) == 1 else _choose_l2(features_NF, label_N, settings)
    probe = _Probe(features_NF, label_N, settings.max_iterations)
    probe.fit(l2)
    return ProbeResult(
        accuracy=probe.accuracy(*_arrays(test)),
        l2=l2,
        train_accuracy=probe.accuracy(features_NF, label_N),
        converged=probe.converged,
    )


class _Probe:
    """A scaler and a classifier of one set of samples. A fit starts from the weights of the one before."""

    def __init__(self, features_NF: Floats, label_N: Ints, max_iterations: int) -> None:
        # scikit-learn takes 1.5 s to import, and k-NN and embedding do without.
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        self._scaler = StandardScaler().fit(features_NF)
        self._features_NF = self._scaler.transform(features_NF)
        self._label_N = label_N
        self._logits = len(label_N) * len(np.unique(label_N))
        self._model = LogisticRegression(solver="lbfgs", max_iter=max_iterations, warm_start=True)
        self.converged = False

    def fit(self, l2: float) -> None:
        from sklearn.exceptions import ConvergenceWarning

        # scikit-learn weighs the sum over samples against the penalty; l2 is relative to the mean.
        self._model.set_params(C=1.0 / (l2 * len(self._label_N)))
        threads = 1 if self._logits < _LOGITS_FOR_THREADS else None
        with warnings.catch_warnings(record=True) as caught, threadpool_limits(threads, user_api="blas"):
            warnings.simplefilter("always", ConvergenceWarning)
            self._model.fit(self._features_NF, self._label_N)
        self.converged = True
        for warning in caught:
            if issubclass(warning.category, ConvergenceWarning):
                self.converged = False
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def accuracy(self, features_NF: Floats, label_N: Ints) -> float:
        predicted_N: Any = self._model.predict(self._scaler.transform(features_NF))
        return float(np.mean(predicted_N == label_N))


def _arrays(data: LabelledFeatures) -> tuple[Floats, Ints]:
    # float64: L-BFGS on float32 gives up early, where rounding hides its progress.
    return data.features_NF.double().numpy(), data.label_N.numpy()


def _choose_l2(features_NF: Floats, label_N: Ints, settings: LinearProbeSettings) -> float:
    held_N = _held_out(label_N, settings.validation_fraction, settings.seed)
    probe = _Probe(features_NF[~held_N], label_N[~held_N], settings.max_iterations)
    best, best_accuracy = 0.0, -1.0
    # From strong to weak: the strong fit is quick, and a good start for the next.
    for l2 in sorted(set(settings.l2), reverse=True):
        probe.fit(l2)
        accuracy = probe.accuracy(features_NF[held_N], label_N[held_N])
        if accuracy > best_accuracy:
            best, best_accuracy = l2, accuracy
    return best


def _held_out(label_N: Ints, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which samples to hold out: spread evenly over the classes, and never the last one of a class."""
    shuffled_N = permutation(len(label_N), "held out", seed)
    by_class_N = shuffled_N[np.argsort(label_N[shuffled_N], kind="stable")]
    first_N = np.diff(label_N[by_class_N], prepend=-1) != 0
    spare = by_class_N[~first_N]
    if not len(spare):
        raise DataError(
            "every class has one train image, none can be held out to choose linear_probe.l2; give one l2, or more "
            "images"
        )
    wanted = min(max(1, round(fraction * len(label_N))), len(spare))
    held_N = np.zeros(len(label_N), dtype=np.bool_)
    held_N[spare[np.arange(wanted) * len(spare) // wanted]] = True
    return held_N
