"""Who a process is in a job of SLURM or MPI. The launchers themselves are in tests/end_to_end."""

from __future__ import annotations

import pytest

from pipeline.distributed.launchers import first_host, is_started_by_mpi, local_rank, local_size, slurm_ranks

# As srun of SLURM 22.05 sets them, in `srun --nodes=2 --ntasks-per-node=2`.
TASK = {
    "SLURM_JOB_ID": "20007",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
RANKS = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20007"}


def test_a_task_of_srun_has_a_rank() -> None:
    assert slurm_ranks(TASK) == RANKS


def test_address_and_port_that_are_set_stay() -> None:
    chosen = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}
    assert slurm_ranks(TASK | chosen) == RANKS | chosen
    assert slurm_ranks(TASK | {"MASTER_ADDR": ""}) == RANKS  # as a job script leaves it that sets it to nothing


@pytest.mark.parametrize("job, port", [("1", "15001"), ("14999", "29999"), ("15000", "15000")])
def test_jobs_beside_each_other_have_ports_of_their_own(job: str, port: str) -> None:
    assert slurm_ranks(TASK | {"SLURM_JOB_ID": job})["MASTER_PORT"] == port


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"},  # a batch script
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
        TASK | {"RANK": "5"},  # torchrun or deepspeed in a task
        TASK | {"OMPI_COMM_WORLD_RANK": "5"},  # mpirun in a batch script: its daemons are srun's tasks
        TASK | {"PMI_RANK": "5", "PMI_SIZE": "16"},
    ],
)
def test_what_srun_did_not_start_is_left_alone(environment: dict[str, str]) -> None:
    assert slurm_ranks(environment) == {}


def test_a_task_that_speaks_pmi_is_srun_s() -> None:
    assert slurm_ranks(TASK | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMIX_RANK": "3"}) == RANKS


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[01-16,20]", "n01"),
        ("n[3,5-6],m1", "n3"),
        ("r[1-2]n[10-12]", "r1n10"),
        ("login,n[1-2]", "login"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_what_mpi_started() -> None:
    assert is_started_by_mpi({"OMPI_COMM_WORLD_RANK": "0"}) and not is_started_by_mpi(TASK)


@pytest.mark.parametrize(
    "environment, number",
    [({}, 0), ({"LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, 2), ({"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1), (TASK, 1)],
)
def test_the_number_on_the_machine_is_known_before_the_job_is_joined(environment, number) -> None:
    assert local_rank(environment) == number


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 1), ({"LOCAL_WORLD_SIZE": "8"}, 8), ({"LOCAL_SIZE": "4"}, 4), ({"SLURM_NTASKS_PER_NODE": "2(x3)"}, 1)],
)
def test_ranks_of_a_machine(environment, expected):
    assert local_size(environment) == expected
