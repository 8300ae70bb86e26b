"""The main job from one end to the other on a small real model: plan, convert, fine-tune, measure, check, write."""

from __future__ import annotations

import copy
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .card import read_source
from .check import CheckRow, check
from .convert import convert, demo_source, load
from .evaluate import Passkey, Perplexity, Row, Suite, evaluate
from .files import check_output
from .generate import Completion, Conversation
from .pipeline import (
    as_converted,
    as_rows,
    budget,
    calibration,
    describe_converted,
    document,
    override_stages,
    plan_for,
)
from .plan import ConversionPlan, PlanReport, describe
from .recipe import Recipe, load_recipe
from .report import write_report
from .runtime.spec import NO_MEMORY, KernelSpec
from .train import finetune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECIPE = "demo"
QUESTION = "Why is the sky blue?"
TEACHER, WINDOW, BEFORE, AFTER = "teacher", "window only", "kernelized, untrained", "kernelized, fine-tuned"
CHECKS = (  # `kernelize check` has them all
    "chunked prefill",
    "one token at a time",
    "left- and right-padded batch",
    "window ≥ length is softmax",
    "state bytes",
    "save and load",
)
QUICK_TOKENS = 2048  # two steps a stage: the first one only warms up
QUICK = {"length": 1024, "texts": 1, "passkey_lengths": (512,), "trials": 2}
BUDGET_TOKENS, BUDGET_TEXTS = 1024, (1, 1)  # enough to rank the layers, in a minute on two cores
ANSWER = 64  # positions kept for what is asked
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass
class Listener:
    """Who hears how the demo goes on; the default hears nothing."""

    step: Callable[[str], None] = lambda headline: None
    planned: Callable[[PlanReport], None] = lambda report: None
    converting: Callable[[int, int, str], None] = lambda done, total, label: None
    training: Callable[[dict], None] = lambda event: None
    measuring: Callable[[int, int, str], None] = lambda done, total, label: None
    checking: Callable[[int, int, str], None] = lambda done, total, label: None
    text: Callable[[str], None] = lambda piece: None


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `rows` compare the four models, `seconds` is the time of each part."""

    output: Path
    report: Path
    plan: PlanReport
    rows: tuple[Row, ...]
    checks: tuple[CheckRow, ...]
    completion: Completion
    seconds: Mapping[str, float] = field(default_factory=dict)


def run(
    output: str | Path,
    source: str | None = None,
    *,
    quick: bool = False,
    overwrite: bool = False,
    recipe: Recipe | None = None,
    listener: Listener | None = None,
) -> DemoResult:
    """Does the whole job on `source` (by default the SmolLM2-135M-Instruct that is installed) and writes `output`.

    The kernelized model stands beside its teacher and beside the untrained window at an equal number of positions.
    `quick` trains a few steps and measures short texts. Raises InputError before any work for what cannot be used,
    KeyboardInterrupt when the training was told to stop.
    """
    output, listener = check_output(output, overwrite), listener or Listener()
    recipe = recipe or _recipe(quick)
    source = source or str(demo_source())
    clock = _Clock(listener)
    with clock("loading the teacher"):
        teacher, tokenizer = load(source, dtype="float32")
    plan = plan_for(recipe, teacher.config)
    cost = describe(plan, teacher.config, dtype="float32")
    listener.planned(cost)
    with clock("converting; slots and memory start from the teacher's statistics"):
        priced = budget(tokenizer, teacher, recipe, length=BUDGET_TOKENS, texts=BUDGET_TEXTS)
        texts = calibration(tokenizer, teacher)
        before = convert(
            copy.deepcopy(teacher), plan, calibration=texts, budget=priced, on_progress=listener.converting
        )
    recipe, cost = as_converted(recipe, before), describe_converted(before, "float32")
    with clock("fine-tuning"):
        after = copy.deepcopy(before)
        trained = finetune(
            after,
            tokenizer,
            recipe,
            output,
            teacher=teacher,
            overwrite=overwrite,
            on_event=listener.training,
        )
    if not trained.completed:
        raise KeyboardInterrupt  # a SIGTERM, which finetune answers by a checkpoint
    window = convert(copy.deepcopy(teacher), window_plan(plan))
    models = {TEACHER: teacher, WINDOW: window, BEFORE: before, AFTER: after}
    with clock("measuring four models side by side"):
        rows = _measure(models, tokenizer, recipe, listener)
    with clock("checking the fine-tuned model"):
        checks = check(after, tokenizer, only=CHECKS, on_progress=listener.checking)
    with clock("generating"):
        completion = _generate(after, tokenizer, listener)
    with clock("writing model card and report"):
        tokens = sum(stage.tokens for stage in trained.stages)
        page = _document(output, source, recipe, tokens, rows, cost)
    return DemoResult(output, page, cost, tuple(rows), tuple(checks), completion, clock.seconds)


def window_plan(plan: ConversionPlan) -> ConversionPlan:
    """The control: every converted layer holds as many exact positions, all of them in the window; no memory."""
    return ConversionPlan(tuple(spec and _window_only(spec) for spec in plan.layers))


def _window_only(spec: KernelSpec) -> KernelSpec:
    ring = max(1, (spec.positions - spec.sinks) // spec.block) * spec.block
    window = ring - spec.block + 1
    return spec.replace(feature_map=NO_MEMORY, slots=0, head_slots=(), policy="attention", window=window)


class _Clock:
    """Announces each part and keeps the seconds it took."""

    def __init__(self, listener: Listener):
        self.listener, self.seconds = listener, dict[str, float]()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.listener.step(part)
        start = time.monotonic()
        yield
        self.seconds[part] = time.monotonic() - start


def _recipe(quick: bool) -> Recipe:
    """The shipped recipe; `quick` makes two steps of each stage and measures little."""
    recipe = load_recipe(RECIPE)
    if not quick:
        return recipe
    short = override_stages(recipe, tokens=QUICK_TOKENS)
    return short.model_copy(update={"evaluation": short.evaluation.model_copy(update=QUICK)})


def _measure(models: dict[str, PreTrainedModel], tokenizer, recipe: Recipe, listener: Listener) -> list[Row]:
    """Perplexity by position and passkey, as the recipe's evaluation says, within the teacher's positions."""
    wanted, limit = recipe.evaluation, models[TEACHER].config.max_position_embeddings
    length = min(wanted.length, limit)
    lengths = tuple(n for n in wanted.passkey_lengths if n + ANSWER <= limit)
    suites: list[Suite] = [Perplexity(lengths=(length,), pieces=wanted.texts)]
    if lengths:
        suites.append(Passkey(lengths=lengths, depths=DEPTHS, trials=-(-wanted.trials // len(DEPTHS))))
    pairs = {name: (model, tokenizer) for name, model in models.items()}
    return evaluate(pairs, suites, on_progress=listener.measuring)


def _generate(model: PreTrainedModel, tokenizer, listener: Listener) -> Completion:
    chat = bool(tokenizer.chat_template)
    return Conversation(model, tokenizer, chat=chat, max_new_tokens=48, on_text=listener.text).answer(QUESTION)


def _document(output: Path, source: str, recipe: Recipe, tokens: int, rows: list[Row], cost: PlanReport) -> Path:
    """Recipe, facts and card beside the weights, and the report; the path of its page."""
    commands = ["kernelize demo" if source == str(demo_source()) else f"kernelize demo --source {shlex.quote(source)}"]
    document(output, recipe=recipe, source=read_source(source), tokens=tokens, rows=as_rows(rows), commands=commands)
    sizes = {"new parameters": f"{cost.new_parameters:,}", "state, bytes a sequence": f"{cost.state_bytes:,}"}
    return write_report(rows, output / "report", teacher=TEACHER, extra={"What the conversion adds": sizes})


def summary(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the final table: a model a line, perplexity by position, recall and decoding state."""
    found = {(row.model, row.metric, row.length, row.depth): row.value for row in rows}
    longest = max(row.length or 0 for row in rows if row.metric == "ppl")
    buckets = [n for n in (2048, 4096, 8192) if n < longest] + [longest]
    recall = sorted({row.length for row in rows if row.metric == "passkey" and row.length})
    head = ["model", f"perplexity, {longest:,} tokens", *(f"at {_before(n):,}–{n:,}" for n in buckets)]
    head += [*(f"passkey {n:,}" for n in recall), "decoding state"]
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        cells = [f"{found[model, 'ppl', longest, None]:.2f}"]
        cells += [f"{found[model, 'ppl_at', n, None]:.2f}" for n in buckets]
        cells += [f"{found[model, 'passkey', n, None]:.0%}" for n in recall]
        lines.append([model, *cells, f"{found[model, 'cache_bytes', longest, None] / 1e6:,.1f} MB"])
    return head, lines


def _before(edge: int) -> int:
    """The next smaller edge of the doubling buckets."""
    return 2 ** (edge - 1).bit_length() // 2
