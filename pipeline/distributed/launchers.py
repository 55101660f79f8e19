"""Who this process is in a job, where a launcher says it in words of its own: srun, mpirun."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Set by mpirun for every rank. DeepSpeed asks MPI itself for the rest.
_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)
_FIRST_PORT, _NUM_PORTS = 15000, 15000  # below those that Linux gives to clients


def local_rank(environment: Mapping[str, str]) -> int:
    """The number of this process on its machine, known before the job is joined; 0 without a launcher."""
    return next((int(environment[name]) for name in _LOCAL_RANKS if name in environment), 0)


def local_size(environment: Mapping[str, str]) -> int:
    """How many ranks this machine has, by its launcher's word; 1 where none says it."""
    said = (environment.get(name, "") for name in _LOCAL_SIZES)
    return next((int(text) for text in said if text.isdecimal() and int(text) > 0), 1)


def is_started_by_mpi(environment: Mapping[str, str]) -> bool:
    """Whether MPI can be asked who this process is: mpirun, or an srun that speaks PMI, started it."""
    return any(name in environment for name in _MPI_RANKS)


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What torch wants to know of a task that srun started, in the variables that it reads.

    Only a step of several tasks is a job of several ranks: a program that is started in a batch script or in an
    interactive allocation, without srun, finds SLURM's variables, too. So do the ranks of an mpirun in there.

    Args:
        environment: The process's environment.

    Returns:
        `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`; the last two stay as they are set.
        Empty if srun did not start this process, or if the variables are there already.
    """
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    # Open MPI starts its daemons through srun, Intel MPI its proxies: what they then start is not one of SLURM's tasks.
    is_within_mpi = "OMPI_COMM_WORLD_RANK" in environment or environment.get("PMI_SIZE", num_tasks) != num_tasks
    if "RANK" in environment or num_tasks == "1" or is_within_mpi:
        return {}
    port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _NUM_PORTS
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": num_tasks,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(nodes: str) -> str:
    """The first of a list of nodes in SLURM's short form, such as `n1`, `n[01-16,20]` or `r[1-2]n[1-4],login`."""
    # One expression instead of `scontrol show hostnames`, which containers do not have.
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
