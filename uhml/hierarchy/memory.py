"""Say before a long computation whether its memory will be there."""

import contextlib
import os
from pathlib import Path

import torch

from uhml.errors import UserError

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Return the bytes that this process can still take on ``device``; on a CPU, within the container's limit."""
    if device.type == "cuda":
        # What torch keeps of what was freed is ours to take again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    limits = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for group, limit, used, given_back in (
        (CGROUPS, "memory.max", "memory.current", "inactive_file"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            left = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # no such control group, or "max"
            continue
        # What files were read, pictures above all, counts as taken, until somebody else wants the memory.
        with contextlib.suppress(OSError, ValueError, KeyError):
            fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            left += int(fields[given_back])
        limits.append(left)
    return min(limits)


def require(num_bytes: float, device: torch.device, work: str, remedy: str) -> None:
    """Refuse work that needs more memory than there is.

    Args:
        num_bytes: what the work takes, beyond what is taken now.
        device: where.
        work: what it is, as the subject of a sentence: "mode=graph on 1,000 points".
        remedy: what the user can do: "Use fewer points.".

    Raises:
        UserError: it does not fit.
    """
    there = available(device)
    if num_bytes > there:
        raise UserError(
            f"{work} needs about {num_bytes / GIB:.1f} GiB of memory on {device}, and {there / GIB:.1f} GiB are free. "
            f"{remedy}"
        )
