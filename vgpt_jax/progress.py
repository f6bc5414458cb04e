"""Progress of long work: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TypeVar

T = TypeVar("T")


def on_terminal() -> bool:
    """Whether standard error is a terminal, on which a bar can be redrawn."""
    return sys.stderr.isatty()


def progress(
    items: Iterable[T], what: str, total: int | None = None, seconds_between_lines: float = 10.0
) -> Iterator[T]:
    """Yields ``items`` and shows how many of ``total``, or of their number if they have one, are done, on standard error.

    Where there is no terminal, a line is printed at the start, every ``seconds_between_lines``, and at the end.
    """
    total = len(items) if isinstance(items, Sized) else total
    if on_terminal():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, dynamic_ncols=True)
        return
    of_total = f"/{total}" if total is not None else ""
    start = last = time.monotonic()
    count = 0
    print(f"{what} ...", file=sys.stderr, flush=True)
    for count, item in enumerate(items, 1):  # noqa: B007 - the count is read after the loop
        yield item
        if time.monotonic() - last > seconds_between_lines:
            last = time.monotonic()
            print(f"{what}: {count}{of_total}, {last - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{what}: {count}{of_total} done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


class StepProgress:
    """Progress of a training: a bar on a terminal, plain lines elsewhere.

    Args:
      what: the stage.
      start: steps done before.
      total: steps in all.
    """

    def __init__(self, what: str, start: int, total: int):
        self._what, self._start, self._total = what, start, total
        self._begun = time.monotonic()
        self._bar = None
        if on_terminal():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=what, unit="step", dynamic_ncols=True)

    def update(self, step: int) -> None:
        """Moves the bar to ``step``."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, values: Mapping[str, float], what: str = "") -> None:
        """Shows metrics of a step: on a line, or beside the bar for training's own and above it for others."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None and not what:
            self._bar.set_postfix_str(shown)
            return
        elapsed = time.monotonic() - self._begun
        left = elapsed / max(step - self._start, 1) * (self._total - step)
        line = f"{self._what}  step {step}/{self._total}  {what + '  ' if what else ''}{shown}"
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(f"{line}  [{clock(elapsed)}, {clock(left)} left]", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 3:07, 1:00:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
