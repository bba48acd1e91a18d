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
