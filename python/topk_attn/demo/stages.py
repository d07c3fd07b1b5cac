"""Progress of the whole demo: a heading for each stage, with the time gone and an estimate of the time
left.
"""

from __future__ import annotations

import contextlib
import time


def duration(seconds: float) -> str:
    """ "45 s" or "3 min 07 s"."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class Stages:
    """Runs named stages in order.

    Args:
        expected: stage -> seconds it takes on two ordinary cores. Only the shares matter: the estimate of the
            time left is scaled by how long the finished stages took.
    """

    def __init__(self, expected: dict[str, float]) -> None:
        self.expected = expected
        self.seconds: dict[str, float] = {}
        self._begin = time.monotonic()

    @property
    def gone(self) -> float:
        return time.monotonic() - self._begin

    def left(self) -> float:
        """Estimated seconds of the stages that are not finished."""
        done = sum(self.expected[name] for name in self.seconds)
        pace = sum(self.seconds.values()) / done if done > 30 else 1.0
        return pace * (sum(self.expected.values()) - done)

    @contextlib.contextmanager
    def stage(self, name: str):
        if name not in self.expected:
            raise KeyError(f"no stage named {name!r}")
        number = len(self.seconds) + 1
        left = self.left()
        print(
            f"\n[{number}/{len(self.expected)}] {name}   "
            f"({duration(self.gone)} gone, about {duration(left)} left in all)",
            flush=True,
        )
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin
        print(f"      done in {duration(self.seconds[name])}", flush=True)
