"""One step: forward in the chosen precision, backward, clipping, optimiser. It knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

Precision = Literal["auto", "float32", "bfloat16", "float16"]
B = TypeVar("B")


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16", "float16"]:
    """`auto` is bfloat16 on a CUDA device that computes in it, else float32."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


class Stepper(Generic[B]):
    """Does optimiser steps. Weights and their updates stay in float32 whatever the precision of the forward pass.

    Attributes:
        scaler: of the loss, in use with float16 alone; its state belongs into checkpoints.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        loss_of: Callable[[B, int], Tensor],
        *,
        split: Callable[[B], Sequence[tuple[B, float]]],
        device: torch.device,
        precision: Precision,
        clip_grad: float | None,
    ) -> None:
        """Bind a loss to an optimiser.

        Args:
            loss_of: scalar loss of a batch in an epoch.
            split: a batch's parts with their shares of it, for gradient accumulation.
            clip_grad: largest L2 norm of the gradient over all parameters.
        """
        self._optimiser = optimiser
        self._loss_of = loss_of
        self._split = split
        self._device = device
        self._precision = resolve_precision(precision, device)
        self._clip_grad = clip_grad
        self._parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._precision == "float16")

    def _forward(self, part: B, epoch: int) -> Tensor:
        if self._precision == "float32":
            return self._loss_of(part, epoch)
        with torch.autocast(self._device.type, dtype=getattr(torch, self._precision)):
            return self._loss_of(part, epoch)

    def __call__(self, batch: B, epoch: int, lr: float) -> Tensor:
        """Do one step; returns the batch's loss, detached and still on the device."""
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        self._optimiser.zero_grad(set_to_none=True)
        losses = []
        for part, share in self._split(batch):
            loss = self._forward(part, epoch) * share
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        if self._clip_grad is not None:
            self.scaler.unscale_(self._optimiser)
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_grad)
        self.scaler.step(self._optimiser)
        self.scaler.update()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()
