"""Progress on stderr: a bar on a terminal; elsewhere, now and then, a plain line. Only the first process speaks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from typing_extensions import Self

FIRST_LINE, NEXT_LINE = 2.0, 15.0  # seconds


def speaks() -> bool:
    """Whether this process is the one that prints, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _bars() -> Bars:
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not (speaks() and sys.stderr.isatty()),
    )


class Progress:
    """A callback (done, total, label) that shows how far the work is, how fast it goes and how long it will take.

    A bar appears with the first call and ends with the last one; the next call begins another.
    """

    def __init__(self, unit: str = "tokens"):
        self.unit, self.bars, self.task = unit, _bars(), TaskID(0)
        self.started: float | None = None
        self.next_line = FIRST_LINE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, done: int, total: int, label: str) -> None:
        if self.started is None:
            self._begin(total)
        elapsed = time.monotonic() - (self.started or 0)
        rate = f"{done / max(elapsed, 1e-9):,.0f} {self.unit}/s"
        self.bars.update(self.task, completed=done, total=total, description=label, rate=rate)
        if self.bars.disable:
            self._line(done, total, f"{label}: {done:,} of {total:,} {self.unit}, {rate}", elapsed)
        if done >= total:
            self.bars.stop()
            self.started = None

    def _begin(self, total: int) -> None:
        self.bars, self.next_line, self.started = _bars(), FIRST_LINE, time.monotonic()
        self.task = self.bars.add_task("", total=total, rate="")
        self.bars.start()

    def _line(self, done: int, total: int, text: str, elapsed: float) -> None:
        if not speaks() or elapsed < self.next_line:
            return
        self.next_line = elapsed + NEXT_LINE
        left = elapsed * (total - done) / max(done, 1)
        print(f"{text}, {left:.0f} s left", file=sys.stderr, flush=True)


class TrainingProgress(Progress):
    """The same for the events of `finetune`: a bar a stage."""

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] == "writing":
            self._say(f"{event['stage']}: the teacher writes {event['tokens']:,} tokens …")
        if event["event"] == "damaged":
            self._say(f"{event['problem']}; going on from the one before")
        if event["event"] == "skipped":
            self._say(f"skipped: {event['problem']}")
        if event["event"] == "graph" and "eager" in event:
            self._say(f"{event['stage']}: without a CUDA graph, {event['eager']}")
        if event["event"] == "memory":
            size = event["micro_batch"]
            self._say(
                f"{event['stage']}: out of memory; from here on {size} sequences at a time, the global batch stays"
            )
        if event["event"] == "step":
            label = f"{event['stage']}, loss {event['metrics']['loss']:.4f}"
            self(event["tokens"], event["tokens"] // event["step"] * event["steps"], label)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Says `what` while work of unknown length goes on."""
    console = Console(stderr=True)
    if not speaks():
        yield
    elif console.is_terminal:
        with console.status(f"{what} …"):
            yield
    else:
        print(f"{what} …", file=sys.stderr, flush=True)
        yield
