"""The bridge to lm-eval (github.com/EleutherAI/lm-evaluation-harness): its tasks on any loaded model, through `HFLM`.

Any task name that lm-eval knows will do where a Hub is reachable; the sets of `kernelize.tasks` become YAML tasks,
which need none. lm-eval is an extra: pip install 'kernelize[eval]'.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import InputError, KernelizeError
from .tasks import QuestionSet

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "exact_match")


class Score(NamedTuple):
    """A measure of one task; `error` is the standard error of a mean, None of other aggregates."""

    task: str
    metric: str
    value: float
    error: float | None
    n: int
    chance: float | None  # what guessing would reach; None where it means nothing


def version() -> str:
    """lm-eval's. InputError where it is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise InputError("lm-eval is not installed: pip install 'kernelize[eval]'") from None


def write_task(asked: QuestionSet, folder: str | Path) -> Path:
    """A question set as a YAML task of lm-eval under the set's own name; the path of the file."""
    config = {
        "task": asked.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(asked.path.resolve())}},
        "test_split": "test",
        **asked.kind.config,
    }
    path = Path(folder, f"{asked.name}.yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return path


def measure(
    model,
    tokenizer,
    task: str | QuestionSet,
    *,
    limit: int | None = None,
    batch: int = 16,
    seed: int = 0,
) -> list[Score]:
    """Runs one task of lm-eval, by its name or as a question set, on the first `limit` documents.

    A group of tasks gives the scores of its parts. Raises InputError for a name that lm-eval does not know and where
    it is not installed, KernelizeError where the task's data cannot be loaded.
    """
    version()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    language_model = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    with _known(task) as (name, manager):
        try:
            found = simple_evaluate(language_model, tasks=[name], task_manager=manager, limit=limit,
                                    bootstrap_iters=0, **seeds)  # fmt: skip
        except (OSError, ConnectionError, ValueError) as error:
            raise KernelizeError(f"lm-eval cannot run task {name!r}: {error}") from error
    return [score for name in found["samples"] for score in _scores(name, found)]


@contextlib.contextmanager
def _known(task: str | QuestionSet) -> Iterator[tuple[str, Any]]:
    """(the task's name, a TaskManager that knows it)."""
    from lm_eval.tasks import TaskManager

    if isinstance(task, str):
        manager = TaskManager()
        if task not in manager.all_tasks:
            raise InputError(f"task {task!r} is none of lm-eval's {len(manager.all_tasks):,} tasks")
        yield task, manager
        return
    with tempfile.TemporaryDirectory() as folder:
        write_task(task, folder)
        yield task.name, TaskManager(include_path=folder, include_defaults=False)


def _scores(name: str, found: Mapping[str, Any]) -> Iterator[Score]:
    samples = found["samples"][name]
    results = {key.partition(",")[0]: value for key, value in found["results"][name].items() if "," in key}
    for metric, value in results.items():
        if isinstance(value, (int, float)) and metric.removesuffix("_stderr") == metric:
            error, chance = _error(samples, metric, value), _chance(samples, metric)
            yield Score(name, metric, float(value), error, len(samples), chance)


def _error(samples: Sequence[Mapping[str, Any]], metric: str, value: float) -> float | None:
    """Of a `value` that is the mean over documents; other aggregates have none here."""
    values = [sample.get(metric) for sample in samples]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    if len(numbers) < max(2, len(values)) or not math.isclose(statistics.fmean(numbers), value, abs_tol=1e-9):
        return None
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def _chance(samples: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """Of accuracies: one over the number of choices, 0 where an answer is written or there is one only."""
    if metric not in ACCURACIES:
        return None
    choices = [len(sample["filtered_resps"]) for sample in samples]
    return statistics.fmean(1 / n if n > 1 else 0.0 for n in choices)
