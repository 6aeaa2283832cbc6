import os
import platform
import re
import subprocess
import sys

import pytest

from uhml.environment import Place, place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place("single")),
        ({"RANK": "0"}, Place("single")),
        ({"RANK": "", "WORLD_SIZE": ""}, Place("single")),
        (TORCHRUN, Place("torchrun", 5, 8, 1, 4)),
        (STEP, Place("slurm", 3, 5, 1, 2)),
        ({**STEP, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}, Place("slurm", 4, 5, 0, 1)),
        # torchrun inside of SLURM knows better, as one srun task starts many ranks.
        ({**STEP, **TORCHRUN}, Place("torchrun", 5, 8, 1, 4)),
        # A batch script, or a shell under salloc.
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"}, Place("single")),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place("single")),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, Place("single")),
    ],
)
def test_torchrun_comes_before_slurm_and_a_step_of_one_is_single(monkeypatch, variables, expected):
    for name in (*TORCHRUN, *STEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP's own")
@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "PASSIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(users, expected):
    env = {name: value for name, value in os.environ.items() if name not in expected}
    shown = subprocess.run(
        [sys.executable, "-m", "uhml", "cluster", "--help"],
        env={**env, **users, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert {name: re.search(rf"{name} = '(.*)'", shown)[1] for name in expected} == expected


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's own")
def test_large_blocks_that_are_freed_are_kept_for_the_next():
    code = """
import ctypes, resource
from uhml.environment import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(2**27))
    ctypes.memset(block, 1, 2**27)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 20  # of 32,768 pages
