"""Contenders that do the same work, timed in turns, so that a noisy machine disturbs all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

WARMUP = 2  # rounds that are not counted


class Contender(NamedTuple):
    """One way to do the work, ready to run."""

    name: str
    run: Callable[[], Any]
    """Does it once; returns when it is done."""
    facts: dict[str, Any]
    """What is known of it beside its time, in the units of its name: ``compile_s``, ``temporary_bytes``, ``total_bytes``."""


class Timing(NamedTuple):
    """One contender's times."""

    contender: Contender
    seconds: list[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Between the slowest and the fastest round, relative to the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def in_turns(contenders: Sequence[Contender], rounds: int) -> list[Timing]:
    """Each contender once a round, for `WARMUP` rounds and then ``rounds`` that count."""
    timings = [Timing(contender, []) for contender in contenders]
    for n in range(WARMUP + rounds):
        for timing in timings:
            began = time.perf_counter()
            timing.contender.run()
            if n >= WARMUP:
                timing.seconds.append(time.perf_counter() - began)
    return timings
