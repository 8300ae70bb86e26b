"""What softmax attention does in every layer and head of a model, what each kernel would make of it, and a plan.

`inspect_model` runs texts through the model once; `recommend` turns what it found into a ConversionPlan under a
budget of state bytes, by the measured errors alone.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import InputError
from .files import write_file
from .losses import softmax_weights
from .measure import MapRow, Report, candidates, check_texts, measure_layer, observe, softmax_layers
from .plan import AttentionShape, ConversionPlan
from .runtime.spec import NO_MEMORY, KernelSpec
from .runtime.state import Seen

if TYPE_CHECKING:
    from rich.table import Table

MAPS = (NO_MEMORY, "codebook")
SIZES = (32, 128)
SLOTS = (64, 176, 352)  # what is measured besides, so that a budget can choose between slots and features
LENGTH = 1024  # queries and keys of the attention matrix whose rank is taken
RIDGE = 1e-3  # of the degrees of freedom, relative to the largest eigenvalue


@dataclass(frozen=True)
class HeadRow:
    """One query head on the measured text."""

    layer: int
    head: int
    rank90: int  # singular values of the attention matrix that hold 90 % of its energy (sum of squares)
    rank95: int
    rank99: int
    freedom: float  # Σ λ/(λ + ridge λ₁) over the eigenvalues of A Aᵀ: the features that a kernel needs (2507.03340)
    look_back: float  # tokens, mean age of what is attended to
    far_look_back: float  # tokens, the same for what is outside window and sinks
    window: float  # shares of attention mass
    sinks: float
    elsewhere: float


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found. `layers` are those of the model, `converted` those that can be converted."""

    layers: int
    converted: tuple[int, ...]
    spec: KernelSpec  # whose window and sinks the shares are about
    heads: tuple[HeadRow, ...]
    maps: tuple[MapRow, ...]  # of each inspected layer

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


@torch.no_grad()
def inspect_model(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    *,
    spec: KernelSpec | None = None,
    maps: Sequence[str] = MAPS,
    sizes: Sequence[int] = SIZES,
    slots: Sequence[int] = SLOTS,
    windows: Sequence[int] = (),
    decays: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    on_progress: Report = lambda *_: None,
) -> Inspection:
    """Statistics of every head, and the error of `spec` with each map, size and number of slots, layer by layer.

    With each window and decay too, where some are given.

    `texts` are token ids [1, T] of ordinary text: the last one is measured, the others calibrate. A window or slots
    that hold most of a text leave nothing to measure; 1024 tokens and more are right for the default spec.
    InputError for texts or layers that cannot be inspected.
    """
    check_texts(model, texts)
    spec, possible = spec or KernelSpec(), softmax_layers(model)
    chosen = possible if layers is None else tuple(layers)
    for layer in chosen:
        if layer not in possible:
            raise InputError(f"layer {layer} cannot be inspected; those with full attention are {possible}")
    shape = AttentionShape.of(model.config)
    exact = itertools.product(dict.fromkeys((*slots, spec.slots)), windows or (spec.window,), decays or (spec.decay,))
    found = [spec.replace(slots=s, head_slots=(), window=window, decay=decay) for s, window, decay in exact]
    specs = list(dict.fromkeys(c for base in found for c in candidates(base, maps, sizes, shape.head_dim)))
    observed = observe(model, texts, chosen)
    heads: list[HeadRow] = []
    rows: list[MapRow] = []
    for i, layer in enumerate(chosen):
        on_progress(i, len(chosen), f"layer {layer}")
        seen = observed.pop(layer)
        heads += head_rows(layer, seen[-1], spec)
        rows += [measure_layer(layer, seen, each, shape) for each in specs]
    on_progress(len(chosen), len(chosen), "inspected")
    return Inspection(shape.layers, possible, spec, tuple(heads), tuple(rows))


# --- heads ----------------------------------------------------------------------------------------------------


def head_rows(layer: int, seen: Seen, spec: KernelSpec) -> list[HeadRow]:
    """Statistics of every head from the last `LENGTH` tokens' attention to each other and to everything before."""
    T = seen.query.shape[2]
    first = max(0, T - LENGTH)
    age = torch.arange(first, T)[:, None] - torch.arange(T)
    groups = seen.query.shape[1] // seen.key.shape[1]
    rows: list[HeadRow] = []
    for head, query in enumerate(seen.query[:1, :, first:].unbind(1)):
        key, sinks = seen.key[:1, head // groups, None], seen.sink_logits
        alone = seen._replace(sink_logits=None if sinks is None else sinks[head, None])
        p, _ = softmax_weights(query[:, None, None], key, alone, age >= 0)
        rows.append(head_row(layer, head, p[0, 0, 0], age, spec))
    return rows


def head_row(layer: int, head: int, p: Tensor, age: Tensor, spec: KernelSpec) -> HeadRow:
    """p and age [queries, keys]: probabilities, and how many tokens a key lies behind a query."""
    energy = torch.linalg.eigvalsh(p @ p.mT).flip(0).clamp(min=0)
    share = energy.cumsum(0) / energy.sum()
    rank90, rank95, rank99 = (int((share < part).sum()) + 1 for part in (0.90, 0.95, 0.99))
    sinks = (torch.arange(p.shape[1]) < spec.sinks) & (age >= 0)
    window = (age < spec.ring) & ~sinks
    far = p * (~window & ~sinks & (age >= 0))
    mass, total = far.sum(), p.sum()
    return HeadRow(
        layer, head, rank90, rank95, rank99,
        freedom=float((energy / (energy + RIDGE * energy[0])).sum()),
        look_back=float((p * age).sum() / total),
        far_look_back=float((far * age).sum() / mass.clamp(min=1e-9)),
        window=float((p * window).sum() / total),
        sinks=float((p * sinks).sum() / total),
        elsewhere=float(mass / total),
    )  # fmt: skip


# --- a plan ---------------------------------------------------------------------------------------------------


def recommend(report: Inspection, state_bytes: int) -> ConversionPlan:
    """The plan of least measured error whose state takes at most `state_bytes` bytes a sequence.

    Every layer begins with its smallest state; then, again and again, the upgrade that lowers the error most a byte is
    bought, of those on the lower hull of a layer's errors over bytes. Layers that were not inspected take the choice
    of the nearest one. InputError when the budget is below the smallest states together.
    """
    hulls = {layer: hull(rows) for layer, rows in by_layer(report.maps).items()}
    uses = {i: min(hulls, key=lambda layer: (abs(layer - i), layer)) for i in report.converted}
    level = dict.fromkeys(uses, 0)
    spent = sum(hulls[uses[i]][0].state_bytes for i in uses)
    if spent > state_bytes:
        raise InputError(f"state_bytes={state_bytes} is too little; {len(uses)} layers take at least {spent}")
    upgrades = [(-gain, i, step) for i, near in uses.items() for step, gain in enumerate(gains(hulls[near]))]
    for _, i, step in sorted(upgrades):
        cost = hulls[uses[i]][step + 1].state_bytes - hulls[uses[i]][step].state_bytes
        if level[i] == step and spent + cost <= state_bytes:
            level[i], spent = step + 1, spent + cost
    return ConversionPlan(tuple(hulls[uses[i]][level[i]].spec if i in uses else None for i in range(report.layers)))


def by_layer(rows: Sequence[MapRow]) -> Mapping[int, list[MapRow]]:
    found: dict[int, list[MapRow]] = defaultdict(list)
    for row in rows:
        found[row.layer].append(row)
    return found


def hull(rows: Sequence[MapRow]) -> list[MapRow]:
    """The choices that are best at some price for a byte: convex, errors falling while bytes grow."""
    kept: list[MapRow] = []
    for row in sorted(rows, key=lambda row: (row.state_bytes, row.output)):
        if kept and row.output >= kept[-1].output:
            continue
        while len(kept) > 1 and slope(kept[-2], kept[-1]) <= slope(kept[-2], row):
            kept.pop()
        kept.append(row)
    return kept


def slope(a: MapRow, b: MapRow) -> float:
    """Error saved a byte from a to b, a larger state."""
    return (a.output - b.output) / (b.state_bytes - a.state_bytes)


def gains(hulled: Sequence[MapRow]) -> list[float]:
    return [slope(a, b) for a, b in itertools.pairwise(hulled)]


# --- tables and pictures --------------------------------------------------------------------------------------


def head_table(report: Inspection) -> Table:
    """One row a layer: means over its heads."""
    from rich import box
    from rich.table import Table

    shown = Table(title="Softmax attention (means over heads)", title_justify="left", box=box.SIMPLE_HEAD)
    for name in (
        "layer",
        "rank 90 %",
        "95 %",
        "99 %",
        "freedom",
        "look-back",
        "outside",
        "window",
        "sinks",
        "elsewhere",
    ):
        shown.add_column(name, justify="right")
    fields = [f.name for f in dataclasses.fields(HeadRow)][2:]
    for layer in sorted({row.layer for row in report.heads}):
        rows = [row for row in report.heads if row.layer == layer]
        means = [sum(vars(row)[name] for row in rows) / len(rows) for name in fields]
        shown.add_row(str(layer), *(f"{x:.0f}" for x in means[:6]), *(f"{x:.1%}" for x in means[6:]))
    return shown


def map_table(rows: Sequence[MapRow], title: str = "Feature maps on real queries and keys") -> Table:
    """One row a choice, in the order given."""
    from rich import box
    from rich.table import Table

    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    varied = [name for name in ("window", "decay") if len({getattr(row.spec, name) for row in rows}) > 1]
    head = (
        "map",
        "features",
        *varied,
        "slots",
        "state bytes",
        "output error",
        "without",
        "far error",
        "fit",
        "negative mass",
    )
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*map_cells(row, varied))
    return shown


def map_cells(row: MapRow, varied: Sequence[str]) -> tuple[str, ...]:
    spec = row.spec
    where = "" if row.layer < 0 else f" (layer {row.layer})"
    features, choices = str(spec.feature_dim) if spec.has_memory else "–", (str(getattr(spec, name)) for name in varied)
    sizes = (features, *choices, str(spec.slots), f"{row.state_bytes:,}")
    errors = (f"{row.output:.4f}", f"{row.without:.4f}", f"{row.far:.3f}", f"{row.fit:.2f}")
    return (f"{spec.feature_map}{where}", *sizes, *errors, f"{row.negative:.1%}")


def plot(report: Inspection, path: Path) -> None:
    """Heat maps of layers and heads, to a file whose suffix matplotlib knows (.png, .pdf, .svg)."""
    from matplotlib.figure import Figure

    figures = {"rank95": "rank at 95 % energy", "elsewhere": "mass outside window and sinks", "look_back": "look-back"}
    figure = Figure(figsize=(4 * len(figures), 5), layout="constrained")
    layers = sorted({row.layer for row in report.heads})
    for axes, (field, title) in zip(figure.subplots(1, len(figures)), figures.items(), strict=True):
        values = [[vars(row)[field] for row in report.heads if row.layer == layer] for layer in layers]
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set(title=title, xlabel="head", ylabel="layer", yticks=range(len(layers)), yticklabels=layers)
        figure.colorbar(image, ax=axes)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix.removeprefix(".") or None)
    except ValueError as error:
        raise InputError(f"cannot draw to {path}: {error}") from error
    write_file(path.resolve(), drawn.getvalue())
