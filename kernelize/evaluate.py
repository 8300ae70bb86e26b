"""Evaluation: models × suites → tidy rows, streamed through the state, resumable, every number with its interval.

A suite cuts its work into units (one piece of text, one batch of prompts). A unit is measured for all models side by
side and leaves one JSON record a model; rows are computed from records alone, so that an evaluation that was killed
and resumed gives the same table. Here is the run; what it is made of has homes of its own (`rows`, `texts`, `subject`,
`suites`, `question_suites`), and the names that people use are here too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__
from .errors import InputError, KernelizeError, first_line
from .files import write_file, writing
from .question_suites import LmEval, Tasks
from .rows import METRICS, Metric, Row, bootstrap, load_rows, metric_of, save_rows, wilson
from .subject import Subject, check_positions, greedy, has_position_table, trained_length
from .suites import Code, Generation, Passkey, Perplexity, Recall, Record, Suite, Unit
from .texts import choose_input, parse_length, parse_lengths, read_text, sample_text
from .units import data_size

__all__ = [
    "METRICS", "SUITES", "Code", "Generation", "LmEval", "Metric", "OnProgress", "Passkey", "Perplexity",
    "Recall", "Row", "Subject", "Suite", "Tasks", "bootstrap", "check_positions", "data_size", "evaluate",
    "greedy", "has_position_table", "lengths_by_suite", "load_rows", "make_suite", "metric_of", "parse_length",
    "parse_lengths", "read_text", "sample_text", "save_rows", "wilson",
]  # fmt: skip

VERSION = 3  # of the records: raise it when a suite changes what it measures
OnProgress = Callable[[int, int, str], None]  # (tokens done, tokens in all, what is running)

SUITES: dict[str, type[Suite]] = {
    "ppl": Perplexity,
    "code": Code,
    "passkey": Passkey,
    "recall": Recall,
    "generation": Generation,
    "tasks": Tasks,
    "lm-eval": LmEval,
}


OPTIONS = {"folder": "--tasks-data", "names": "--task"}  # settings that the command line calls otherwise


def make_suite(name: str, *, quick: bool = False, **settings: Any) -> Suite:
    """The suite `name` with `settings` over its quick or usual ones. Raises InputError for an unknown setting."""
    choose_input("suite", name, SUITES)
    suite = SUITES[name]
    for key in settings:
        choose_input("setting", key, [field.name for field in dataclasses.fields(suite)])
    return suite(**((suite.quick if quick else {}) | settings))


# --- the run --------------------------------------------------------------------------------------------------


class Store:
    """Records on disk, one JSON line each, appended as they are measured; or in memory if `path` is None."""

    def __init__(self, path: str | Path | None) -> None:
        self.path, self.records = Path(path) if path else None, dict[str, Record]()
        if self.path and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            whole, _, half = path.read_text("utf-8").rpartition("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cache {path} cannot be read: {first_line(error)}") from error
        if half:  # a killed run can leave half a line
            write_file(path, whole + "\n" if whole else "")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.records[entry["key"]] = entry["record"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number} is no evaluation record; is it another file?") from error

    def add(self, key: str, record: Record) -> None:
        self.records[key] = json.loads(json.dumps(record))
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "record": record}) + "\n")


def _key(suite: Suite, subject: Subject, unit: Unit, teacher: Subject | None) -> str:
    beside = teacher.fingerprint if teacher and suite.compares and teacher.name != subject.name else None
    what = [__version__, VERSION, suite.kind, subject.fingerprint, beside, unit.ids, unit.settings]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()


class Job(NamedTuple):
    """A unit for the models that have no record of it yet."""

    suite: Suite
    work: list[tuple[Subject, Unit, str]]
    reference: tuple[Subject, Unit] | None


def evaluate(
    models: Mapping[str, Any] | Sequence[str | Path],
    suites: Sequence[str | Suite] = ("ppl", "passkey"),
    *,
    lengths: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    teacher: str | None = None,
    quick: bool = False,
    settings: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Measures every model with every suite and returns tidy rows.

    models: name → (model, tokenizer), or name → source, or sources (Hub id, folder, .gguf) that name themselves;
    `device` and `dtype` are for those that are loaded here. Any causal LM of Transformers will do.
    suites: names from `SUITES` or `Suite` objects. `lengths` (tokens; or suite → lengths), `quick` and `settings`
    (fields of the suites, such as text, pieces, trials, seed) apply to the named ones.
    teacher: the name of the model that the others are compared with; by default "teacher" if there is one.
    cache: a JSON-lines file of what was measured already; a killed evaluation continues from it.

    Raises InputError for what cannot be evaluated, a length beyond learned positions among it.
    """
    chosen = choose_suites(suites, lengths=lengths, quick=quick, settings=settings)
    subjects = _subjects(models, device, dtype)
    reference = _teacher(subjects, teacher)
    units = [_units(suite, subjects) for suite in chosen]
    for subject in subjects:
        longest = max((len(ids) for plan in units for unit in plan[subject.name] for ids in unit.ids), default=0)
        check_positions(subject, max(longest, *(suite.reach for suite in chosen)))
    store = Store(cache)
    jobs = [j for s, u in zip(chosen, units, strict=True) for j in _jobs(s, subjects, u, reference, store)]
    _run(jobs, store, on_progress)
    rows = [row for subject in subjects for row in _facts(subject)]
    for suite, plan in zip(chosen, units, strict=True):
        for subject in subjects:
            records = [store.records[_key(suite, subject, unit, reference)] for unit in plan[subject.name]]
            rows += suite.rows(subject.name, records)
    return rows


def choose_suites(
    suites: Sequence[str | Suite],
    *,
    lengths: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    quick: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> list[Suite]:
    """The suites of these names with their settings, each once. Raises InputError, as `evaluate`, without a model."""
    chosen: list[Suite] = []
    for asked in suites:
        suite = asked if isinstance(asked, Suite) else _named(asked, lengths, quick, settings or {})
        if suite not in chosen:
            chosen.append(suite)
    _check_settings(chosen, settings or {})
    return chosen


def lengths_by_suite(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """["512,1k", "ppl=2k"] → (2048,) for ppl, (512, 1024) for every other suite."""
    plain = [text for text in texts if "=" not in text]
    found = dict.fromkeys(SUITES, parse_lengths(",".join(plain))) if plain else {}
    for text in texts:
        suite, named, lengths = text.partition("=")
        if named:
            choose_input("suite", suite, SUITES)
            found[suite] = parse_lengths(lengths)
    return found


def _named(
    name: str, lengths: Sequence[int] | Mapping[str, Sequence[int]] | None, quick: bool, settings: Mapping[str, Any]
) -> Suite:
    choose_input("suite", name, SUITES)
    lengths = lengths.get(name) if isinstance(lengths, Mapping) else lengths
    known = {field.name for field in dataclasses.fields(SUITES[name])}
    mine = {key: value for key, value in settings.items() if key in known}
    if lengths:
        mine["lengths"] = tuple(sorted(set(lengths)))
    return make_suite(name, quick=quick, **mine)


def _check_settings(suites: Sequence[Suite], settings: Mapping[str, Any]) -> None:
    known = {field for suite in suites for field in _fields(suite)}
    for key in settings:
        users = [name for name, suite in SUITES.items() if key in _fields(suite)]
        if users and key not in known:
            option = OPTIONS.get(key, f"--{key}")
            raise InputError(f"setting {key!r} ({option}) does nothing without the suite {' or '.join(users)}")
        choose_input("setting", key, sorted(known))


def _fields(suite: Suite | type[Suite]) -> list[str]:
    return [field.name for field in dataclasses.fields(suite)]


def _subjects(models: Mapping[str, Any] | Sequence[str | Path], device: str, dtype: str) -> list[Subject]:
    if not models:
        raise InputError("no model to evaluate")
    named = dict(models) if isinstance(models, Mapping) else {str(source): source for source in models}
    return [Subject.of(name, *_loaded(source, device, dtype)) for name, source in named.items()]


def _loaded(source: Any, device: str, dtype: str) -> tuple[Any, Any]:
    if isinstance(source, tuple):
        return source
    from .convert import load

    return load(source, device=device, dtype=dtype)


def _teacher(subjects: Sequence[Subject], name: str | None) -> Subject | None:
    names = {subject.name: subject for subject in subjects}
    if name is not None:
        choose_input("teacher", name, names)
    return names.get(name or "teacher")


def _facts(subject: Subject) -> Iterator[Row]:
    count = sum(p.numel() for p in subject.model.parameters())
    yield Row(subject.name, "model", "parameters", None, None, float(count), None, None, 1)
    limit = trained_length(subject)
    if limit is not None:
        yield Row(subject.name, "model", "trained_length", None, None, float(limit), None, None, 1)


def _units(suite: Suite, subjects: Sequence[Subject]) -> dict[str, list[Unit]]:
    """A suite's units by model; models that share a tokenizer object share the work of cutting."""
    cut: dict[int, list[Unit]] = {}
    for subject in subjects:
        if id(subject.tokenizer) not in cut:
            cut[id(subject.tokenizer)] = suite.units(subject.tokenizer)
    return {subject.name: cut[id(subject.tokenizer)] for subject in subjects}


def _jobs(suite: Suite, subjects, units: dict[str, list[Unit]], teacher: Subject | None, store: Store) -> Iterator[Job]:
    for i in range(max(map(len, units.values()))):
        work = [(s, units[s.name][i], _key(suite, s, units[s.name][i], teacher)) for s in subjects
                if i < len(units[s.name])]  # fmt: skip
        missing = [entry for entry in work if entry[2] not in store.records]
        beside = suite.compares and teacher is not None and i < len(units[teacher.name])
        if missing:
            yield Job(suite, missing, (teacher, units[teacher.name][i]) if teacher and beside else None)


def _run(jobs: Sequence[Job], store: Store, on_progress: OnProgress | None) -> None:
    total, done = sum(unit.cost for job in jobs for _, unit, _ in job.work), 0
    for job in jobs:
        label = job.suite.label(job.work[0][1])

        def tick(tokens: int, label: str = label) -> None:
            nonlocal done
            done += tokens
            if on_progress:
                on_progress(done, total, label)

        records = job.suite.measure([(s, unit) for s, unit, _ in job.work], job.reference, tick)
        for (subject, _, key), record in zip(job.work, records, strict=True):
            if not all(map(math.isfinite, _numbers(record))):
                raise KernelizeError(f"{subject.name} gives numbers that are not finite in {label}")
            store.add(key, record)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)):
        yield value
