"""Interleaved timing of contenders that do the same work, so that a noisy machine disturbs all
alike.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

WARMUP = 2  # untimed rounds


class Contender(NamedTuple):
    """One way to do the work, ready to run."""

    name: str
    run: Callable[[], Any]
    """Do the work once and block until it is done."""
    facts: dict[str, Any]
    """Further figures, where known: ``compile_s``, ``temporary_bytes``, ``total_bytes``.
    """
    programs: tuple[Any, ...] = ()
    """What one run executes, as `jax.stages.Compiled`, where known."""


class Timing(NamedTuple):
    """The seconds of a contender's rounds."""

    contender: Contender
    seconds: list[float]

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The slowest round less the fastest, relative to the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def time_interleaved(contenders: Sequence[Contender], rounds: int) -> list[Timing]:
    """Run each contender once a round, for `WARMUP` rounds and then ``rounds`` timed ones."""
    timings = [Timing(contender, []) for contender in contenders]
    for n in range(WARMUP + rounds):
        for timing in timings:
            began = time.perf_counter()
            timing.contender.run()
            if n >= WARMUP:
                timing.seconds.append(time.perf_counter() - began)
    return timings
