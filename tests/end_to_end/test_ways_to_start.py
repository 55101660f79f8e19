"""Starting two ranks without `deepspeed --num_gpus`: mpirun, torchrun, two nodes of DeepSpeed, by ssh and by hand."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pipeline.metrics.record import read_metrics
from tests.ranks import free_port
from tests.tiny_run import TinyRun

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STEPS = 30
LIMIT_S = 240
HOSTS = ("127.0.0.1", "127.0.0.2")  # both are this machine
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Which kernels a processor uses, and so how it rounds.
KERNELS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def needs(*programs: str, packages: str) -> pytest.MarkDecorator:
    """Skips a test where a program is not installed."""
    lacking = [name for name in programs if find(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"{', '.join(lacking)} not found; apt-get install {packages}")


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def environment(**more: str) -> dict[str, str]:
    """The environment of a launcher that finds the programs beside this interpreter."""
    kept = {key: value for key, value in os.environ.items() if key not in _LAUNCHED}
    return kept | {"PATH": f"{BIN}{os.pathsep}{kept['PATH']}"} | more


def run_all(commands: Sequence[Sequence[str]], **more: str) -> list[subprocess.CompletedProcess[str]]:
    """Starts commands side by side, as in several terminals, and waits for all of them."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = [
        subprocess.Popen(words, cwd=ROOT, env=environment(**more), text=True, **pipes)  # type: ignore[call-overload]
        for words in commands
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def train(tiny_run: TinyRun, folder: Path, *launchers: Sequence[str], **more: str) -> list[float]:
    """Trains by one or more launchers that belong together, and returns the losses."""
    config = tiny_run.write_config(folder / "run.yaml", folder / "run", train={"steps": STEPS})
    done = run_all([[*words, "launch/train.py", "--config", str(config)] for words in launchers], **more)
    assert [process.returncode for process in done] == [0] * len(done), "\n".join(process.stdout for process in done)
    status = json.loads((folder / "run" / "status.json").read_text())
    assert (status["state"], status["world_size"]) == ("finished", 2)
    return [record["loss"] for record in read_metrics(folder / "run")]


def hostfile(folder: Path, hosts: Sequence[str]) -> str:
    path = folder / "hosts"
    path.write_text("".join(f"{host} slots=1\n" for host in hosts))
    return str(path)


@pytest.fixture(scope="module")
def expected(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two nodes that are started by hand, each with its own `deepspeed --no_ssh`."""
    folder = tmp_path_factory.mktemp("no_ssh")
    common = ["--hostfile", hostfile(folder, ["node1", "node2"]), "--no_ssh", "--master_addr", "127.0.0.1"]
    common += ["--master_port", str(free_port())]
    nodes = [[sys.executable, str(BIN / "deepspeed"), *common, "--node_rank", str(number)] for number in (0, 1)]
    return train(tiny_run, folder, *nodes)


def test_two_nodes_without_ssh(expected: list[float]) -> None:
    assert len(expected) == STEPS


@needs("mpirun", packages="openmpi-bin")
def test_mpirun_stops_and_goes_on(tiny_run: TinyRun, tmp_path: Path, expected: list[float]) -> None:
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable]
    config, run = (
        tiny_run.write_config(tmp_path / "run.yaml", tmp_path / "run", train={"steps": STEPS}),
        tmp_path / "run",
    )
    with (tmp_path / "log").open("w") as log:
        words = [*command, "launch/train.py", "--config", str(config)]
        process = subprocess.Popen(words, cwd=ROOT, env=environment(**MPI), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + LIMIT_S
            while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < 3:
                assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(60) == 75, (tmp_path / "log").read_text()
        finally:
            process.kill()
    assert 3 <= len(read_metrics(run)) < STEPS
    assert train(tiny_run, tmp_path, command, **MPI) == expected


@needs("mpirun", packages="openmpi-bin")
def test_under_mpirun_one_rank_speaks(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tiny_run.write_config(tmp_path / "run.yaml", tmp_path / "run")
    words = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "launch/train.py", "--config", str(config)]
    [done] = run_all([[*words, "--memory.chunk_sizes", "4"]], **MPI)
    assert done.returncode == 1
    assert done.stdout.count("unknown key memory.chunk_sizes") == 1


def test_torchrun(tiny_run: TinyRun, tmp_path: Path, expected: list[float]) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    options += ["--rdzv_id", "test", "--local_addr", "127.0.0.1"]
    nodes = [[sys.executable, "-m", "torch.distributed.run", *options] for _ in range(2)]
    assert train(tiny_run, tmp_path, *nodes) == expected


@pytest.fixture()
def ssh_options(tmp_path: Path) -> Iterator[str]:
    """An ssh server of our own on this machine, with keys of its own; yields what ssh must be told to reach it."""
    folder, port = tmp_path / "ssh", free_port()
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    server = {
        "Port": port,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
    }
    listen = "".join(f"ListenAddress {host}\n" for host in HOSTS)
    (folder / "sshd.conf").write_text(listen + settings(server))
    client = {
        "Port": port,
        "IdentityFile": folder / "user",
        "IdentitiesOnly": "yes",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
    }
    (folder / "ssh.conf").write_text(settings(client))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it; a service would make it
    sshd = find("sshd")
    assert sshd is not None
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd.conf")], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while any(not answers(host, port) for host in HOSTS):
            assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"-F {folder / 'ssh.conf'}"
    finally:
        process.terminate()
        process.wait(20)


def settings(values: Mapping[str, object]) -> str:
    return "".join(f"{name} {value}\n" for name, value in values.items())


def answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@needs("sshd", "ssh", "ssh-keygen", "pdsh", packages="openssh-server pdsh")
@pytest.mark.skipif(not shutil.which(pwd.getpwuid(os.geteuid()).pw_shell), reason="this user cannot log in")
def test_two_nodes_by_ssh(tiny_run: TinyRun, tmp_path: Path, expected: list[float], ssh_options: str) -> None:
    # ssh takes no environment along; DeepSpeed takes what stands in this file.
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    variables |= {name: os.environ[name] for name in KERNELS if name in os.environ}
    (tmp_path / "environment").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    command = [sys.executable, str(BIN / "deepspeed"), "--hostfile", hostfile(tmp_path, HOSTS)]
    # DeepSpeed asks the first host for its address by plain `ssh`, which knows nothing of this server.
    command += ["--no_ssh_check", "--master_addr", HOSTS[0], "--master_port", str(free_port())]
    more = {"DS_ENV_FILE": str(tmp_path / "environment"), "PDSH_SSH_ARGS_APPEND": ssh_options}
    assert train(tiny_run, tmp_path, command, **more) == expected
