"""Draws docs/img/layer-h200.png from benchmarks/results: what one layer takes on an H200, by length, beside its peers.

python benchmarks/draw.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/layer-h200-2026-11-26.jsonl"
SHAPE = [1, 32, 8, 128]  # of the rows that name none
SHOWN = {  # a row's `what` -> (label, colour)
    "kernelize attention 128": ("kernelized: window 64, 4 sinks, 128 slots, memory", "#1f77b4"),
    "fla chunk_linear_attn": ("flash-linear-attention, memory alone", "#2ca02c"),
    "sdpa cudnn": ("softmax, cuDNN", "#d62728"),
    "sdpa flash": ("softmax, FlashAttention-2", "#ff7f0e"),
}
PANELS = {"ms": "forward", "ms fwd+bwd": "forward and backward"}


def series(rows: list[dict], what: str, measure: str) -> dict[int, float]:
    """Length -> milliseconds, as last measured; as a CUDA graph where that was measured, too."""
    found = {}
    for row in rows:
        if row.get("what") == what and row.get("shape", SHAPE) == SHAPE and measure in row:
            found[row["T"]] = row.get(f"{measure} graph", row[measure])
    return dict(sorted(found.items()))


def draw(rows: list[dict], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (measure, title) in zip(axes, PANELS.items(), strict=True):
        for what, (label, colour) in SHOWN.items():
            points = series(rows, what, measure)
            axis.plot(list(points), list(points.values()), "o-", label=label, color=colour)
        axis.set(title=title, xscale="log", yscale="log", xlabel="tokens")
        axis.set_xticks([2048, 32768, 131072], ["2k", "32k", "128k"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds a layer, H200, bf16")
    axes[0].set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes[1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/img/layer-h200.png")
    given = parser.parse_args()
    draw([json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()], given.out)


if __name__ == "__main__":
    main()
