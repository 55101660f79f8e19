"""Signals on one rank and on all: every rank finishes the step, saves once and ends; the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import Config
from pipeline.distributed.signals import ECHO_S
from pipeline.metrics.record import read_metrics
from tests.ranks import RanksFailedError, run_ranks
from tests.tiny_run import TinyRun

STEPS = 8
EXACT = ("step", "loss", "grad_norm", "learning_rate", "memory_fill", "gate_mean", "memory_share", "tokens")


@dataclass(frozen=True)
class Ask:
    """A signal that ranks send themselves in a step."""

    signal: int
    ranks: Sequence[int]
    step: int


PARTS = (  # one run in five parts, each a start of its own
    Ask(signal.SIGTERM, [1], 2),
    Ask(signal.SIGINT, [0, 1], 4),
    Ask(signal.SIGUSR1, [0], 5),
    Ask(signal.SIGUSR1, [1], 7),  # this one goes on, and a second one in the same part asks again
)


def send(asks: Sequence[Ask], signals: Any, run: Any) -> None:
    """Has ranks send themselves signals, each in the middle of its step."""
    from pipeline.distributed.ranks import rank

    step = run.trainer.step

    def signalled(number: int, **kwargs: Any) -> Any:
        for ask in asks:
            if number == ask.step and rank() in ask.ranks:
                os.kill(os.getpid(), ask.signal)
                while signals.asked is None:
                    time.sleep(0.01)
        return step(number, **kwargs)

    run.trainer.step = signalled


def train_in_parts(unbroken: Config, stopping: Config, going_on: Config) -> list[dict[str, Any]]:
    from pipeline.distributed.ranks import barrier
    from pipeline.distributed.signals import Signals
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    train(build_run(unbroken))
    found = []
    for asks in (PARTS[:1], PARTS[1:2], PARTS[2:3], PARTS[3:], ()):
        config = going_on if asks == PARTS[3:] else stopping
        with Signals(usr1_stops=config.run.on_usr1 == "stop") as signals:
            run = build_run(config, signals=signals)
            send([*asks, Ask(signal.SIGUSR1, [0, 1], 6)] if config is going_on else asks, signals, run)
            ended = train(run, signals=signals)
        barrier()
        saved = sorted(path.name for path in (run.folder / "checkpoints").glob("step_*"))
        status = json.loads((run.folder / "status.json").read_text())
        found.append({"ended": (ended.step, ended.state, ended.reason, ended.asked), "saved": saved, "status": status})
        barrier()
    return found


@pytest.fixture(scope="module")
def parts(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("signals")

    def config(name: str, on_usr1: str) -> Config:
        run = {"on_usr1": on_usr1}
        return tiny_run.config(
            folder / name, run=run, train={"steps": STEPS}, memory={"group_size": 2}, checkpoint={"every_steps": 0}
        )

    configs = [config("unbroken", "stop"), config("signalled", "stop"), config("signalled", "continue")]
    return folder, run_ranks(train_in_parts, 2, *configs, init_process_group=False, timeout_s=240)


def test_every_rank_ends_after_the_step_with_one_checkpoint_and_the_reason(parts):
    _, ranks = parts
    expected = [
        ((2, "preempted", "SIGTERM", "SIGTERM"), ["step_00000002"]),
        ((4, "preempted", "SIGINT", "SIGINT"), ["step_00000002", "step_00000004"]),
        ((5, "preempted", "SIGUSR1", "SIGUSR1"), ["step_00000004", "step_00000005"]),
        # On SIGUSR1 it saved after steps 6 and 7 and went on; two checkpoints are kept.
        ((8, "finished", None, None), ["step_00000007", "step_00000008"]),
        ((8, "finished", None, None), ["step_00000007", "step_00000008"]),
    ]
    for found in ranks:
        assert [(part["ended"], part["saved"]) for part in found] == expected
    for part, (ended, _) in zip(ranks[0], expected, strict=True):
        status = part["status"]
        assert (status["step"], status["state"], status["reason"]) == ended[:3]
        assert (status["steps"], status["world_size"]) == (STEPS, 2)


def test_a_run_that_was_stopped_four_times_equals_an_unbroken_one_bit_for_bit(parts):
    folder, _ = parts
    unbroken, signalled = (
        [[record[key] for key in EXACT] for record in read_metrics(folder / name)] for name in ("unbroken", "signalled")
    )
    assert len(unbroken) == STEPS and signalled == unbroken


def asked_twice(config: Config) -> None:
    """Rank 1 waits for good in a step; rank 0 is asked twice while its main thread waits for rank 1 in a collective."""
    from pipeline.distributed.ranks import rank
    from pipeline.distributed.signals import Signals
    from pipeline.training.build import build_run
    from pipeline.training.loop import train

    with Signals() as signals:
        run = build_run(config, signals=signals)
        step = run.trainer.step

        def waiting(number: int, **kwargs: Any) -> Any:
            if number == 2 and rank() == 0:
                later = f"sleep 0.2; kill -TERM {os.getpid()}; sleep 0.2; kill -INT {os.getpid()}"  # its echo
                os.system(f"({later}; sleep {ECHO_S}; kill -TERM {os.getpid()}) &")
            elif number == 2:
                time.sleep(600)
            return step(number, **kwargs)

        run.trainer.step = waiting  # type: ignore[method-assign]
        train(run, signals=signals)


def asked_while_loading(config: Config) -> None:
    """Rank 1 gets a signal while weights are loaded; rank 0 hears of it in a collective."""
    from pipeline.distributed.ranks import rank
    from pipeline.distributed.signals import Signals
    from pipeline.training import build

    load: Callable[..., Any] = build.load_backbone

    def load_slowly(*args: Any, **kwargs: Any) -> Any:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return load(*args, **kwargs)

    build.load_backbone = load_slowly
    with Signals() as signals:
        build.build_run(config, signals=signals)


@pytest.mark.parametrize(
    ("ask", "reason", "step"),
    [
        (asked_twice, "SIGTERM after SIGTERM: stopped at once, without saving", 1),
        (asked_while_loading, "SIGTERM before the first step (rank 1)", 0),
    ],
)
def test_a_second_signal_or_one_before_the_first_step_ends_all_ranks_at_once(
    ask: Callable[[Config], None], reason: str, step: int, tiny_run: TinyRun, tmp_path: Path
) -> None:
    config = tiny_run.config(tmp_path / "run", memory={"group_size": 2})
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(ask, 2, config, init_process_group=False, timeout_s=100, grace_s=30)
    for rank in (0, 1):
        assert f"rank {rank} died without a word, exit code 75" in str(caught.value)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("preempted", reason, step)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
