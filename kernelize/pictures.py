"""Pictures of rows.

A picture is one function from rows to a matplotlib figure, or None where its rows are missing; it is added to
PICTURES. Pictures are drawn in placeholder colours, which the page replaces by its light or dark theme; lines differ
by marker and dash too and carry their model's name, so that nothing depends on colour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .comparison import AUDIT, depth_text, length_text, series_of, suites_of
from .rows import Row, metric_of
from .units import data_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BENCH = "bench"  # the suite of timings of one sequence; batches have suites of their own
LEAST_SHOWN = 1e-6  # nats a token: the top of a picture in which all is zero
SOURCES = ("window", "sinks", "slots", "memory")  # of an audit's rows mass_SOURCE and, by distance, mass_SOURCE_at
MASS = {f"mass_{source}{at}" for source in SOURCES for at in ("", "_at")}
INK, GRID, PAPER = "#101112", "#c0c1c2", "#fdfeff"  # each occurs once in the theme, so that it can be replaced
# Okabe & Ito's palette, safe for colour-blind readers, darkened for white paper and lightened for black.
SERIES = {"#0a5f9e": "#6db8ee", "#b8470b": "#f0965c", "#0b7a57": "#4fc9a0", "#8e3f75": "#dd9fc6",
          "#6b5d00": "#d6c84a", "#4a4b4c": "#b9babb"}  # fmt: skip
MARKERS, DASHES = "os^DvP", ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1)), (0, (8, 2)))
DARK = {INK: "#e8eaed", GRID: "#45484c", PAPER: "#16181b", **SERIES}


def _figure(width: float = 7.6, height: float = 4.2, rows: int = 1, columns: int = 1):
    """A figure and its axes, row by row, in placeholder colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def theme() -> Any:
    plain = {f"axes.spines.{side}": False for side in ("top", "right")}
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    return plain | ink | {"svg.fonttype": "none", "svg.hashsalt": "kernelize", "font.size": 10, "grid.color": GRID,
                          "axes.facecolor": PAPER, "axes.titlesize": 11, "axes.titlelocation": "left",
                          "font.family": "DejaVu Sans"}  # fmt: skip


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

    axes.set_xticks(list(ticks), [length_text(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def perplexity_by_position(rows: Sequence[Row]) -> Figure | None:
    """Perplexity of single buckets of positions, a line a model. Flat or falling is good; rising means forgetting."""
    return _by_position(rows, "ppl_at", "perplexity (log scale)", log_y=True)


def kl_by_position(rows: Sequence[Row]) -> Figure | None:
    """How far a model's next-token distribution is from the teacher's, by position. Zero is the teacher itself."""
    return _by_position(rows, "kl_at", "KL from the teacher, nats a token", log_y=False)


def _by_position(rows: Sequence[Row], metric: str, label: str, *, log_y: bool) -> Figure | None:
    """A panel a suite (books, code), one above the other."""
    suites = suites_of(rows, metric)
    if not suites:
        return None
    figure, many = _figure(7.6, 4.2 * len(suites), len(suites))
    for axes, suite in zip(many, suites, strict=True):
        _position_panel(axes, rows, series_of(rows, metric, suite), log_y)
        axes.set_ylabel(label)
        if len(suites) > 1:
            axes.set_title(suite)
    return figure


def _position_panel(axes: Axes, rows: Sequence[Row], series: Mapping[str, list[Row]], log_y: bool) -> None:
    ends = _lines(axes, series, log_y=log_y)
    values = [row.value for points in series.values() for row in points]
    axes.set_ylim(min(values) * 0.93 if log_y else 0, max(*values, LEAST_SHOWN) * 1.07)  # rounding may be below 0
    if log_y:
        _plain_log_ticks(axes)
    edges = sorted({row.length for points in series.values() for row in points if row.length})
    _length_axis(axes, edges, "end of the bucket of positions, tokens (the bucket begins where the last one ends)")
    _mark_trained(axes, rows, edges[-1])
    _name_lines(axes, ends)


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
    return _map(rows, "passkey")


def needle_map(rows: Sequence[Row]) -> Figure | None:
    """Share of single needles found, a number that belongs to a name, by depth and length; one map a model."""
    return _map(rows, "needle_single")


def _map(rows: Sequence[Row], metric: str) -> Figure | None:
    cells = [row for row in rows if row.metric == metric and row.depth is not None]
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
    axes.set_xticks(range(len(lengths)), [length_text(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [depth_text(depth) for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _rectangle(x: int, y: int, shade):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor=PAPER, linewidth=1.5)


def memory_by_length(rows: Sequence[Row]) -> Figure | None:
    """Bytes of the decoding state after so many tokens, a sequence, as measured; and the length from which a constant
    state is smaller than the growing one."""
    from matplotlib.ticker import FuncFormatter

    series = series_of(rows, "cache_bytes")
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
        axes.annotate(f"break-even: {x:,.0f} tokens", (x, y), (-8, 0), textcoords="offset points", ha="right",
                      va="center", fontsize=9)  # fmt: skip


def quality_by_state(rows: Sequence[Row]) -> Figure | None:
    """Perplexity of whole pieces against the bytes of state that it takes: left and low is good. The grey line joins
    the models that no other one beats in both."""
    from matplotlib.ticker import FuncFormatter

    ppl, state = (series_of(rows, metric) for metric in ("ppl", "cache_bytes"))
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
    axes.set(ylabel=f"perplexity, pieces of {length_text(length)} tokens",
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
    found = {metric: series_of(rows, metric) for metric in panels}
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
    spans = [f"<{length_text(edge)}" if edge < 2**31 else f"≥{length_text(edges[-2])}" for edge in edges]
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
    axes.set(xlim=(-0.02, 1.02), xlabel=f"share found in {length_text(top)} tokens")
    axes.grid(True, axis="x", linewidth=0.6)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], Figure | None]]] = {
    "perplexity": ("Perplexity by position", perplexity_by_position),
    "passkey": ("Passkeys found, by depth and length", passkey_map),
    "needle": ("Needles found, by depth and length", needle_map),
    "memory": ("Memory of the decoding state, one sequence", memory_by_length),
    "kl": ("Distance from the teacher, by position", kl_by_position),
    "quality": ("Quality against state", quality_by_state),
    "latency": ("Time by length", latency_by_length),
    "recall": ("Recall, task by task", recall_by_task),
    "audit": ("What each part is worth", audit_bars),
    "mass": ("Where attention goes", attention_mass),
}
