"""Progress of long work: a bar on a terminal, otherwise occasional log lines."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from common.escape import escaped

T = TypeVar("T")
FIRST, EVERY = 10.0, 60.0  # seconds to the first line, and between lines


class Bar(Protocol):
    """Interface of the objects that `progress` returns."""

    def update(self, n: float = 1, /) -> Any:
        """Counts further units."""

    def set_postfix(self, *, refresh: bool = True, **values: Any) -> None:
        """Shows values beside the count."""

    def close(self) -> None:
        """Ends it."""


class Lines:
    """A bar for logs: `asr: 120 of 400 (30%), 2.1/s, 2 min 13 s left`, to stderr.

    Args:
        now: the clock, in seconds.
    """

    def __init__(
        self, total: float, initial: float, label: str, unit: str, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.initial, self.done, self.label, self.unit = total, initial, initial, label, unit
        self.now = now
        self.started = now()
        self.due = self.started + FIRST
        self.values = ""

    def update(self, n: float = 1, /) -> None:
        """Counts further units, and prints a line if it is due."""
        self.done += n
        if self.now() >= self.due:
            self._say()

    def set_postfix(self, *, refresh: bool = True, **values: Any) -> None:
        """Sets values to show at the end of the next line."""
        self.values = "".join(f", {name} {value}" for name, value in values.items())

    def close(self) -> None:
        """Prints a last line if earlier lines were printed."""
        if self.due > self.started + FIRST:
            self._say()

    def _say(self) -> None:
        now = self.now()
        self.due = now + EVERY
        rate = (self.done - self.initial) / max(now - self.started, 1e-9)
        share = f" ({100 * self.done / self.total:.0f}%)" if self.total else ""
        left = f", {clock((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        unit = f" {self.unit}" if self.unit else ""
        done = f"{_amount(self.done)} of {_amount(self.total)}{unit}{share}, {rate:.3g}/s{left}{self.values}"
        print(escaped(f"{self.label}: {done}", one_line=True), file=sys.stderr, flush=True)


def _amount(number: float) -> str:
    """Whole numbers as they are, others with one decimal."""
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:,.1f}"


def progress(total: float, label: str, *, initial: float = 0, unit: str = "", hidden: bool = False) -> Bar:
    """A bar on a terminal, log lines otherwise, nothing if `hidden`.

    Args:
        total: units of the whole work, of which `initial` are already done.
        unit: name of the counted units, in the plural.
    """
    if not hidden and not sys.stderr.isatty():
        return Lines(total, initial, label, unit)
    from tqdm import tqdm

    bar: Bar = tqdm(
        total=total,
        initial=initial,
        desc=escaped(label),
        unit=f" {unit}" if unit else "it",
        unit_scale=not float(total).is_integer(),  # otherwise all digits of a fraction are shown
        dynamic_ncols=True,
        disable=hidden,
    )
    return bar


def counted(items: Iterable[T], total: int, label: str, *, unit: str = "") -> Iterator[T]:
    """Yields the items and shows the progress."""
    bar = progress(total, label, unit=unit)
    try:
        for item in items:
            yield item
            bar.update()
    finally:
        bar.close()


def clock(seconds: float) -> str:
    """A duration in its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, lower, lower_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // lower} {lower_name}"
    return f"{whole} s"
