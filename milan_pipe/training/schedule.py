"""Learning rate as a function of the step."""

from __future__ import annotations

import math


def cosine_lr(step: int, *, steps: int, warmup_steps: int, peak: float, final: float = 0.0) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up from 0, then half a cosine from `peak` to `final`.

    Source: arXiv 2111.06377, appendix A.1 (per step, not per epoch).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def polynomial_lr(step: int, *, steps: int, warmup_steps: int, peak: float, power: float = 1.0) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up from 0, then `peak` x (1 - step / steps) ** power.

    Source: the ADE20K recipe of arXiv 2106.08254, as MMSegmentation runs it: the decay counts from the first step.
    """
    decayed = float(peak * (1 - step / steps) ** power)
    return decayed * step / warmup_steps if step < warmup_steps else decayed
