"""All of ``torch.distributed``, behind a handful of functions that also work in a single process.

Every function here is a collective unless it says otherwise: all ranks must call it, in the same order, or
the job hangs until its timeout. With one process each of them is the obvious local operation, so that no caller
ever asks how many ranks there are.

Rows that are spread over ranks are always spread the same way: rank ``r`` of ``W`` owns rows ``r, r + W, r + 2W, ...``
(:func:`share`). The shares cover every row exactly once, without padding.
"""

import contextlib
import datetime
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist  # noqa: TID251 (this is the one module that may)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uhml.errors import UserError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
# Rank 0 may cluster for hours while the others wait; that is no failure.
WAIT_FOR_MAIN_TIMEOUT = datetime.timedelta(days=7)

_patient_group: Any = None


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[torch.device]:
    """Join the process group that torchrun describes, if it does, and leave it at the end. Yields this rank's device.

    Args:
        device: "auto" (CUDA where there is a GPU), "cpu" or "cuda".

    Raises:
        UserError: a GPU is asked for, or shared out to ranks, and there are too few.
    """
    global _patient_group
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda":
        if torch.cuda.device_count() < local_world:
            raise UserError(
                f"train.device=cuda needs one GPU per process: {local_world} processes, "
                f"{torch.cuda.device_count()} GPUs here. Start fewer processes or use train.device=cpu."
            )
        torch.cuda.set_device(local_rank)
        rank_device = torch.device("cuda", local_rank)
    else:
        rank_device = torch.device("cpu")
    torch.set_num_threads(threads_per_rank())
    if "RANK" not in os.environ:
        yield rank_device
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        device_id=rank_device if device == "cuda" else None,
    )
    try:
        _patient_group = dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN_TIMEOUT)
        yield rank_device
    finally:
        # No collective here: on the way out of an error the other ranks may be anywhere.
        _patient_group = None
        dist.destroy_process_group()


def threads_per_rank() -> int:
    """Return the number of CPU threads for one rank, so that the ranks of a machine do not fight. Not a collective."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def rank() -> int:
    """Return this process's rank. Not a collective."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks. Not a collective."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which writes, prints and clusters. Not a collective."""
    return rank() == 0


def share(num_rows: int) -> range:
    """Return the rows of ``num_rows`` that this rank owns: ``rank, rank + world_size, ...``. Not a collective."""
    return range(rank(), num_rows, world_size())


def all_gather_shares(own: Tensor, num_rows: int) -> Tensor:
    """Put together the rows that the ranks own, in the order of the rows. No gradient.

    Args:
        own: ``[len(share(num_rows)), ...]``, this rank's rows, on any device.
        num_rows: the number of rows over all ranks.

    Returns:
        ``[num_rows, ...]``, the same on every rank.
    """
    if len(own) != len(share(num_rows)):
        raise ValueError(f"rank {rank()} brings {len(own)} rows; its share of {num_rows} is {len(share(num_rows))}")
    if world_size() == 1:
        return own
    # Shares differ by one row at most: pad to the longest, gather, and let the reassembly drop the padding.
    longest = -(-num_rows // world_size())
    padded = own.new_zeros((longest, *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows]


def shares_in_turn(own: Tensor, num_rows: int) -> Iterator[tuple[Tensor, range]]:
    """Yield every rank's rows and which of all rows they are, own rows first; they go round the ranks in a ring.

    At any time a rank holds its own, one other's and the next one's rows. All ranks must take all of the shares.

    Args:
        own: ``[len(share(num_rows)), ...]``, this rank's rows.
        num_rows: the number of rows over all ranks.
    """
    here, world = rank(), world_size()
    yield own, share(num_rows)
    held = own.contiguous()
    for step in range(1, world):
        owner = (here - step) % world
        rows = range(owner, num_rows, world)
        arriving = held.new_empty((len(rows), *own.shape[1:]))
        # Both at once: if all sent first and none received, a large share would wait for ever.
        exchange = [
            dist.P2POp(dist.isend, held, (here + 1) % world),
            dist.P2POp(dist.irecv, arriving, (here - 1) % world),
        ]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        held = arriving
        yield held, rows


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward sums every rank's gradient: the true derivative of a loss on the gathered batch."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.num_own = len(own)
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A copy: autograd may hand the same tensor to other operations, which must not see the sum over ranks.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.num_own :][: ctx.num_own]


def all_gather_with_gradient(own: Tensor) -> Tensor:
    """Concatenate the ranks' equally long batches in rank order, differentiably.

    The gradient that reaches ``own`` is the sum over ranks of the gradients of their losses. (Detaching the others'
    rows, as is often done, gives 1 / world_size of it or a wrong direction.)

    Args:
        own: ``[b, ...]``, the same ``b`` on every rank.

    Returns:
        ``[world_size * b, ...]``.
    """
    return _GatherWithGradient.apply(own) if world_size() > 1 else own


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of ``value`` over ranks. No gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather_objects(value: T) -> list[T]:
    """Return every rank's ``value``, in rank order, on every rank. For small things: messages, counts, names."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(work: Callable[[], T]) -> T:
    """Run ``work``, which is no collective itself, on every rank. An error on any rank is raised on every rank.

    Raises:
        UserError: ``work`` raised one on some rank.
        RuntimeError: on the other ranks, when ``work`` raised anything else on some rank.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as e:
        error = e
    # Without this the ranks that went well would wait in their next collective for one that never comes.
    failures = gather_objects(None if error is None else (isinstance(error, UserError), str(error) or repr(error)))
    if error is not None:
        raise error
    for number, failure in enumerate(failures):
        if failure is not None:
            is_users, message = failure
            raise (UserError if is_users else RuntimeError)(f"rank {number} failed: {message}")
    return cast(T, result)


def on_main(work: Callable[[], T]) -> T | None:
    """Run ``work`` on rank 0 while the others wait, for days if need be. An error there is raised on every rank.

    Returns:
        What ``work`` returned on rank 0, None elsewhere.

    Raises:
        UserError: ``work`` raised one on rank 0.
        RuntimeError: on the other ranks, when ``work`` raised anything else on rank 0.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    if is_main():
        try:
            result = work()
        except Exception as e:
            error = e
    # The status goes first, over a group of its own: a barrier with the usual timeout would kill the waiting ranks.
    status = [None if error is None else (isinstance(error, UserError), str(error) or type(error).__name__)]
    dist.broadcast_object_list(status, src=0, group=_patient_group)
    if error is not None:
        raise error
    if status[0] is not None:
        is_users, message = status[0]
        raise (UserError if is_users else RuntimeError)(f"rank 0 failed: {message}")
    return result


def broadcast_from_main(value: Tensor | None, device: torch.device | str = "cpu") -> Tensor:
    """Send rank 0's tensor to every rank. Shape and type travel first, so that the others need not know them."""
    if world_size() == 1:
        assert value is not None
        return value.to(device)
    header = [(tuple(value.shape), value.dtype) if value is not None and is_main() else None]
    dist.broadcast_object_list(header, src=0)
    assert header[0] is not None
    shape, dtype = header[0]
    received = (
        value.to(device).contiguous()
        if value is not None and is_main()
        else torch.empty(shape, dtype=dtype, device=device)
    )
    dist.broadcast(received, src=0)
    return received


def data_parallel(model: nn.Module) -> nn.Module:
    """Wrap ``model`` so that backward averages gradients over ranks; with one process, the model itself."""
    if world_size() == 1:
        return model
    # Buffers are statistics fixed before training and equal everywhere: nothing to send each step. torch 2.15 renamed
    # the option and warns of the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    option: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, **option)
