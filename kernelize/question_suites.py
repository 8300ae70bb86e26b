"""Question sets as suites: scored here, or by lm-eval, with accuracies above chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from . import harness
from .errors import InputError
from .rows import Row, bootstrap, share_row
from .subject import Subject
from .suites import Record, Suite, Tick, Unit, Work
from .tasks import QuestionSet, Request, judge, loglikelihoods, requests, sets_in


@dataclass(frozen=True)
class Tasks(Suite):
    """Question sets in a folder of JSON lines (see `kernelize.tasks`), scored here; `lengths` mean nothing to it."""

    folder: str | None = None
    names: tuple[str, ...] = ()  # all sets in the folder, if none is named
    limit: int | None = None  # the first rows of a set only
    batch: int = 16  # texts at a time

    kind = "tasks"
    quick = {"limit": 16}

    STEP: ClassVar[int] = 32  # questions a record

    @property
    def reach(self) -> int:
        return 1

    def label(self, unit: Unit) -> str:
        return f"{self.kind} {unit.settings['task']}"

    def units(self, tokenizer) -> list[Unit]:
        if self.folder is None:
            raise InputError(f"suite={self.kind!r} needs folder, where the question sets are (--tasks-data)")
        return [unit for found in sets_in(self.folder, self.names) for unit in self._units(tokenizer, found)]

    def _units(self, tokenizer, found: QuestionSet) -> Iterator[Unit]:
        questions = found.questions[: self.limit]
        for first in range(0, len(questions), self.STEP):
            part = questions[first : first + self.STEP]
            asked = [(question, requests(tokenizer, question)) for question in part]
            flat = [request for _, those in asked for request in those]
            settings = {"task": found.name, "first": first, "starts": [request.start for request in flat]}
            settings["asked"] = [(len(question.pairs), question.gold, question.sizes) for question in part]
            yield Unit([request.ids for request in flat], settings, sum(len(request.ids) for request in flat))

    def measure(self, work: Work, reference: tuple[Subject, Unit] | None, tick: Tick) -> list[Record]:
        return [self._judged(subject, unit, tick) for subject, unit in work]

    def _judged(self, subject: Subject, unit: Unit, tick: Tick) -> Record:
        asked = [Request(*pair) for pair in zip(unit.ids, unit.settings["starts"], strict=True)]
        scores = iter(loglikelihoods(subject.model, asked, self.batch))
        tick(unit.cost)
        right = [judge(gold, sizes, [next(scores) for _ in range(n)]) for n, gold, sizes in unit.settings["asked"]]
        chance = [1 / n if n > 1 else 0.0 for n, _, _ in unit.settings["asked"]]
        values = {measure: [one[measure] for one in right] for measure in right[0]}
        return {"task": unit.settings["task"], "values": values, "chance": chance}

    def rows(self, name: str, records: list[Record]) -> list[Row]:
        rows, parts = [], []
        for task in dict.fromkeys(record["task"] for record in records):
            mine = [record for record in records if record["task"] == task]
            values = {m: [x for record in mine for x in record["values"][m]] for m in mine[0]["values"]}
            rows += [self._row(name, task, measure, xs) for measure, xs in values.items()]
            best, chance = values.get("acc_bytes", values["acc"]), [x for record in mine for x in record["chance"]]
            parts.append(_Part(task, sum(best) / len(best), _error(best), sum(chance) / len(chance), len(best)))
        return rows + _corrected(name, self.kind, parts)

    def _row(self, name: str, task: str, measure: str, values: list[float]) -> Row:
        if measure != "nll":
            return share_row(name, self.kind, (f"{task}/{measure}", None, None), values)
        low, high = bootstrap(values, [1.0] * len(values), self.seed, math.exp)
        mean = math.exp(sum(values) / len(values))
        return Row(name, self.kind, f"{task}/perplexity", None, None, mean, low, high, len(values))


class _Part(NamedTuple):
    """The accuracy of one task, its standard error, and what guessing reaches."""

    task: str
    accuracy: float
    error: float | None
    chance: float
    n: int


def _error(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _corrected(name: str, kind: str, parts: Sequence[_Part]) -> list[Row]:
    """Accuracies above guessing: 0 is chance, 1 is perfect, whatever the number of choices; and their mean."""
    scaled = [_above_chance(part) for part in parts]
    if len(scaled) > 1:
        errors = [part.error for part in scaled if part.error is not None]
        joint = math.hypot(*errors) / len(scaled) if len(errors) == len(scaled) else None
        mean = sum(part.accuracy for part in scaled) / len(scaled)
        scaled.append(_Part("mean", mean, joint, 0.0, sum(part.n for part in scaled)))
    return [_with_error(name, kind, f"{part.task}/corrected", part.accuracy, part.error, part.n) for part in scaled]


def _above_chance(part: _Part) -> _Part:
    rest = 1 - part.chance
    error = None if part.error is None else part.error / rest
    return part._replace(accuracy=(part.accuracy - part.chance) / rest, error=error, chance=0.0)


def _with_error(name: str, kind: str, metric: str, value: float, error: float | None, n: int) -> Row:
    """A row with the interval of a normal distribution."""
    low, high = (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)
    return Row(name, kind, metric, None, None, value, low, high, n)


@dataclass(frozen=True)
class LmEval(Tasks):
    """The same sets, or any of lm-eval's own tasks by name, measured by lm-eval; one record a task."""

    kind = "lm-eval"

    def units(self, tokenizer) -> list[Unit]:
        if self.folder is None and not self.names:
            raise InputError("suite='lm-eval' needs names of its tasks (--task), or folder, where question sets are")
        local = {found.name: found for found in sets_in(self.folder, self.names)} if self.folder else {}
        return [self._unit(tokenizer, name, local.get(name)) for name in self.names or local]

    def _unit(self, tokenizer, name: str, found: QuestionSet | None) -> Unit:
        settings = {"task": name, "limit": self.limit, "seed": self.seed, "lm_eval": harness.version()}
        settings |= {"digest": found.digest} if found else {}
        cost = sum(unit.cost for unit in self._units(tokenizer, found)) if found else 1  # what a Hub has is not known
        return Unit([[]], settings, cost)

    def _judged(self, subject: Subject, unit: Unit, tick: Tick) -> Record:
        task: str | QuestionSet = unit.settings["task"]
        if self.folder and isinstance(task, str):
            (task,) = sets_in(self.folder, [task])
        scores = harness.measure(
            subject.model, subject.tokenizer, task, limit=self.limit, batch=self.batch, seed=self.seed
        )
        tick(unit.cost)
        return {"scores": [score._asdict() for score in scores]}

    def rows(self, name: str, records: list[Record]) -> list[Row]:
        scores = [harness.Score(**score) for record in records for score in record["scores"]]
        rows = [_with_error(name, self.kind, f"{s.task}/{s.metric}", s.value, s.error, s.n) for s in scores]
        best: dict[str, harness.Score] = {}
        for metric in ("acc", "acc_bytes", "acc_norm"):  # the last one that a task has is its headline
            best |= {score.task: score for score in scores if score.metric == metric}
        parts = [_Part(s.task, s.value, s.error, s.chance or 0.0, s.n) for s in best.values()]
        return rows + _corrected(name, self.kind, parts)
