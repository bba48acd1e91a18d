"""One step: forward in the chosen precision, backward, clipping, optimiser. It knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from milan_pipe.config.training import Precision
from milan_pipe.devices import autocast, resolve_precision

B = TypeVar("B")


@dataclass(frozen=True)
class StepResult:
    """Loss of a batch and L2 norm of its gradient before clipping, on the device: reading makes an accelerator wait."""

    loss: Tensor
    grad_norm: Tensor


class Stepper(Generic[B]):
    """Does optimiser steps. Weights and their updates stay in float32, whatever the precision of the forward pass.

    From the first gradient that is not finite on, no weight is changed: whoever reads loss or norm some steps later
    still finds the weights that caused it. With float16 the loss scale handles such gradients, and steps go on.

    Args:
        optimiser: only a fused one skips steps.
        loss_of: scalar loss of a part in an epoch.
        split: a batch's parts with their shares of it, for gradient accumulation.
        clip_grad: largest L2 norm of the gradient over all parameters.
        exchange: context of each part's passes, given whether ranks exchange gradients in it.

    Attributes:
        scaler: of the loss, in use with float16 alone; its state belongs in checkpoints.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        loss_of: Callable[[Any, int], Tensor],
        *,
        split: Callable[[B], Sequence[tuple[Any, float]]],
        device: torch.device,
        precision: Precision,
        clip_grad: float | None = None,
        exchange: Callable[[bool], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ) -> None:
        self._optimiser, self._loss_of, self._split, self._exchange = optimiser, loss_of, split, exchange
        self._device, self._clip_grad = device, clip_grad
        self._precision = resolve_precision(precision, device)
        self._parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        self._broken = torch.zeros((), device=device)
        # Only fused optimisers can skip a step on the device.
        self._skips = bool(optimiser.defaults.get("fused")) and self._precision != "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._precision == "float16")

    def loss(self, part: Any, epoch: int) -> Tensor:
        """Loss of one part, in the chosen precision."""
        with autocast(self._precision, self._device):
            return self._loss_of(part, epoch)

    def _clipped_norm(self) -> Tensor:
        if self._clip_grad is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_grad)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def __call__(self, batch: B, epoch: int, lr: float) -> StepResult:
        """Do one step."""
        for group in self._optimiser.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._optimiser.zero_grad(set_to_none=True)
        losses, parts = [], self._split(batch)
        for number, (part, share) in enumerate(parts, 1):
            with self._exchange(number == len(parts)):
                loss = self.loss(part, epoch) * share
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        self.scaler.unscale_(self._optimiser)
        norm = self._clipped_norm()
        if self._skips:
            self._broken = torch.maximum(self._broken, (~torch.isfinite(norm)).float())
            self._optimiser.found_inf = self._broken  # type: ignore[attr-defined]
        self.scaler.step(self._optimiser)
        self.scaler.update()
        return StepResult(torch.stack(losses).sum(), norm)
