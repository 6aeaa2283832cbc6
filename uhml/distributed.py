"""All of ``torch.distributed``, behind a handful of functions that also work in a single process.

Every function here is a collective unless it says otherwise: all ranks must call it, in the same order, or
the job hangs until its timeout. With one process each of them is the obvious local operation, so that no caller
ever asks how many ranks there are.

Rows that are spread over ranks are always spread the same way: rank ``r`` of ``W`` owns rows ``r, r + W, r + 2W, ...``
(:func:`share`). The shares cover every row exactly once, without padding.
"""

import atexit
import contextlib
import datetime
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist  # noqa: TID251 (this is the one module that may)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from uhml import interruption
from uhml.environment import Place, cores, keep_freed_memory, place
from uhml.errors import RankFailed, UserError, is_known_everywhere, known_everywhere
from uhml.interruption import Preempted

logger = logging.getLogger(__name__)
T = TypeVar("T")

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
SECONDS_UNTIL_TOLD = 10.0
"""That this rank waits for others to start."""
SECONDS_TO_MEET = 5.0
"""After a signal, which all may have got, and which all then answer together."""
# Rank 0 may cluster for hours while the others wait; that is no failure.
WAIT_FOR_MAIN_TIMEOUT = datetime.timedelta(days=7)

NVIDIA_GPU = Path("/dev/nvidia0")

_patient_group: Any = None


# What gloo and NCCL say when the process at the other end is gone.
GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
    "NCCL communicator was aborted",
)


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[torch.device]:
    """Join the process group that torchrun or SLURM describes, if one does. Yields this rank's device.

    Args:
        device: "auto" (CUDA where there is a GPU), "cpu" or "cuda".

    Raises:
        Preempted: a signal came, and not all ranks are there.
        UserError: a GPU is asked for, or shared out to ranks, and there are too few; or the ranks do not meet.
    """
    global _patient_group
    here = place()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and NVIDIA_GPU.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
            logger.warning("There is a GPU here that torch cannot use; train.device=cpu says that it need not.")
    if device == "cuda":
        rank_device = torch.device("cuda", _own_gpu(here))
        torch.cuda.set_device(rank_device)
        # Pictures and batches are of one size, so that trying out convolutions pays.
        torch.backends.cudnn.benchmark = True
    else:
        rank_device = torch.device("cpu")
    keep_freed_memory()
    torch.set_num_threads(threads_per_rank())
    if here.launcher == "single":
        yield rank_device
        return
    if here.launcher == "torchrun":
        # torchrun, when it is killed, would leave its ranks running where nobody sees them.
        interruption.when_parent_dies(signal.SIGTERM)
    if here.launcher == "slurm":
        _point_to_first_node(os.environ)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=_meet(here),
        rank=here.rank,
        world_size=here.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=rank_device if device == "cuda" else None,
    )
    is_alone = False
    try:
        _patient_group = dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN_TIMEOUT)
        yield rank_device
    except BaseException as e:
        # Where the others know nothing of it they wait in some collective, and NCCL, on its way out, for them: for half
        # an hour. As it does when Python ends, too, this process must end without, once its error is told.
        is_shared = isinstance(e, Preempted) or (isinstance(e, UserError) and is_known_everywhere(e))
        is_alone = device == "cuda" and not is_shared
        if is_alone:
            atexit.register(_end_at_once, 2 if isinstance(e, UserError | OSError) else 1)
        raise
    finally:
        # No collective here: on the way out of an error the other ranks may be anywhere.
        _patient_group = None
        if not is_alone:
            dist.destroy_process_group()


def _meet(here: Place) -> dist.Store:
    """Wait until all ranks have started; should one never do so, a signal ends the others."""
    met: futures.Future[dist.Store] = futures.Future()

    def meet() -> None:
        try:
            # What init_process_group begins with. There no signal would be looked at, for as long as it takes.
            store, _, _ = next(dist.rendezvous("env://", here.rank, here.world_size, timeout=COLLECTIVE_TIMEOUT))
            store.set_timeout(COLLECTIVE_TIMEOUT)
            # Rank 0 may have waited for the others, and they for it; but torchrun's own store is there before all.
            if store.add("uhml/started", 1) == here.world_size:
                store.set("uhml/all_started", "")
            store.wait(["uhml/all_started"])
            met.set_result(store)
        except Exception as e:
            met.set_exception(e)

    threading.Thread(target=meet, daemon=True).start()
    began, told = time.monotonic(), False
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    while not futures.wait([met], 0.1).done:
        if interruption.seconds_since() > SECONDS_TO_MEET:
            interruption.check()
        if not told and time.monotonic() - began > SECONDS_UNTIL_TOLD:
            told = True
            logger.info("Waiting for all %d ranks to start; they meet at %s.", here.world_size, where)
    try:
        return met.result()
    except Exception as e:
        interruption.check()  # rank 0 has gone by the same signal, and its store with it
        reason = str(e).splitlines()[0]
        raise UserError(
            f"The {here.world_size} ranks did not meet at {where} ({reason}): see that all were started, and that "
            "MASTER_ADDR is the machine of rank 0 and MASTER_PORT is free there."
        ) from e


def _own_gpu(here: Place) -> int:
    """Return the number of this rank's GPU."""
    seen = torch.cuda.device_count()
    if seen == 1 and here.launcher == "slurm":
        return 0  # of several, SLURM may show each task its own alone
    if seen < here.local_world_size:
        raise UserError(
            f"train.device=cuda needs one GPU per process: {here.local_world_size} processes, {seen} GPUs here. Start "
            "fewer processes or use train.device=cpu."
        )
    return here.local_rank


def _end_at_once(status: int) -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)


@contextlib.contextmanager
def lost_ranks_told() -> Iterator[None]:
    """Say in words what a collective says by an error of the network. Not a collective.

    Raises:
        RankFailed: another rank ended without a word.
    """
    try:
        yield
    except RuntimeError as e:
        if not any(words in str(e) for words in GONE):
            raise
        raise RankFailed(
            "Another rank ended without a word, killed perhaps for want of memory: the logs of the other ranks, or "
            "what started them, may say more. Start the same command again: a run goes on from its last checkpoint."
        ) from e


def _point_to_first_node(environment: "os._Environ[str]") -> None:
    """Set where rank 0 listens, the same on every task of a SLURM job, unless the user has."""
    if "MASTER_ADDR" not in environment:
        nodes = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
        environment["MASTER_ADDR"] = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
    # Jobs that share a node have different numbers. Below the ports that systems hand out themselves.
    environment.setdefault("MASTER_PORT", str(10_000 + int(environment["SLURM_JOB_ID"]) % 20_000))


def threads_per_rank() -> int:
    """Return the number of CPU threads for one rank, so that the ranks of a machine do not fight. Not a collective."""
    here = place()
    usable, ranks = cores(), here.local_world_size
    # Of srun's steps alone: a batch script has all cores of its tasks.
    promised = os.environ.get("SLURM_CPUS_PER_TASK") if "SLURM_STEP_ID" in os.environ else None
    if promised:
        # Not every cluster keeps a task, which is one of srun's ranks or all of torchrun's, to what it was promised.
        usable = min(usable, int(promised))
        ranks = 1 if here.launcher == "slurm" else ranks
    return max(1, usable // ranks)


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
    # The reassembly drops the padding.
    padded = _padded(own, num_rows)
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows]


def gather_shares_on_main(own: Tensor, num_rows: int) -> Tensor | None:
    """Put together the rows that the ranks own, in rank 0's host memory alone. No gradient.

    Args:
        own: ``[len(share(num_rows)), ...]``, this rank's rows, on any device.
        num_rows: the number of rows over all ranks.

    Returns:
        ``[num_rows, ...]`` on the CPU of rank 0, None elsewhere.
    """
    own = own.detach().cpu()
    if world_size() == 1:
        return own
    padded = _padded(own, num_rows)
    parts = [torch.empty_like(padded) for _ in range(world_size())] if is_main() else None
    dist.gather(padded, parts, dst=0)
    return None if parts is None else torch.stack(parts, dim=1).flatten(0, 1)[:num_rows]


def _padded(own: Tensor, num_rows: int) -> Tensor:
    """Make all shares as long as the longest: they differ by one row at most. Not a collective."""
    padded = own.new_zeros((-(-num_rows // world_size()), *own.shape[1:]))
    padded[: len(own)] = own
    return padded


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


def all_gather(own: Tensor) -> Tensor:
    """Concatenate the ranks' equally long batches in rank order. No gradient.

    Args:
        own: ``[b, ...]``, the same ``b`` on every rank.

    Returns:
        ``[world_size * b, ...]``.
    """
    if world_size() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over ranks of ``value``, a tensor of any shape that is the same on all. No gradient."""
    # Laid out alike on every rank, for memory is what is summed.
    value = value.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_max(value: int) -> int:
    """Return the greatest ``value`` of all ranks."""
    if world_size() == 1:
        return value
    # On the CPU, also where there are GPUs: the answer decides what Python does next.
    greatest = torch.tensor(value)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return int(greatest)


def gather_objects(value: T) -> list[T]:
    """Return every rank's ``value``, in rank order, on every rank. For small things: messages, counts, names."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(work: Callable[[], T], *, interruptible: bool = True) -> T:
    """Run ``work``, which is no collective itself, on every rank. An error on any rank is raised on every rank.

    A signal that asks the run to end counts as an error on the rank that got it, so here is where all ranks agree to.

    Args:
        work: no collective, unless it is one on all ranks and cannot be interrupted.
        interruptible: whether a signal that asks the run to end may end ``work`` half-way.

    Raises:
        Preempted: on every rank, if some rank was asked to end and ``work`` failed on none.
        UserError: ``work`` raised one on some rank.
        RankFailed: on the other ranks, when ``work`` raised anything else on some rank.
    """
    result, error = None, None
    try:
        with interruption.at_once() if interruptible else contextlib.nullcontext():
            result = work()
    except (Exception, Preempted) as e:
        error = e
    # Without this the ranks that went well would wait in their next collective for one that never comes. One number
    # is enough as long as nothing has happened, which is nearly always.
    if world_size() == 1:
        if error is not None:
            raise error
    elif all_reduce_max(int(error is not None)):
        _raise_on_every_rank(error, gather_objects(_Failure.of(error)))
    return cast(T, result)


def on_main(work: Callable[[], T], *, interruptible: bool = True) -> T | None:
    """Run ``work`` on rank 0 while the others wait, for days if need be. An error there is raised on every rank.

    Args:
        work: no collective.
        interruptible: whether a signal that asks the run to end may end ``work`` half-way.

    Returns:
        What ``work`` returned on rank 0, None elsewhere.

    Raises:
        Preempted: on every rank, if rank 0 was asked to end meanwhile.
        UserError: ``work`` raised one on rank 0.
        RankFailed: on the other ranks, when ``work`` raised anything else on rank 0.
    """
    result, error = None, None
    if is_main():
        try:
            with interruption.at_once() if interruptible else contextlib.nullcontext():
                result = work()
        except (Exception, Preempted) as e:
            error = e
    if world_size() == 1:
        if error is not None:
            raise error
        return result
    # The status goes first, over a group of its own: a barrier with the usual timeout would kill the waiting ranks.
    failure = [_Failure.of(error)]
    dist.broadcast_object_list(failure, src=0, group=_patient_group)
    if failure[0] is not None:
        _raise_on_every_rank(error, failure)
    return result


def from_main(work: Callable[[], T], *, interruptible: bool = True) -> T:
    """Run ``work`` on rank 0, as :func:`on_main` does, and return on every rank what it returned, which is pickled."""
    found = [on_main(work, interruptible=interruptible)]
    if world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return cast(T, found[0])


class _Failure(NamedTuple):
    """What the other ranks are told of an error."""

    is_users: bool
    signal: int
    message: str

    @classmethod
    def of(cls, error: BaseException | None) -> "_Failure | None":
        if error is None:
            return None
        number = error.signal if isinstance(error, Preempted) else 0
        return cls(isinstance(error, UserError), number, str(error) or type(error).__name__)


def _raise_on_every_rank(own: BaseException | None, failures: Sequence[_Failure | None]) -> NoReturn:
    """Raise this rank's own error or else the first of the others'; a preemption only where there is no error."""
    told = [(number, failure) for number, failure in enumerate(failures) if failure is not None]
    errors = [(number, failure) for number, failure in told if not failure.signal]
    if not errors:
        raise own or Preempted(told[0][1].signal)
    if isinstance(own, UserError):
        raise known_everywhere(own)
    if isinstance(own, Exception):
        raise own
    number, failure = errors[0]
    message = f"rank {number} failed: {failure.message}"
    raise known_everywhere(UserError(message)) if failure.is_users else RankFailed(message)


def broadcast_from_main(value: Tensor | None, device: torch.device | str = "cpu") -> Tensor:
    """Send rank 0's tensor to every rank. Shape and type travel first, so that the others need not know them.

    Args:
        value: rank 0's. That of other ranks is not looked at.
        device: to have it on.
    """
    if world_size() == 1:
        assert value is not None
        return value.to(device)
    header = [(tuple(value.shape), value.dtype) if value is not None else None]
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
    # Otherwise DDP regroups the gradients after its first backward pass, and from three ranks on the last bit of a sum
    # depends on the group: a run that went on after an interruption would differ from one that was not interrupted.
    # On GPUs, where runs are not the same to the last bit anyway, that would cost time in every step.
    keeps_groups = world_size() > 2 and next(model.parameters()).device.type == "cpu"
    return DistributedDataParallel(model, find_unused_parameters=keeps_groups, **option)


def unexchanged(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Around a forward and backward pass of what :func:`data_parallel` returned: gradients add up, on this rank alone.

    Not a collective. The next backward pass outside of it averages the sums.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
