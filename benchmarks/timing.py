"""Calls timed in turn, round after round, each within a limit of time and of memory."""

from __future__ import annotations

import gc
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

Call = Callable[[], Tensor]
BLOCK = 0.02
"""Seconds that one timing takes at least: calls of a millisecond are repeated within it."""
NEVER = float("inf")
MEMORY = 0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
"""GB that a benchmark takes at most, unless told otherwise: this share of the machine's."""


class TooLong(BaseException):
    """A call was still running at the end of its time. No Exception, so that no library takes it for its own."""


@dataclass
class Timed:
    """One call, its seconds in each round, and why there are none where it was left out.

    Args:
        call: what is timed.
        foreign: another project's code: whatever it raises leaves the call out, where our own would end the benchmark.
    """

    call: Call
    foreign: bool = False
    seconds: list[float] = field(default_factory=list)
    note: str = ""
    rounds: int = 0
    repeats: int = 1

    def probe(self, rounds: int, limit: float, expected: float = 0.0) -> float:
        """Run once or twice and settle how often it will be run: all rounds together within the limit, but one round.

        Args:
            rounds: how many are wanted.
            limit: seconds.
            expected: seconds a call, if something promises so; over the limit, it is not tried.

        Returns:
            Seconds a call; `NEVER` where it was left out.
        """
        if expected > limit:
            about = (
                "over the limit with less to do" if expected == NEVER else f"about {expected:.0f} s a call"
            )
            self.note = f"left out: {about}"
            return expected
        try:
            once = within(limit, self.call)
            if once < limit / 4:
                once = within(limit, self.call)
        except TooLong:
            self.note = f"left out: over {limit:g} s a call"
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            if isinstance(error, MemoryError) or "memory" in line:
                self.note = "left out: out of memory"
            elif self.foreign:
                self.note = f"left out: {type(error).__name__}: {line[:60]}"
            else:
                raise
        else:
            self.repeats = max(1, round(BLOCK / once))
            self.rounds = min(rounds, max(1, int(limit / (once * self.repeats))))
            return once
        gc.collect()
        return NEVER

    def run(self) -> None:
        """One round."""
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        self.seconds.append((time.perf_counter() - start) / self.repeats)

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.seconds)


def within(limit: float, call: Callable[[], object]) -> float:
    """Seconds of one call.

    Raises:
        TooLong: it took longer than the limit. Single operations are not interrupted.
    """

    def stop(*_: object) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def in_turn(calls: Iterable[Timed], rounds: int) -> None:
    """Run all of them, round after round; those with fewer rounds drop out."""
    calls = list(calls)
    for number in range(rounds):
        for call in calls:
            if number < call.rounds:
                call.run()


def ratio(above: Timed, below: Timed) -> float | None:
    """The median of the rounds' ratios, over the rounds that both have."""
    ratios = [a / b for a, b in zip(above.seconds, below.seconds, strict=False)]
    return statistics.median(ratios) if ratios else None


def limit_memory(gigabytes: float) -> None:
    """Let allocations beyond this fail, where the operating system would else end a program of its own choice."""
    size = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))
