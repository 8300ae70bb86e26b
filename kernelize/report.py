"""A report from evaluation rows: one self-contained HTML page, the same as Markdown, and its pictures as PNG.

A picture is one function from rows to a matplotlib figure, or None where its rows are missing; it is added to
PICTURES. Pictures are drawn in placeholder colours, which the page replaces by its light or dark theme; lines differ
by marker and dash too and carry their model's name, so that nothing depends on colour.
"""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .evaluate import Row, data_size, load_rows, metric_of, save_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

BENCH = "bench"  # the suite of timings of one sequence; batches have suites of their own
LEAST_SHOWN = 1e-6  # nats a token: the top of a picture in which all is zero
AUDIT = "audit"  # the suite whose models are parts of one
SOURCES = ("window", "sinks", "slots", "memory")  # of an audit's rows mass_SOURCE and, by distance, mass_SOURCE_at
MASS = {f"mass_{source}{at}" for source in SOURCES for at in ("", "_at")}
INK, GRID, PAPER = "#101112", "#c0c1c2", "#fdfeff"  # each occurs once in the theme, so that it can be replaced
# Okabe & Ito's palette, safe for colour-blind readers, darkened for white paper and lightened for black.
SERIES = {"#0a5f9e": "#6db8ee", "#b8470b": "#f0965c", "#0b7a57": "#4fc9a0", "#8e3f75": "#dd9fc6",
          "#6b5d00": "#d6c84a", "#4a4b4c": "#b9babb"}  # fmt: skip
MARKERS, DASHES = "os^DvP", ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1)), (0, (8, 2)))
DARK = {INK: "#e8eaed", GRID: "#45484c", PAPER: "#16181b", **SERIES}


# --- rows as a table ------------------------------------------------------------------------------------------


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
    before, curves = "", _curves(rows, "ppl_at")
    for (suite, metric, length, depth), found in cells.items():
        if before and suite != before:
            table.add_section()
        if metric == "ppl_at" and curves:
            first, last, shapes = curves
            span = f"{_length(first)}–{_length(last)}"
            table.add_row(suite if suite != before else "", metric, span, "", *(shapes.get(m, "–") for m in models))
            before, curves = suite, None
        values = [Text(found[m].show(full), styles[found[m].verdict]) if m in found else Text("–") for m in models]
        table.add_row(suite if suite != before else "", metric, _length(length), _depth(depth), *values)
        before = suite
    return table


def _curves(rows: Sequence[Row], metric: str) -> tuple[int, int, dict[str, str]] | None:
    """(first length, last length, model → sparkline) of a metric by length, one scale for all; None for one point."""
    series = {model: points for model, points in _series(rows, metric).items() if len(points) > 1}
    if not series:
        return None
    values, lengths = ([f(row) for points in series.values() for row in points]
                       for f in (lambda row: row.value, lambda row: row.length or 0))  # fmt: skip
    low, high = min(values), max(values)
    shapes = {m: "".join(_spark(row.value, low, high) for row in points) for m, points in series.items()}
    return min(lengths), max(lengths), shapes


SPARKS = "▁▂▃▄▅▆▇█"


def _spark(value: float, low: float, high: float) -> str:
    """A bar as high as `value` stands between `low` and `high` on a log scale; all of them positive."""
    place = math.log(value / low) / math.log(high / low) if high > low else 0.0
    return SPARKS[round(place * (len(SPARKS) - 1))]


def _length(length: float | None) -> str:
    """512, 4k, 1.5k, 1M: powers of 1024."""
    if length is None:
        return ""
    for unit, factor in (("M", 1024**2), ("k", 1024)):
        if length >= factor:
            return f"{length / factor:.3g}{unit}"
    return f"{length:.0f}"


def _depth(depth: float | None) -> str:
    return "" if depth is None else f"{depth:.0%}"


# --- pictures -------------------------------------------------------------------------------------------------


def _figure(width: float = 7.6, height: float = 4.2, rows: int = 1, columns: int = 1):
    """A figure and its axes, row by row, in placeholder colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _theme() -> Any:
    plain = {f"axes.spines.{side}": False for side in ("top", "right")}
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    return plain | ink | {"svg.fonttype": "none", "svg.hashsalt": "kernelize", "font.size": 10, "grid.color": GRID,
                          "axes.facecolor": PAPER, "axes.titlesize": 11, "axes.titlelocation": "left",
                          "font.family": "DejaVu Sans"}  # fmt: skip


def _series(rows: Sequence[Row], metric: str) -> dict[str, list[Row]]:
    """model → its rows of the metric by length, in the order of the models in all rows (so a style stays a model's).

    The parts of an audited model are no models.
    """
    rows = [row for row in rows if row.suite != AUDIT]
    models = dict.fromkeys(row.model for row in rows)
    found = {m: [row for row in rows if row.model == m and row.metric == metric and row.length] for m in models}
    return {model: sorted(points, key=lambda row: row.length or 0) for model, points in found.items()}


def _style(index: int) -> dict[str, Any]:
    color = list(SERIES)[index % len(SERIES)]
    return {"color": color, "marker": MARKERS[index % 6], "linestyle": DASHES[index % 6], "markersize": 5}


def _lines(axes: Axes, series: Mapping[str, list[Row]], *, log_y: bool) -> dict[str, tuple[float, float, str]]:
    """A line a model over the length, with its interval as a band. Returns where each ends: model → (x, y, colour)."""
    ends = {}
    for index, (model, rows) in enumerate(series.items()):
        if not rows:
            continue
        x, y = [float(row.length or 0) for row in rows], [row.value for row in rows]
        axes.plot(x, y, label=model, linewidth=1.8, **_style(index))
        band = [(at, r.low, r.high) for at, r in zip(x, rows, strict=True) if r.low is not None and r.high is not None]
        if band:
            inside, low, high = zip(*band, strict=True)
            axes.fill_between(inside, low, high, color=_style(index)["color"], alpha=0.12, linewidth=0)
        ends[model] = (x[-1], y[-1], _style(index)["color"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log" if log_y else "linear")
    axes.grid(True, linewidth=0.6)
    return ends


def _name_lines(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Writes each model's name at the end of its line, moved apart so that no two names overlap."""
    axes.figure.canvas.draw()
    pixel = {model: axes.transData.transform((x, y))[1] for model, (x, y, _) in ends.items()}
    gap, last = 14 * axes.figure.dpi / 72, float("-inf")
    for model in sorted(pixel, key=pixel.__getitem__):
        place = max(pixel[model], last + gap)
        last = place
        x, y, color = ends[model]
        points = (place - pixel[model]) * 72 / axes.figure.dpi
        axes.annotate(model, (x, y), (9, points), textcoords="offset points", va="center", color=color,
                      annotation_clip=False, fontweight="bold", fontsize=9)  # fmt: skip


def _length_axis(axes: Axes, ticks: Sequence[float], label: str) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xticks(list(ticks), [_length(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def perplexity_by_position(rows: Sequence[Row]) -> Figure | None:
    """Perplexity of single buckets of positions, a line a model. Flat or falling is good; rising means forgetting."""
    return _by_position(rows, "ppl_at", "perplexity (log scale)", log_y=True)


def kl_by_position(rows: Sequence[Row]) -> Figure | None:
    """How far a model's next-token distribution is from the teacher's, by position. Zero is the teacher itself."""
    return _by_position(rows, "kl_at", "KL from the teacher, nats a token", log_y=False)


def _by_position(rows: Sequence[Row], metric: str, label: str, *, log_y: bool) -> Figure | None:
    series = _series(rows, metric)
    if not any(series.values()):
        return None
    figure, (axes,) = _figure()
    ends = _lines(axes, series, log_y=log_y)
    values = [row.value for points in series.values() for row in points]
    axes.set_ylim(min(values) * 0.93 if log_y else 0, max(*values, LEAST_SHOWN) * 1.07)  # rounding may be below 0
    if log_y:
        _plain_log_ticks(axes)
    edges = sorted({row.length for points in series.values() for row in points if row.length})
    _length_axis(axes, edges, "end of the bucket of positions, tokens (the bucket begins where the last one ends)")
    axes.set_ylabel(label)
    _mark_trained(axes, rows, edges[-1])
    _name_lines(axes, ends)
    return figure


def _plain_log_ticks(axes: Axes, *, vertical: bool = True) -> None:
    """Plain numbers on a log scale; few of them where it spans decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis, (low, high) = (axes.yaxis, axes.get_ylim()) if vertical else (axes.xaxis, axes.get_xlim())
    wide = high > 100 * low
    axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 1.5, 2, 3, 5, 7), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _mark_trained(axes: Axes, rows: Sequence[Row], top: float) -> None:
    """A vertical line where the positions end that a model was trained for, if the picture reaches beyond."""
    limits = sorted({row.value for row in rows if row.metric == "trained_length" and row.value < top})
    if limits:
        low, high = axes.get_ylim()
        room = (high / low) ** 0.08 if axes.get_yscale() == "log" else 1.08  # for the label above the lines
        axes.set_ylim(low, high * room)
    for limit in limits:
        axes.axvline(limit, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate("trained positions end", (limit, 1), (-4, -2), xycoords=("data", "axes fraction"),
                      textcoords="offset points", va="top", ha="right", fontsize=8)  # fmt: skip


def passkey_map(rows: Sequence[Row]) -> Figure | None:
    """Share of passkeys found, by depth in the prompt and length of the prompt; one map a model."""
    cells = [row for row in rows if row.metric == "passkey" and row.depth is not None]
    if not cells:
        return None
    models = list(dict.fromkeys(row.model for row in cells))
    lengths, depths = (sorted({getattr(row, key) for row in cells}) for key in ("length", "depth"))
    columns = min(len(models), 2 if len(lengths) > 5 or len(models) == 4 else 3)
    lines = -(-len(models) // columns)
    width, height = 0.5 + max(0.62 * len(lengths), 2.2), 0.9 + 0.36 * len(depths)
    figure, many = _figure(0.5 + width * columns, height * lines, lines, columns)
    for axes, model in zip(many, models, strict=False):
        _heat(axes, [row for row in cells if row.model == model], lengths, depths)
        axes.set_title(model)
        axes.set_xlabel("prompt, tokens")
    for axes in many[::columns]:
        axes.set_ylabel("depth of the key")
    for axes in many[len(models) :]:
        axes.set_visible(False)
    return figure


def _heat(axes: Axes, cells: Sequence[Row], lengths: Sequence[int], depths: Sequence[float]) -> None:
    from matplotlib import colormaps

    for row in cells:
        x, y = lengths.index(row.length or 0), depths.index(row.depth or 0.0)
        shade = colormaps["cividis"](row.value)
        axes.add_patch(_rectangle(x, y, shade))
        dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), shade[:3], strict=True)) < 0.5
        axes.text(x, y, f"{row.value:.2f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [_length(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [_depth(depth) for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _rectangle(x: int, y: int, shade):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor=PAPER, linewidth=1.5)


def memory_by_length(rows: Sequence[Row]) -> Figure | None:
    """Bytes of the decoding state after so many tokens, a sequence, as measured; and the length from which a constant
    state is smaller than the growing one."""
    from matplotlib.ticker import FuncFormatter

    series = _series(rows, "cache_bytes")
    if not any(series.values()):
        return None
    figure, (axes,) = _figure()
    ends = _lines(axes, series, log_y=True)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: data_size(value)))
    lengths = sorted({row.length for points in series.values() for row in points if row.length})
    _length_axis(axes, lengths, "tokens read")
    axes.set_ylabel("bytes (log scale)")
    _mark_break_even(axes, series)
    _name_lines(axes, ends)
    return figure


def break_even(growing: Sequence[Row], constant: Sequence[Row]) -> float | None:
    """The length in tokens at which a cache that grows in proportion to the length reaches the other's size."""
    if not growing or not constant or growing[-1].value <= growing[0].value:
        return None
    a_token = growing[-1].value / (growing[-1].length or 1)
    return constant[-1].value / a_token


def _mark_break_even(axes: Axes, series: Mapping[str, list[Row]]) -> None:
    flat = [s for s in series.values() if len(s) > 1 and s[-1].value <= s[0].value * 1.01]
    steep = [s for s in series.values() if len(s) > 1 and s[-1].value > s[0].value * 1.01]
    if not steep or not flat:
        return
    first, places = steep[0][0], {x: rows[-1].value for rows in flat for x in [break_even(steep[0], rows)] if x}
    begin = float(first.length or 1)
    left = min([*places, begin])
    axes.plot([left, begin], [first.value * left / begin, first.value], color=GRID, zorder=1)
    axes.set_xlim(left=left / 5)
    for x, y in places.items():
        axes.plot([x, max(x, begin)], [y, y], color=GRID, zorder=1)
        axes.plot([x], [y], marker="X", markersize=9, color=INK, linestyle="none", zorder=5)
        axes.annotate(f"break-even:\n{x:,.0f} tokens", (x, y), (-8, 2), textcoords="offset points", ha="right",
                      fontsize=9)  # fmt: skip


def quality_by_state(rows: Sequence[Row]) -> Figure | None:
    """Perplexity of whole pieces against the bytes of state that it takes: left and low is good. The grey line joins
    the models that no other one beats in both."""
    from matplotlib.ticker import FuncFormatter

    ppl, state = (_series(rows, metric) for metric in ("ppl", "cache_bytes"))
    both = {m: (state[m][-1].value, ppl[m][-1].value) for m in ppl if ppl[m] and state[m]}
    if len(both) < 2:
        return None
    figure, (axes,) = _figure()
    for index, (x, y) in enumerate(both.values()):
        axes.plot([x], [y], **_style(index) | {"linestyle": "none", "markersize": 8})
    front = _pareto(both.values())
    axes.step(*zip(*front, strict=True), where="post", color=GRID, linewidth=1.2, zorder=0)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.25, y=0.15)
    axes.grid(True, linewidth=0.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: data_size(value)))
    length = next(points[-1].length for points in ppl.values() if points)
    axes.set(ylabel=f"perplexity, pieces of {_length(length)} tokens",
             xlabel="bytes of decoding state, one sequence (log scale)")  # fmt: skip
    _name_lines(axes, {m: (*place, _style(i)["color"]) for i, (m, place) in enumerate(both.items())})
    return figure


def _pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, loss) pairs those that no other one beats or equals in both, by cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def latency_by_length(rows: Sequence[Row]) -> Figure | None:
    """Time to read a text and time to write the next token after it, by the length of the text; and the length from
    which a model is faster than the teacher."""
    panels = {"prefill_ms": "reading the whole text", "decode_ms": "writing a token after it"}
    rows = [row for row in rows if row.suite == BENCH or row.metric not in panels]
    found = {metric: _series(rows, metric) for metric in panels}
    found = {metric: series for metric, series in found.items() if any(len(points) > 1 for points in series.values())}
    if not found:
        return None
    figure, many = _figure(5.4 * len(found), 4.2, 1, len(found))
    for axes, (metric, series) in zip(many, found.items(), strict=True):
        ends = _lines(axes, series, log_y=True)
        _plain_log_ticks(axes)
        _length_axis(axes, sorted({row.length or 0 for points in series.values() for row in points}), "tokens read")
        axes.set(title=panels[metric], ylabel="milliseconds (log scale)")
        _mark_crossings(axes, series)
        _name_lines(axes, ends)
    return figure


def crossing(slow: Sequence[Row], fast: Sequence[Row]) -> tuple[float, float] | None:
    """(length, value) where the curve `slow` first rises above `fast`, between two lengths that both have; straight
    lines in log scales. None where it is above from the start, or never."""
    theirs = {row.length: row.value for row in fast}
    points = [(row.length, row.value, theirs[row.length]) for row in slow if row.length and row.length in theirs]
    for (x0, a0, b0), (x1, a1, b1) in itertools.pairwise(points):
        if a0 <= b0 and a1 > b1:
            before, after = math.log(b0 / a0), math.log(a1 / b1)
            part = before / (before + after)
            return x0 * (x1 / x0) ** part, a0 * (a1 / a0) ** part
    return None


def _mark_crossings(axes: Axes, series: Mapping[str, list[Row]]) -> None:
    """Where the teacher (or else the first model) becomes slower than another one."""
    slow = series.get("teacher") or next(points for points in series.values() if points)
    for points in series.values():
        place = crossing(slow, points)
        if place:
            axes.plot(*place, marker="X", markersize=9, color=INK, linestyle="none", zorder=5)
            axes.annotate(f"break-even:\n{place[0]:,.0f} tokens", place, (-8, 4), textcoords="offset points",
                          ha="right", fontsize=9)  # fmt: skip


def audit_bars(rows: Sequence[Row]) -> Figure | None:
    """What is left of a model without one of its parts, or with one alone: perplexity, distance from the teacher, and
    passkeys found. A part that can be taken away at no cost is not used."""
    audited = [row for row in rows if row.suite == AUDIT and row.metric not in MASS]
    panels = {"ppl": "perplexity (log scale)", "kl": "KL from the teacher, nats", "passkey": "passkeys found"}
    present = [metric for metric in panels if any(row.metric == metric for row in audited)]
    if not present:
        return None
    names = list(dict.fromkeys(row.model for row in audited))
    figure, many = _figure(3.4 * len(present) + 1.6, 1.2 + 0.34 * len(names), 1, len(present))
    for axes, metric in zip(many, present, strict=True):
        _bars(axes, [row for row in audited if row.metric == metric], names, axes is many[0])
        axes.set_xlabel(panels[metric])
    return figure


def _bars(axes: Axes, rows: Sequence[Row], names: Sequence[str], labelled: bool) -> None:
    """A bar a model with its value written at its end."""
    log = rows[0].metric == "ppl"
    start = 0.9 * min(row.value for row in rows) if log else 0.0
    for row in rows:
        y, text = names.index(row.model), metric_of(row.metric).show(row.value)
        axes.barh(y, row.value - start, left=start, height=0.62, color=next(iter(SERIES)), alpha=0.75)
        axes.annotate(text, (row.value, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xscale("log" if log else "linear")
    axes.set_yticks(range(len(names)), names if labelled else [""] * len(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    top = max(row.value for row in rows) or 1.0
    axes.set_xlim(start, top * (top / start) ** 0.35 if log else top * 1.3)
    axes.tick_params(left=False)
    axes.minorticks_off()
    if log:
        _plain_log_ticks(axes, vertical=False)


def attention_mass(rows: Sequence[Row]) -> Figure | None:
    """Where the attention of converted layers goes: the share of the normaliser of every source, by distance where
    the source has one, mean over layers. The memory is a sum, so nothing in it has a distance of its own."""
    at = [row for row in rows if row.suite == AUDIT and row.metric in MASS]
    models = list(dict.fromkeys(row.model for row in at))
    if not models:
        return None
    edges = sorted({row.length for row in at if row.length})
    figure, many = _figure(7.6, 3.4 * len(models), len(models), 1)
    for axes, model in zip(many, models, strict=True):
        _stacks(axes, {(row.metric, row.length): row.value for row in at if row.model == model}, edges)
        axes.set_title(model)
    return figure


HATCHES = ("", "//", "..", "xx")


def _stacks(axes: Axes, mass: Mapping[tuple[str, int | None], float], edges: Sequence[int]) -> None:
    """A bar a distance, cut into sources; the memory, which has no distance, beside them."""
    tops = [0.0] * (len(edges) + 1)
    for i, source in enumerate(SOURCES):
        by_distance = [mass.get((f"mass_{source}_at", edge), 0.0) for edge in edges]
        heights = [*by_distance, mass.get(("mass_memory", None), 0.0) if source == "memory" else 0.0]
        axes.bar(range(len(heights)), heights, 0.7, tops, color=list(SERIES)[i], alpha=0.75, hatch=HATCHES[i],
                 edgecolor=PAPER, label=f"{source} {mass.get((f'mass_{source}', None), 0.0):.1%}")  # fmt: skip
        tops = [a + b for a, b in zip(tops, heights, strict=True)]
    for x, top in enumerate(tops):
        axes.annotate(f"{top:.1%}", (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    spans = [f"<{_length(edge)}" if edge < 2**31 else f"≥{_length(edges[-2])}" for edge in edges]
    axes.set_xticks(range(len(tops)), [*spans, "memory"])
    axes.set(ylabel="share of the normaliser", xlabel="distance, tokens (a bar begins where the last one ends)")
    axes.set_ylim(0, max(tops) * 1.15)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def recall_by_task(rows: Sequence[Row]) -> Figure | None:
    """Every recall task at the longest length measured, with intervals."""
    cells = [row for row in rows if row.suite == "recall" and row.depth is None]
    tasks = list(dict.fromkeys(row.metric for row in cells))
    if len(tasks) < 2:
        return None
    top, models = max(row.length or 0 for row in cells), list(dict.fromkeys(row.model for row in rows))
    figure, (axes,) = _figure(7.6, 1.2 + 0.24 * len(tasks) * (len(models) + 0.6))
    for row in (row for row in cells if row.length == top):
        index = models.index(row.model)
        y = tasks.index(row.metric) + (index - (len(models) - 1) / 2) * 0.7 / len(models)
        style = _style(index) | {"linestyle": "none"}
        axes.errorbar([row.value], [y], xerr=[[row.value - (row.low or 0)], [(row.high or 1) - row.value]],
                      linewidth=1.2, label=row.model if row.metric == tasks[0] else None, **style)  # fmt: skip
    axes.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    axes.set_ylim(len(tasks) - 0.4, -0.6)
    axes.set(xlim=(-0.02, 1.02), xlabel=f"share found in {_length(top)} tokens")
    axes.grid(True, axis="x", linewidth=0.6)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], Figure | None]]] = {
    "perplexity": ("Perplexity by position", perplexity_by_position),
    "passkey": ("Passkeys found, by depth and length", passkey_map),
    "memory": ("Memory of the decoding state, one sequence", memory_by_length),
    "kl": ("Distance from the teacher, by position", kl_by_position),
    "quality": ("Quality against state", quality_by_state),
    "latency": ("Time by length", latency_by_length),
    "recall": ("Recall, task by task", recall_by_task),
    "audit": ("What each part is worth", audit_bars),
    "mass": ("Where attention goes", attention_mass),
}


# --- the report -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def draw(rows: Sequence[Row]) -> list[Picture]:
    """All pictures for which there are rows."""
    import matplotlib

    with matplotlib.rc_context(_theme()):
        figures = {name: picture(rows) for name, (_, picture) in PICTURES.items()}
        return [_picture(name, figure) for name, figure in figures.items() if figure is not None]


def _picture(name: str, figure: Figure) -> Picture:
    title, draw = PICTURES[name]
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)  # the page has it as a heading already
    figure.savefig(png, format="png", dpi=160)
    caption = " ".join((draw.__doc__ or "").split())
    return Picture(name, title, caption, _themed(svg.getvalue(), name), png.getvalue())


def _themed(svg: str, name: str) -> str:
    """The <svg> element alone, its ids made unique, its placeholder colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color in DARK:
        svg = svg.replace(color, f"var({_variable(color)})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _variable(color: str) -> str:
    return f"--c{color[1:]}"


def write_report(
    rows: Sequence[Row] | str | Path, output: str | Path, *, teacher: str | None = None, extra: Mapping | None = None
) -> Path:
    """Writes index.html (self-contained), report.md, one PNG a picture and rows.json into the folder `output`.

    rows: rows, or a file that `save_rows` wrote. extra: further sections before the table, heading → a paragraph, or
    heading → a mapping, shown as a list of names and values. Returns the path of index.html.
    """
    rows = load_rows(rows) if isinstance(rows, (str, Path)) else list(rows)
    if not rows:
        raise InputError("there are no rows to report")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output={str(output)!r} is a file, not a folder")
    compared = [compare(part, _teacher_of(part, rows, teacher)) for part in tables(rows)]
    pictures = draw(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
    save_rows(rows, folder / "rows.json")
    (folder / "report.md").write_text(_markdown(compared, pictures, extra or {}), "utf-8")
    page = folder / "index.html"
    page.write_text(_page(compared, pictures, extra or {}), "utf-8")
    return page


def _teacher_of(part: Sequence[Row], rows: Sequence[Row], teacher: str | None) -> str | None:
    """`teacher` where this part of the rows has it; InputError where none has."""
    if teacher in {row.model for row in rows} - {row.model for row in part}:
        return None
    return teacher


LEGEND = "▲ better and ▼ worse than the teacher beyond the intervals, ≈ inside them; brackets: 95 % intervals."


def _table_rows(models: Sequence[str], cells: Mapping[Key, Mapping[str, Cell]]):
    for (suite, metric, length, depth), found in cells.items():
        head = (suite, metric, _length(length), _depth(depth))
        yield head, [found.get(model) for model in models]


Compared = Sequence[tuple[list[str], dict[Key, dict[str, Cell]]]]


def _markdown(compared: Compared, pictures: Sequence[Picture], extra: Mapping) -> str:
    parts = ["# Evaluation", " · ".join(f"**{model}**" for model in compared[0][0])]
    parts += [
        f"## {picture.title}\n{picture.caption}\n\n![{picture.title}]({picture.name}.png)" for picture in pictures
    ]
    for heading, content in extra.items():
        body = content if isinstance(content, str) else "\n".join(f"- {k}: {v}" for k, v in content.items())
        parts.append(f"## {heading}\n{body}")
    return "\n\n".join([*parts, f"## All numbers\n{LEGEND}", *(_markdown_table(*one) for one in compared)]) + "\n"


def _markdown_table(models: Sequence[str], cells: Mapping[Key, Mapping[str, Cell]]) -> str:
    head = ["suite", "metric", "length", "depth", *models]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    lines += [
        [*names, *(cell.show() if cell else "–" for cell in values)] for names, values in _table_rows(models, cells)
    ]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _page(compared: Compared, pictures: Sequence[Picture], extra: Mapping) -> str:
    models = compared[0][0]
    sections = [f"<figure><h2>{html.escape(p.title)}</h2><div class='scroll'>{p.svg}</div>"
                f"<figcaption>{html.escape(p.caption)}</figcaption></figure>" for p in pictures]  # fmt: skip
    sections += [
        f"<section><h2>{html.escape(str(h))}</h2>{_content(content)}</section>" for h, content in extra.items()
    ]
    shown = "".join(_html_table(*one) for one in compared)
    sections.append(f"<section><h2>All numbers</h2><p>{LEGEND}</p>{shown}</section>")
    names = " · ".join(f"<b>{html.escape(model)}</b>" for model in models)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>Evaluation: {html.escape(', '.join(models))}</title><style>{_css()}</style></head>\n"
        f"<body><main><h1>Evaluation</h1><p>{names}</p>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _content(content: str | Mapping) -> str:
    if isinstance(content, str):
        return "".join(f"<p>{html.escape(part)}</p>" for part in content.split("\n\n"))
    items = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in content.items())
    return f"<dl>{items}</dl>"


def _html_table(models: Sequence[str], cells: Mapping[Key, Mapping[str, Cell]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("suite", "metric", "length", "depth", *models))
    body = []
    for names, values in _table_rows(models, cells):
        title = html.escape(metric_of(names[1]).title)
        labels = "".join(f"<td title='{title}'>{html.escape(name)}</td>" for name in names)
        body.append(f"<tr>{labels}{''.join(map(_html_cell, values))}</tr>")
    return (f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>")  # fmt: skip


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td>–</td>"
    mark = f" <span class='{cell.verdict or 'none'}'>{cell.change} {cell.MARKS[cell.verdict]}</span>" * bool(
        cell.change
    )
    return f"<td>{cell.text}{mark}<br><small>{cell.interval}</small></td>"


def _css() -> str:
    light = ";".join(f"{_variable(color)}:{color}" for color in DARK)
    dark = ";".join(f"{_variable(color)}:{other}" for color, other in DARK.items())
    ink, paper, grid = (f"var({_variable(color)})" for color in (INK, PAPER, GRID))
    worse, better = (f"var({_variable(list(SERIES)[i])})" for i in (1, 2))
    return f"""
:root{{color-scheme:light dark;{light}}}
@media(prefers-color-scheme:dark){{:root{{{dark}}}}}
body{{margin:0;background:{paper};color:{ink};font:16px/1.5 system-ui,sans-serif}}
main{{max-width:64rem;margin:auto;padding:1.5rem}}
h1{{margin:.2em 0}} h2{{font-size:1.15rem;margin:1.6em 0 .3em}}
figure{{margin:0}} figcaption{{max-width:46rem;font-size:.9rem}}
svg{{max-width:100%;height:auto}} .scroll{{overflow-x:auto}}
svg text{{font-family:'DejaVu Sans',Verdana,sans-serif !important}}
table{{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.25em .7em;text-align:right;border-bottom:1px solid {grid};white-space:nowrap;vertical-align:top}}
th:nth-child(-n+2),td:nth-child(-n+2){{text-align:left}}
thead th{{border-bottom:2px solid {ink}}}
small{{opacity:.75}} .worse{{color:{worse};font-weight:bold}} .better{{color:{better};font-weight:bold}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:.2em 1em}} dd{{margin:0}}
"""


def load_all(paths: Sequence[str | Path]) -> list[Row]:
    """The rows of several results files; of the same measurement in two files, the later file's."""
    if not paths:
        raise InputError("no results file given")
    rows = [row for path in paths for row in load_rows(path)]
    latest = {json.dumps([row.model, row.suite, row.metric, row.length, row.depth]): row for row in rows}
    return list(latest.values())
