"""Rows beside the teacher's: which difference counts, and the table of a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import InputError
from .rows import Row, metric_of

if TYPE_CHECKING:
    from rich.table import Table

AUDIT = "audit"  # the suite whose models are parts of one


@dataclass(frozen=True)
class Cell:
    """One model's value beside the teacher's. `verdict`: better, worse, same (inside the intervals) or "" (unknown)."""

    text: str
    interval: str
    change: str
    verdict: str

    MARKS = {"better": "▲", "worse": "▼", "same": "≈", "": ""}

    def show(self, interval: bool = True) -> str:
        parts = (self.text, self.interval if interval else "", self.change, self.MARKS[self.verdict])
        return " ".join(part for part in parts if part)


# The ratio to the teacher on the same pieces has a far narrower interval than either perplexity: it decides.
PAIRED = {"ppl": "ppl_ratio", "ppl_at": "ppl_ratio_at"}
Key = tuple[str, str, int | None, float | None]


def compare(rows: Sequence[Row], teacher: str | None = None) -> tuple[list[str], dict[Key, dict[str, Cell]]]:
    """(models, (suite, metric, length, depth) → model → cell); the teacher comes first.

    teacher: by default the model named "teacher", if there is one. A difference counts as one (▲ better, ▼ worse) where
    one value lies outside the other's interval; for perplexity, where the ratio on the same pieces excludes 1.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    if teacher is not None and teacher not in models:
        raise InputError(f"teacher={teacher!r} has no rows; models with rows: {', '.join(models)}")
    name = teacher or ("teacher" if "teacher" in models else None)
    models.sort(key=lambda model: model != name)
    table: dict[Key, dict[str, Row]] = {}
    for row in sorted(rows, key=_order(rows)):
        table.setdefault((row.suite, row.metric, row.length, row.depth), {})[row.model] = row

    def cell(key: Key, row: Row) -> Cell:
        paired = table.get((key[0], PAIRED.get(key[1], ""), *key[2:]), {}).get(row.model)
        return _cell(row, table[key].get(name or ""), paired if name else None)

    return models, {key: {m: cell(key, row) for m, row in found.items()} for key, found in table.items()}


def _order(rows: Sequence[Row]) -> Callable[[Row], tuple]:
    """Suites and metrics as they first came, then by length and depth."""
    suites, metrics = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("suite", "metric"))
    return lambda row: (
        suites.index(row.suite),
        metrics.index(row.metric),
        row.length or 0,
        -1 if row.depth is None else row.depth,
    )


def _cell(row: Row, teacher: Row | None, paired: Row | None) -> Cell:
    metric = metric_of(row.metric)
    interval = "" if row.low is None or row.high is None else f"[{metric.show(row.low)}, {metric.show(row.high)}]"
    if teacher is None or teacher.model == row.model or not metric.better:
        return Cell(metric.show(row.value), interval, "", "")
    verdict = _beside_one(paired) if paired else _verdict(row, teacher, metric.better)
    return Cell(metric.show(row.value), interval, _change(row, teacher), verdict)


def _beside_one(ratio: Row) -> str:
    """The verdict of a ratio to the teacher's perplexity, measured piece by piece."""
    if _inside(1.0, ratio) or metric_of(ratio.metric).show(ratio.value) == metric_of(ratio.metric).show(1.0):
        return "same"
    return "better" if ratio.value < 1 else "worse"


def _change(row: Row, teacher: Row) -> str:
    """Relative where a ratio means something, absolute for shares."""
    if metric_of(row.metric).better == "lower" and teacher.value > 0 and row.metric != "repetition":
        return f"{round(row.value / teacher.value - 1, 3) + 0.0:+.1%}"  # + 0.0: no "-0.0%"
    return f"{row.value - teacher.value:+.2f}"


def _verdict(row: Row, teacher: Row, better: str) -> str:
    show = metric_of(row.metric).show
    if show(row.value) == show(teacher.value) or (_inside(row.value, teacher) and _inside(teacher.value, row)):
        return "same"
    return "better" if (row.value < teacher.value) == (better == "lower") else "worse"


def _inside(value: float, row: Row) -> bool:
    low, high = (row.value, row.value) if row.low is None or row.high is None else (row.low, row.high)
    return low <= value <= high


def tables(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows as they stand in one table each: those of models, and those of the parts of an audited one."""
    parts = [[row for row in rows if (row.suite == AUDIT) == audited] for audited in (False, True)]
    return [part for part in parts if part]


def rows_table(rows: Sequence[Row], teacher: str | None = None, *, full: bool = False) -> Table:
    """The rows for a terminal, a column a model, differences to the teacher marked: ▲ better, ▼ worse, ≈ the same.

    full: with the intervals, recall at each depth beside the mean over depths, and ratios beside perplexities.
    """
    from rich.table import Table
    from rich.text import Text

    styles = {"better": "green", "worse": "bold red", "same": "dim", "": ""}
    models, cells = compare(rows, teacher)
    if not full:
        means = {key[:3] for key in cells if key[3] is None}
        cells = {key: found for key, found in cells.items()
                 if (key[3] is None or key[:3] not in means) and key[1] not in PAIRED.values()}  # fmt: skip
    table = Table("suite", "metric", title_style="", header_style="bold")
    for name in ("length", "depth", *models):
        table.add_column(name, justify="right")
    before, curves = "", {suite: _curves(rows, "ppl_at", suite) for suite in suites_of(rows, "ppl_at")}
    for (suite, metric, length, depth), found in cells.items():
        if before and suite != before:
            table.add_section()
        if metric == "ppl_at" and (curve := curves.pop(suite, None)):
            first, last, shapes = curve
            span = f"{length_text(first)}–{length_text(last)}"
            table.add_row(suite if suite != before else "", metric, span, "", *(shapes.get(m, "–") for m in models))
            before = suite
        values = [Text(found[m].show(full), styles[found[m].verdict]) if m in found else Text("–") for m in models]
        table.add_row(suite if suite != before else "", metric, length_text(length), depth_text(depth), *values)
        before = suite
    return table


def _curves(rows: Sequence[Row], metric: str, suite: str) -> tuple[int, int, dict[str, str]] | None:
    """(first length, last length, model → sparkline) of a metric by length, one scale for all; None for one point."""
    series = {model: points for model, points in series_of(rows, metric, suite).items() if len(points) > 1}
    if not series:
        return None
    values, lengths = ([f(row) for points in series.values() for row in points]
                       for f in (lambda row: row.value, lambda row: row.length or 0))  # fmt: skip
    low, high = min(values), max(values)
    shapes = {m: "".join(_spark(row.value, low, high) for row in points) for m, points in series.items()}
    return min(lengths), max(lengths), shapes


def suites_of(rows: Sequence[Row], metric: str) -> list[str]:
    """The suites that have a metric, as they first came; audits aside."""
    return list(dict.fromkeys(row.suite for row in rows if row.metric == metric and row.suite != AUDIT))


def series_of(rows: Sequence[Row], metric: str, suite: str | None = None) -> dict[str, list[Row]]:
    """model → its rows of the metric by length, in the order of the models in all rows (so a style stays a model's).

    Those of the first suite that has the metric, if none is named. The parts of an audited model are no models.
    """
    rows = [row for row in rows if row.suite != AUDIT]
    models, of = dict.fromkeys(row.model for row in rows), suite or next(iter(suites_of(rows, metric)), "")
    mine = [row for row in rows if row.metric == metric and row.suite == of and row.length]
    found = {m: [row for row in mine if row.model == m] for m in models}
    return {model: sorted(points, key=lambda row: row.length or 0) for model, points in found.items()}


SPARKS = "▁▂▃▄▅▆▇█"


def _spark(value: float, low: float, high: float) -> str:
    """A bar as high as `value` stands between `low` and `high` on a log scale; all of them positive."""
    place = math.log(value / low) / math.log(high / low) if high > low else 0.0
    return SPARKS[round(place * (len(SPARKS) - 1))]


def length_text(length: float | None) -> str:
    """512, 4k, 1.5k, 1M: powers of 1024."""
    if length is None:
        return ""
    for unit, factor in (("M", 1024**2), ("k", 1024)):
        if length >= factor:
            return f"{length / factor:.3g}{unit}"
    return f"{length:.0f}"


def depth_text(depth: float | None) -> str:
    return "" if depth is None else f"{depth:.0%}"
