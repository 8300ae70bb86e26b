"""How fast a model reads, writes and trains, beside its teacher, in one run on one device; tidy rows come out.

Every model is given its best: a kernelized one reads in chunks of bounded size and decodes through `decode.Step`; a
softmax one reads a prompt at once, with cuDNN's attention first where there is one, and decodes on keys and values of a
fixed length without a mask, with cuDNN's or flash attention. On a GPU both steps are CUDA graphs. What does not fit is
a row, too.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicLayer

from .compiled import compiled_layers
from .decode import Sampling, Step, prefill, uncapturable
from .errors import InputError, KernelizeError, first_line
from .rows import Row
from .runtime import ops
from .runtime.cache import kernel_layers, state_bytes
from .runtime.modeling import KernelizedModelMixin, plan_of
from .subject import check_learned

SUITE = "bench"
SHORT = 32768  # up to so many tokens a prefill is timed several times on a GPU
WARM_UP = 131072  # tokens at most that are read before: kernels compile, libraries choose theirs
WARM_STEPS = 2
REPEATS = 3
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
REST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ORDERS = ([CUDNN, FLASH, *REST], [FLASH, CUDNN, *REST])  # the first is the faster one for prompts
OnProgress = Callable[[int, int, str], None]  # (cases done, cases in all, what is running)


@dataclass(frozen=True)
class Settings:
    """What is measured: every length with every batch; at most `chunk` tokens are read at a time,
    by default as many as `decode.prefill` takes.

    With `shared_prompt` the rows of a batch go on from one prompt, which is read once.
    """

    lengths: tuple[int, ...] = (1024, 8192)
    batches: tuple[int, ...] = (1,)
    tokens: int = 32  # decoded for one timing
    chunk: int | None = None
    train: bool = False
    compiled: bool = False  # both by torch.compile, around the attention, reading and writing
    shared_prompt: bool = False
    train_length: int = 2048
    train_rows: int = 4

    def __post_init__(self) -> None:
        for name in ("tokens", "chunk", "train_length", "train_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is below 1")
        if not self.lengths or not self.batches or min(self.lengths + self.batches) < 1:
            raise InputError(f"lengths={self.lengths}, batches={self.batches}: at least one of each, from 1 on")

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence; decoding takes a few steps before the timing starts."""
        return max(max(self.lengths) + WARM_STEPS + self.tokens, self.train_length if self.train else 0)


@dataclass(frozen=True)
class Contender:
    """A model under test, made when its turn comes: only one is in memory at a time."""

    name: str
    make: Callable[[], Any]


def machine(device: str) -> str:
    """What a device is called in a record of measurements."""
    if torch.device(device).type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()} CPU cores"


@dataclass
class Bench:
    """Rows, which implementation ran in each model, whose decoding went without a graph and why, and on what."""

    rows: list[Row] = field(default_factory=list)
    ran: dict[str, str] = field(default_factory=dict)
    machine: str = ""

    def add(self, model: str, metric: str, length: int, rows: int, value: float, n: int = 1) -> None:
        self.rows.append(Row(model, suite_of(rows), metric, length, None, float(value), None, None, n))


def suite_of(rows: int) -> str:
    """Of a batch: "bench" for one sequence, "bench ×16" for 16."""
    return SUITE if rows == 1 else f"{SUITE} ×{rows}"


def bench(contenders: Sequence[Contender], settings: Settings, on_progress: OnProgress | None = None) -> Bench:
    """Measures the contenders one after the other."""
    found, cases = Bench(), [(rows, length) for rows in settings.batches for length in sorted(settings.lengths)]
    total, done = len(contenders) * (len(cases) + settings.train), 0

    def tick(label: str) -> None:
        nonlocal done
        if on_progress:
            on_progress(done, total, label)
        done += 1

    for contender in contenders:
        model = contender.make()
        if settings.compiled and (reason := uncapturable(model)):
            raise InputError(f"nothing to compile, the step is no CUDA graph: {reason}")
        check_learned(model, contender.name, settings.reach)
        found.ran[contender.name], found.machine = describe(model), machine(str(model.device))
        failed: dict[int, int] = {}  # a batch: the length that did not fit
        for rows, length in cases:
            tick(f"{contender.name}, {rows} × {length}")
            fits = rows not in failed and case(found, contender.name, model, rows, length, settings)
            found.add(contender.name, "fits", length, rows, fits)
            if not fits:
                failed[rows] = length
        if settings.train:
            tick(f"{contender.name}, training")
            training(found, contender.name, model, settings)
        del model
        forget()
    if on_progress:
        on_progress(total, total, "done")
    return found


def case(found: Bench, name: str, model: Any, rows: int, length: int, settings: Settings) -> bool:
    """Adds the rows of one length and batch; False where it does not fit into the memory.

    KernelizeError where torch.compile fails. A case compiles for itself: what earlier ones have compiled would count
    against the number of variants, beyond which code runs as it is.
    """
    if settings.compiled:
        torch._dynamo.reset()
    try:
        with torch.no_grad(), sdpa_kernel(ORDERS[0], set_priority=True), variants_counted(settings.compiled):
            measured = list(measure(model, rows, length, settings))
    except (torch.OutOfMemoryError, MemoryError):
        measured = []
    # looked up only where something failed: its import takes seconds
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        if "out of memory" not in str(error):
            raise KernelizeError(f"torch.compile failed: {first_line(error)}") from error
        measured = []
    forget()
    for metric, value, n in measured:
        found.add(name, metric, length, rows, value, n)
    return bool(measured)


def variants_counted(compiled: bool) -> Any:
    """Within it code with too many variants is an error; without `compiled` nothing is."""
    return torch._dynamo.config.patch(fail_on_recompile_limit_hit=True) if compiled else nullcontext()


def measure(model: Any, rows: int, length: int, settings: Settings) -> Iterator[tuple[str, float, int]]:
    """(metric, value, how often it was measured) of one prompt length and batch."""
    asked, rows = rows, 1 if settings.shared_prompt else rows
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device=model.device)
    chunk = None if settings.chunk is None else max(1, settings.chunk // rows)
    if not isinstance(model, KernelizedModelMixin):
        chunk = length
    cuda = model.device.type == "cuda"
    with compiled_layers(model) if settings.compiled else nullcontext():
        times, (cache, logits, read) = reading(model, ids, chunk, ids.shape[1] if settings.compiled else WARM_UP)
    yield "prefill_ms", 1e3 * statistics.median(times), len(times)
    if cuda:
        yield "peak_bytes", torch.cuda.max_memory_allocated(), 1
    yield "state_bytes", state_bytes(cache) / rows, 1
    if asked > rows:
        cache.batch_repeat_interleave(asked)
        logits, read = logits.repeat(asked, 1), read.repeat(asked)
    tried = ORDERS if cuda and not isinstance(model, KernelizedModelMixin) else ORDERS[:1]
    seconds = [decoding(model, cache, logits, read, settings, order) for order in tried]
    yield "decode_ms", 1e3 * min(seconds), settings.tokens


def reading(
    model: Any, ids: Tensor, chunk: int | None, warm_up: int
) -> tuple[list[float], tuple[Cache, Tensor, Tensor]]:
    """Seconds of each reading of a prompt, and what `prefill` gives after it; on a GPU `warm_up` tokens go before."""
    cuda, times = model.device.type == "cuda", list[float]()
    if cuda:
        prefill(model, ids[:, :warm_up], chunk=chunk)
        torch.cuda.reset_peak_memory_stats()
    for _ in range(REPEATS if cuda and ids.numel() <= SHORT else 1):
        read: Any = None  # the one before goes first
        start = now(model)
        read = prefill(model, ids, chunk=chunk)
        times.append(now(model) - start)
    return times, read


def decoding(
    model: Any, cache: Cache, logits: Tensor, read: Tensor, settings: Settings, order: list[SDPBackend]
) -> float:
    """Seconds a token, with the first softmax kernel of `order` that serves."""
    with sdpa_kernel(order, set_priority=True):
        step = stepper(model, cache, logits, read, settings.compiled)
        for _ in range(WARM_STEPS):
            step.run()
        start = now(model)
        for _ in range(settings.tokens):
            step.run()
        return (now(model) - start) / settings.tokens


def stepper(model: Any, cache: Cache, logits: Tensor, read: Tensor, compiled: bool = False) -> Step:
    """The step of a model after a prompt, as a graph where it can be one."""
    freeze(cache)
    step = Step(model, cache, logits.shape[0], Sampling(), [], 0)
    step.begin(cache, logits, read)
    if uncapturable(model) is None:
        step.capture(compiled)
    return step


class FullLayer(DynamicLayer):
    """Keys and values of a fixed length, for timing: a new token takes the last place, so that no step differs from
    another in what it reads. Softmax decoding at its best: contiguous, without a mask, without a copy."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys.contiguous(), values.contiguous()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


def freeze(cache: Cache) -> None:
    """Makes the growing layers of a cache `FullLayer`s; those of a kernelized model have none."""
    layers: list[Any] = cache.layers
    growing: list[Any] = [x for x in layers if type(x) is DynamicLayer]
    full = {id(x): FullLayer(x.keys, x.values) for x in growing}
    cache.layers = [full.get(id(x), x) for x in layers]
    for layer in kernel_layers(cache):
        layer.mask_peer = full.get(id(layer.mask_peer), layer.mask_peer)


def training(found: Bench, name: str, model: Any, settings: Settings) -> None:
    """Adds tokens a second of forward and backward in all weights."""
    rows, length = settings.train_rows, settings.train_length
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device=model.device)
    model.train()
    times = []
    try:
        with sdpa_kernel(ORDERS[0], set_priority=True):
            for _ in range(1 + REPEATS):
                start = now(model)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                model.zero_grad(set_to_none=True)
                times.append(now(model) - start)
        found.add(name, "train_tokens_per_s", length, rows, rows * length / statistics.median(times[1:]), REPEATS)
    except (torch.OutOfMemoryError, MemoryError):
        found.add(name, "fits_training", length, rows, 0.0)
    model.zero_grad(set_to_none=True)
    model.eval()


def now(model: Any) -> float:
    """Seconds on the clock, when the device has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(model: Any) -> str:
    """Which implementations a model runs on here."""
    graph = uncapturable(model)
    how = "as a CUDA graph" if graph is None else f"without a graph ({graph})"
    if not isinstance(model, KernelizedModelMixin):
        name = model.config._attn_implementation
        prompts, tokens = (", cuDNN first", ", the faster of cuDNN and flash,") if graph is None else ("", "")
        return f"prefill {name}{prompts}; decoding {name}{tokens} {how}"
    specs = list(dict.fromkeys(spec for spec in plan_of(model.config) if spec is not None))
    prefills, steps = ({f(spec) for spec in specs} for f in (ops.describe, ops.describe_step))
    return f"prefill {' and '.join(sorted(prefills))}; decoding {' and '.join(sorted(steps))} {how}"


def break_even(rows: Sequence[Row], model: str, teacher: str) -> dict[str, int | None]:
    """The first measured length from which on `model` is the faster one, by suite and metric; None: nowhere.

    A teacher that does not fit has lost.
    """
    value = {(row.model, row.suite, row.metric, row.length): row.value for row in rows}
    found: dict[str, int | None] = {}
    for suite in dict.fromkeys(row.suite for row in rows):
        for metric in ("prefill_ms", "decode_ms"):
            mine = {
                row.length: row.value for row in rows if (row.model, row.suite, row.metric) == (model, suite, metric)
            }
            first = None
            for length in sorted(mine, key=lambda n: n or 0, reverse=True):
                if mine[length] >= value.get((teacher, suite, metric, length), float("inf")):
                    break
                first = length
            if mine:
                found[f"{suite} {metric}"] = first
    return found
