"""Steps of an optimizer that are taken only while loss and gradient are finite, with no wait for the GPU at each."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from uhml.errors import UserError

Refuse = Callable[[float, float], UserError]


class _Taken(NamedTuple):
    """A step, while nobody knows yet whether it was taken."""

    numbers: Tensor
    """``[2]``, loss and norm of the gradient, on the host once they have arrived."""
    arrival: torch.cuda.Event | None
    refuse: Refuse


class Stepper:
    """Steps an optimizer until a loss or a gradient is not finite: neither that step nor a later one is taken.

    The device decides, and the host asks a step later, when the device has work in hand again. Nothing that a step
    changes may be looked at before :meth:`settle`.

    Args:
        optimizer: a fused one. Such a one leaves weights and moments as they are where its ``found_inf`` is not 0, the
            way of torch's ``GradScaler``.
        device: of the weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._stopped = torch.zeros((), device=device)
        optimizer.found_inf = self._stopped  # type: ignore[attr-defined]
        self._last: _Taken | None = None
        self._loss: float | None = None

    def step(self, loss: Tensor, gradient_norm: Tensor, refuse: Refuse) -> None:
        """Take a step, unless it must not be, and look whether the one before was.

        Args:
            loss: the same on all ranks.
            gradient_norm: likewise.
            refuse: given the two as numbers, makes the error to raise; a collective.

        Raises:
            UserError: the step before was not taken.
        """
        numbers = torch.stack([loss, gradient_norm])
        self._stopped.copy_(torch.maximum(self._stopped, 1 - numbers.isfinite().all().to(self._stopped.dtype)))
        self._optimizer.step()
        # Into memory from which the device can copy by itself; the event tells when it has, and leaves the core that
        # waits for it to those that read pictures.
        arrival = torch.cuda.Event(blocking=True) if numbers.is_cuda else None
        taken = _Taken(numbers.to("cpu", non_blocking=True), arrival, refuse)
        if taken.arrival is not None:
            taken.arrival.record()
        self.settle()
        self._last = taken

    def settle(self) -> None:
        """Make sure that the last step was taken. A collective only where it was not.

        Raises:
            UserError: it was not.
        """
        last, self._last = self._last, None
        if last is None:
            return
        if last.arrival is not None:
            last.arrival.synchronize()
        if not last.numbers.isfinite().all():
            raise last.refuse(*last.numbers.tolist())
        self._loss = float(last.numbers[0])

    def note(self) -> str:
        """Return what to say beside a progress bar: the last loss that is known."""
        return "" if self._loss is None else f"loss {self._loss:.4f}"
