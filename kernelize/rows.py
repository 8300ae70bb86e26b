"""Results: one tidy row a number, what its metric means, and its 95 % interval."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from .completion import COMPLETIONS
from .errors import InputError, first_problem
from .files import write_file
from .recall import TASKS
from .units import data_size


@dataclass(frozen=True)
class Row:
    """One number. `length` in tokens and `depth` (0: start of the prompt, 1: end) are None where they mean nothing;
    `low`, `high` are its 95 % interval, None where there is none; `n` counts what it was computed from."""

    model: str
    suite: str
    metric: str
    length: int | None
    depth: float | None
    value: float
    low: float | None
    high: float | None
    n: int

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Metric:
    """How a metric is read: `better` is "lower", "higher" or "" (a fact); `show` formats a value."""

    title: str
    better: str
    show: Callable[[float], str]


METRICS: dict[str, Metric] = {
    "ppl": Metric("perplexity of the whole piece", "lower", "{:.2f}".format),
    "ppl_at": Metric(
        "perplexity at the positions below `length`, down to the next smaller length", "lower", "{:.2f}".format
    ),
    "ppl_ratio": Metric("perplexity / the teacher's on the same pieces", "lower", "{:.3f}".format),
    "ppl_ratio_at": Metric("perplexity / the teacher's on the same pieces, by position", "lower", "{:.3f}".format),
    "drift_at": Metric(
        "perplexity at these positions / that just before the trained length ends, piece by piece",
        "lower",
        "{:.3f}".format,
    ),
    "kl": Metric("KL divergence from the teacher, nats a token", "lower", "{:.4f}".format),
    "kl_at": Metric("KL divergence from the teacher by position, nats a token", "lower", "{:.4f}".format),
    "cache_bytes": Metric("size of the decoding state after `length` tokens", "lower", data_size),
    "agreement": Metric("tokens of greedy text that agree with the teacher's", "higher", "{:.1f}".format),
    "repetition": Metric("share of 4-grams that the text repeats", "lower", "{:.3f}".format),
    "distinct_1": Metric("different tokens / tokens", "higher", "{:.3f}".format),
    "distinct_2": Metric("different 2-grams / 2-grams", "higher", "{:.3f}".format),
    **{
        f"mass_{source}": Metric(f"share of the normaliser that is {source}, mean over layers", "", "{:.3f}".format)
        for source in ("window", "sinks", "slots", "memory")
    },
    **{
        f"mass_{source}_at": Metric(f"the part of it fewer than `length` tokens away ({source})", "", "{:.3f}".format)
        for source in ("window", "sinks", "slots")
    },
    "prefill_ms": Metric("milliseconds to read `length` tokens", "lower", "{:,.1f}".format),
    "decode_ms": Metric("milliseconds a token (of all rows) after `length` tokens", "lower", "{:,.2f}".format),
    "peak_bytes": Metric("memory of the device at most while reading, weights included", "lower", data_size),
    "state_bytes": Metric("size of the decoding state of a sequence after `length` tokens", "lower", data_size),
    "train_tokens_per_s": Metric("tokens a second, forward and backward", "higher", "{:,.0f}".format),
    "fits": Metric("fits into the memory", "higher", lambda value: "yes" if value else "out of memory"),
    "fits_training": Metric(
        "training fits into the memory", "higher", lambda value: "yes" if value else "out of memory"
    ),
    "parameters": Metric("parameters", "", "{:,.0f}".format),
    "trained_length": Metric("positions that the configuration allows", "", "{:,.0f}".format),
    **{name: Metric(f"completed without a mistake: {name}", "higher", "{:.2f}".format) for name in COMPLETIONS},
    **{name: Metric(f"recall: {name.replace('_', ' ')}", "higher", "{:.2f}".format) for name in TASKS},
}


# The measures of question sets; a row's metric is TASK/MEASURE.
MEASURES: dict[str, Metric] = {
    **{
        name: Metric(f"share of right answers{how}", "higher", "{:.1%}".format)
        for name, how in (
            ("acc", ""),
            ("acc_bytes", ", log p a byte of the choice"),
            ("acc_norm", ", log p a character of the choice"),
            ("exact_match", ", written out"),
        )
    },
    "perplexity": Metric("perplexity of the right answer, a whole answer at a time", "lower", "{:.2f}".format),
    "corrected": Metric("share of right answers above guessing: (acc − chance) / (1 − chance)", "higher",
                        "{:.1%}".format),
}  # fmt: skip


def metric_of(name: str) -> Metric:
    """How the metric of a row is read. One that is not in METRICS or, as TASK/MEASURE, in MEASURES is a plain fact."""
    task, _, measure = name.rpartition("/")
    found = MEASURES.get(measure) if task else METRICS.get(name)
    return found or Metric(name, "", "{:.4g}".format)


def save_rows(rows: Sequence[Row], path: str | Path) -> None:
    """Writes {"rows": [...]} as JSON."""
    write_file(path, json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")


def load_rows(path: str | Path) -> list[Row]:
    """Reads what `save_rows` wrote. Raises InputError for a file that holds no rows."""
    try:
        return as_rows(json.loads(Path(path).read_text("utf-8"))["rows"])
    except ValidationError as error:
        raise InputError(f"{path} holds no evaluation rows (rows{first_problem(error)})") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} holds no evaluation rows ({type(error).__name__}: {error})") from error


def as_rows(data: Any) -> list[Row]:
    """Rows of plain data; ValueError if a field is missing, unknown or of another type."""
    return TypeAdapter(list[Row]).validate_json(json.dumps(data))


# --- intervals ------------------------------------------------------------------------------------------------


def bootstrap(sums: Sequence[float], counts: Sequence[float], seed: int, of=lambda mean: mean):
    """95 % interval of of(Σ sums / Σ counts) over resampled pieces; (None, None) for fewer than two pieces."""
    if len(sums) < 2:
        return None, None
    chosen = np.random.default_rng(seed).integers(len(sums), size=(2000, len(sums)))
    means = np.asarray(sums)[chosen].sum(1) / np.asarray(counts)[chosen].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return of(float(low)), of(float(high))


def wilson(mean: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): stays in [0, 1] and is honest for 0 and 1, unlike the bootstrap."""
    z2 = 1.96**2
    centre, spread = mean + z2 / (2 * n), math.sqrt(z2 * mean * (1 - mean) / n + z2**2 / (4 * n**2))
    return max(0.0, (centre - spread) / (1 + z2 / n)), min(1.0, (centre + spread) / (1 + z2 / n))


def share_row(name: str, kind: str, cell: tuple[str, int | None, float | None], scores: list[float]) -> Row:
    """The row of a share, such as of prompts answered; `cell`: metric, length, depth."""
    mean, n = sum(scores) / len(scores), len(scores)
    return Row(name, kind, *cell, mean, *wilson(mean, n), n)
