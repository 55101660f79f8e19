"""When a run is saved."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.distributed.ranks import gather_objects
from pipeline.training.build import Run


class Saving:
    """Saves a run by steps, by the clock, when asked, and at its end.

    Args:
        run: The run.
        clock: Seconds that only grow; rank 0's counts.
    """

    def __init__(self, run: Run, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock, self._saved_at = run, clock, clock()

    def after_step(self, step: int, *, last: bool, asked: bool) -> None:
        """Saves if it is time, and goes on with the checkpoint that is being written.

        Collective: every rank must call it, after every step, with the same arguments.

        Args:
            step: Optimizer steps done.
            last: Whether training ends here: everything is on the disk when this returns.
            asked: Whether somebody asked for a checkpoint now.

        Raises:
            CheckpointError: A checkpoint could not be written; older ones are untouched.
        """
        self._run.checkpoints.publish_if_written()
        if last or asked or self._is_due(step):
            self._saved_at = self._clock()
            self._run.checkpoints.save(step, self._run.owners)
        if last:
            self._run.checkpoints.publish_if_written(wait=True)

    def _is_due(self, step: int) -> bool:
        wanted = self._run.config.checkpoint
        if wanted.every_steps > 0 and step % wanted.every_steps == 0:
            return True
        if wanted.every_minutes == 0:
            return False
        return bool(gather_objects(self._clock() - self._saved_at >= 60 * wanted.every_minutes)[0])
