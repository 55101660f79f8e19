"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, in a folder, on loopback."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.ranks import free_port

NODES = ("n1", "n2")
GPUS = 2  # of each node; SLURM only counts them
REQUEUE_DELAY_S = 5
_START_S = 30.0
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_delay}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:{gpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:{gpus}
PartitionName=usual Nodes=n1,n2 Default=YES PriorityTier=1
PartitionName=urgent Nodes=n1,n2 PriorityTier=10
"""


def missing() -> str | None:
    """Why there can be no cluster here, in words; None if there can."""
    lacking = [name for name in _PROGRAMS if _program(name) is None]
    if lacking:
        return f"SLURM is not installed ({', '.join(lacking)} not found; apt-get install slurm-wlm munge)"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + _SYSTEM_PATH)


class SlurmCluster:
    """Two nodes, `n1` and `n2`, each of eight processors and two GPUs that are only counted.

    Attributes:
        folder: Configuration, state and logs of the daemons.
        environment: What a process needs to reach this cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = dict(os.environ) | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ.get("PATH", "") + os.pathsep + _SYSTEM_PATH,
            "MASTER_ADDR": "127.0.0.1",  # no machine is called n1
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts all daemons and waits until both nodes are idle."""
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        ports = [free_port() for _ in range(3)]
        text = _CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            folder=self.folder,
            ports=ports,
            requeue_delay=REQUEUE_DELAY_S,
            gpus=GPUS,
        )
        (self.folder / "slurm.conf").write_text(text)
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        # The folder belongs to the tests; munged would refuse one that a group may write to.
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        wait_until((munge / "socket").exists, "munged's socket", _START_S)
        self._start("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.node_states() == {node: "idle" for node in NODES}, "two idle nodes", _START_S)

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """Ends a node as a power cut would: its slurmd and every process of its jobs, all at once."""
        tasks = [process for process in psutil.process_iter() if self._is_task_of(process, node)]
        # What starts and watches the tasks is nobody's child, and they are its children.
        steps = [parent for parent in {task.parent() for task in tasks} if parent and parent.name() == "slurmstepd"]
        doomed = [psutil.Process(self._daemons[node].pid), *steps, *tasks]
        assert steps, f"{node} runs nothing"
        for process in doomed:
            process.suspend()
        for process in doomed:
            process.kill()
        self._daemons[node].wait(10)

    def stop(self) -> None:
        """Cancels all jobs and ends all daemons."""
        if "slurmctld" in self._daemons:
            self.cancel_all()
        for name in ("slurmctld", *NODES, "munged"):
            daemon = self._daemons.get(name)
            if daemon is not None and daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()

    def cancel_all(self) -> None:
        """Cancels all jobs and waits until they are gone."""
        subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, timeout=30, check=False)
        wait_until(lambda: not self.command("squeue", "--noheader").strip(), "the end of all jobs", 60.0)

    def command(self, *words: str) -> str:
        """Runs a command of SLURM and returns what it printed."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), cwd: Path) -> str:
        """Submits a job script and returns the job's number."""
        words = ["sbatch", "--parsable", *options, str(script), *arguments]
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> Mapping[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.command("scontrol", "show", "--oneliner", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def node_states(self) -> Mapping[str, str]:
        """Every node's state."""
        lines = self.command("sinfo", "--noheader", "--Node", "--partition=usual", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def _is_task_of(self, process: psutil.Process, node: str) -> bool:
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"], "SLURMD_NODENAME": node}
        try:
            return wanted.items() <= process.environ().items()
        except psutil.Error:
            return False

    def _start(self, name: str, words: Sequence[str]) -> None:
        program = _program(words[0])
        assert program is not None
        # They end with the tests, even if those are killed.
        command = ["setpriv", "--pdeathsig", "TERM", program, *words[1:]]
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster that ends with the context, whatever happens in it."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def wait_until(holds: Callable[[], bool], what: str, limit_s: float, log: Path | None = None) -> None:
    """Waits until something holds, and fails in words, with the end of a log, if it never does."""
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            said = log.read_text()[-6000:] if log is not None and log.is_file() else ""
            raise AssertionError(f"waited {limit_s:g} s for {what}\n{said}")
        time.sleep(0.2)
