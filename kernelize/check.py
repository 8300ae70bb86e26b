"""The user's proof that every way to run a kernelized model gives the same numbers.

Which token gets a slot is a discrete choice: in float32 two nearly equal scores may change places between a matmul of
one shape and another, and logits then move by 1e-3. The laws are therefore checked in float64, where they must hold
to rounding; what the working dtype adds is measured apart, as a divergence of the next-token distributions.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .convert import save
from .errors import InputError, KernelizeError, first_line
from .hub import answer_there, compare
from .reload import answer
from .runtime.cache import CACHE, kernel_layers
from .runtime.modeling import PREFIX, kernelized_layers, softmax_twin
from .runtime.spec import SpecError

EXACT = 1e-8  # max abs difference of logits in float64
BOUNDS = {
    "chunked prefill": EXACT,
    "one token at a time": EXACT,
    "left- and right-padded batch": EXACT,
    "packed documents": EXACT,
    "static cache": EXACT,
    "beam reordering": EXACT,
    "batch selection": EXACT,
    "snapshot and restore": EXACT,
    "crop": EXACT,
    "offload": EXACT,
    "window ≥ length is softmax": EXACT,
    "identity with the teacher": 1e-4,  # float32, max abs difference of logits
    "state bytes": 0.0,
    "save and load": 0.0,
    "clean process": 1e-4,
}
DRIFT = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # nats a token
LONG = 4000  # tokens after which the state must be as large as after SHORT
SHORT = 100
HEAD, TAIL = 6, 24  # tokens taken singly: from the empty state, and at the end, where slots are full
IDENTITY = 160  # tokens

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CheckRow:
    """One law: the largest difference found, in the unit that `note` names, and the bound it must keep.

    `passed` is None where the law was not run; `note` then says why.
    """

    name: str
    passed: bool | None
    difference: float | None
    bound: float | None
    note: str

    @property
    def failed(self) -> bool:
        return self.passed is False


class NotAskedError(Exception):
    """A law says nothing about this model; the message says why."""


def check(
    model: Any,
    tokenizer: Any = None,
    *,
    against: Any = None,
    seed: int = 0,
    length: int | None = None,
    only: Sequence[str] | None = None,
    on_progress: Progress = lambda done, total, label: None,
) -> list[CheckRow]:
    """Every law on two seeded random sequences of `length` tokens; default: a few blocks beyond the window
    and the slots that half of the layers have.

    `against` is the teacher: where its weights are the model's own, a window over the whole length must give its
    logits. `only` names some of `LAWS`; without `tokenizer` there is no clean process, which loads one. Needs memory
    for a float64 copy. InputError if the model is not kernelized, or quantised.
    """
    if not model.config.model_type.startswith(PREFIX):
        raise InputError(f"model type {model.config.model_type!r} is not kernelized; convert the model first")
    if model.config.to_dict().get("quantization_config"):
        raise InputError("the model is quantised, and has no float64 copy to compare with; check what it was made from")
    unknown = [name for name in only or () if name not in LAWS]
    if unknown:
        raise InputError(f"check {unknown[0]!r} is not one of {', '.join(LAWS)}")
    missing = {"identity with the teacher": against is None, "clean process": tokenizer is None}
    chosen = [name for name in only or LAWS if not missing.get(name)]
    rows = []
    with (
        torch.no_grad(),
        tempfile.TemporaryDirectory(prefix="kernelize-check-") as scratch,
        ThreadPoolExecutor(1) as pool,
    ):
        subject = Subject(model.eval(), tokenizer, against, seed, length, Path(scratch))
        if "clean process" in chosen:  # most of its time is one thread's: it runs beside the other laws
            subject.there = pool.submit(answer_there, subject.folder)
        for done, name in enumerate(chosen):
            on_progress(done, len(chosen), name)
            rows.append(judge(subject, name))
    on_progress(len(chosen), len(chosen), "done")
    return rows


def judge(subject: Subject, name: str) -> CheckRow:
    """Runs one law. One that the model refuses by name, or that does not apply, was not run; one that breaks fails."""
    bound = DRIFT[subject.model.dtype] if name == "working dtype" else BOUNDS[name]
    try:
        difference, note = LAWS[name](subject)
    except SpecError as refusal:
        return CheckRow(name, None, None, bound, f"refused: {refusal}")
    except NotAskedError as reason:
        return CheckRow(name, None, None, bound, str(reason))
    except (RuntimeError, ValueError, IndexError, TypeError, KernelizeError) as error:
        return CheckRow(name, False, None, bound, f"{type(error).__name__}: {first_line(error)}")
    return CheckRow(name, difference <= bound, difference, bound, note)


# --- what is checked ----------------------------------------------------------------------------------------


class KeepDouble(TorchFunctionMode):
    """Model code that computes norms or rotations `in float32` does so in float64, when its input is float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()  # integers too: positions meet frequencies in one matmul
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Subject:
    """The model, its float64 copy, and what several laws share; all is made on first use."""

    def __init__(self, model: Any, tokenizer: Any, against: Any, seed: int, length: int | None, scratch: Path):
        self.model, self.tokenizer, self.against, self.seed, self.scratch = model, tokenizer, against, seed, scratch
        self.there: Future[dict] | None = None  # the clean process's answer
        self.length = length or self.default_length()
        if not 64 <= self.length <= self.limit:
            raise InputError(f"length={self.length} is not within 64 and the model's {self.limit} positions")

    @property
    def limit(self) -> int:
        """Positions that the model has."""
        return self.model.config.get_text_config().max_position_embeddings

    def default_length(self) -> int:
        """Where the slots of half of the layers have been full for a few blocks: a layer may have many more."""
        specs = [attention.kernelize.spec for attention in kernelized_layers(self.model).values()]
        return min(self.limit, max(64, statistics.median_high(s.positions + 8 * s.block + 7 for s in specs)))

    @cached_property
    def folder(self) -> Path:
        """The model, saved."""
        return save(self.model, self.tokenizer, self.scratch / "model")

    @cached_property
    def reloaded(self) -> dict:
        """What the saved model answers when it is loaded here."""
        loaded: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto", use_safetensors=True)
        # the same way through the experts: another one rounds differently, and says nothing about what was saved
        loaded.config._experts_implementation_internal = self.model.config._experts_implementation
        return answer(loaded.eval().to(self.model.device))

    @cached_property
    def exact(self) -> Any:
        return copy.deepcopy(self.model).double()

    @cached_property
    def ids(self) -> Tensor:
        """[2, T]: no token twice while the vocabulary lasts, since equal tokens may have equal scores."""
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        rows = [torch.randperm(vocabulary, generator=generator).repeat(-(-self.length // vocabulary)) for _ in "ab"]
        return torch.stack([row[: self.length] for row in rows]).to(self.model.device)

    @property
    def prose(self) -> Tensor:
        """[1, T <= IDENTITY] ordinary text where there is a tokenizer: a bound in float32 means little on noise."""
        if self.tokenizer is None:
            return self.ids[:1, :IDENTITY]
        ids = self.tokenizer(f"{__doc__}\n{check.__doc__}", return_tensors="pt").input_ids
        return ids[:, : min(IDENTITY, self.limit)].to(self.model.device)

    def run(self, ids: Tensor, cache: Cache | None = None, **options: Any) -> Tensor:
        """Float64 logits [B, T, V]."""
        with KeepDouble():
            return logits(self.exact, ids, cache, **options)

    @cached_property
    def reference(self) -> Tensor:
        """Logits [2, T, V] of one forward without a cache."""
        return self.run(self.ids)

    @property
    def cut(self) -> int:
        """Where the prefill ends that rows, snapshots and single steps go on from."""
        return self.length - TAIL

    @cached_property
    def prefill(self) -> tuple[float, Cache]:
        """The prefix in chunks of random lengths -> (difference to the reference, the cache after it)."""
        cache = DynamicCache(config=self.exact.config)
        generator = torch.Generator().manual_seed(self.seed)
        inner = torch.randint(2, self.cut, (3,), generator=generator).tolist()
        splits = sorted({0, 1, *inner, self.cut})
        difference = 0.0
        for start, end in itertools.pairwise(splits):
            out = self.run(self.ids[:, start:end], cache)
            difference = max(difference, distance(out, self.reference[:, start:end]))
        return difference, cache

    def fork(self) -> Cache:
        """A copy of the cache after the prefill."""
        return copy.deepcopy(self.prefill[1])

    def follow(self, cache: Cache, rows: Sequence[int], tokens: int = 5) -> float:
        """Goes on from the prefill's cache, whose rows are now `rows` of the reference."""
        now = slice(self.cut, self.cut + tokens)
        return distance(self.run(self.ids[list(rows), now], cache), self.reference[list(rows), now])


def logits(model: Any, ids: Tensor, cache: Cache | None = None, **options: Any) -> Tensor:
    return model(input_ids=ids, use_cache=cache is not None, **{CACHE: cache}, **options).logits


def distance(a: Tensor, b: Tensor) -> float:
    """Max abs difference; infinite where a number is missing."""
    largest = (a - b).abs().max().item() if a.numel() else 0.0
    return largest if largest == largest else float("inf")


# --- laws: Subject -> (difference, note) --------------------------------------------------------------------


def chunked_prefill(subject: Subject) -> tuple[float, str]:
    difference, _ = subject.prefill
    return difference, f"logits, float64; {subject.cut} tokens at random splits, 2 rows"


def single_steps(subject: Subject) -> tuple[float, str]:
    cache, difference = DynamicCache(config=subject.exact.config), 0.0
    late = subject.fork()
    for start, end, held in ((0, HEAD, cache), (subject.cut, subject.length, late)):
        for t in range(start, end):
            out = subject.run(subject.ids[:, t : t + 1], held)
            difference = max(difference, distance(out[:, 0], subject.reference[:, t]))
    return difference, f"logits, float64; {HEAD} tokens from the empty state, the last {TAIL} with full slots"


def padding(subject: Subject) -> tuple[float, str]:
    """Row 0 is padded on the left, row 1 on the right; padding is a real token, so that reading it shows."""
    T, pad = subject.length, max(1, subject.length // 10)
    ids = subject.ids.clone()
    ids[0, pad:], ids[0, :pad] = subject.ids[0, : T - pad], subject.ids[1, :pad]
    mask = torch.ones_like(ids)
    mask[0, :pad], mask[1, T - pad :] = 0, 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    out = subject.run(ids, attention_mask=mask, position_ids=position_ids)
    left = distance(out[0, pad:], subject.reference[0, : T - pad])
    right = distance(out[1, : T - pad], subject.reference[1, : T - pad])
    return max(left, right), f"logits, float64; {pad} of {T} tokens padded; left {left:.1e}, right {right:.1e}"


def packing(subject: Subject) -> tuple[float, str]:
    """Documents are prefixes of the two rows: alone, their logits are the reference's (nothing looks ahead)."""
    documents = [(0, subject.length // 3), (1, subject.length // 2), (0, 5), (1, 17)]
    ids = torch.cat([subject.ids[row, :n] for row, n in documents])[None]
    position_ids = torch.cat([torch.arange(n, device=ids.device) for _, n in documents])[None]
    out = subject.run(ids, position_ids=position_ids)[0].split([n for _, n in documents])
    pairs = zip(out, documents, strict=True)
    difference = max(distance(part, subject.reference[row, :n]) for part, (row, n) in pairs)
    return difference, f"logits, float64; {len(documents)} documents in one row, each as if alone"


def static_cache(subject: Subject) -> tuple[float, str]:
    T = subject.length // 2
    cache = StaticCache(config=subject.exact.config, max_cache_len=T)
    difference = 0.0
    for start, end in ((0, T - 4), *((t, t + 1) for t in range(T - 4, T))):
        out = subject.run(subject.ids[:1, start:end], cache)
        difference = max(difference, distance(out, subject.reference[:1, start:end]))
    return difference, f"logits, float64; prefill of {T - 4} tokens and 4 steps"


def reordering(subject: Subject) -> tuple[float, str]:
    cache = subject.fork()
    cache.reorder_cache(torch.tensor([1, 0], device=subject.ids.device))  # type: ignore[arg-type]
    return subject.follow(cache, [1, 0]), "logits, float64; two beams change places"


def selection(subject: Subject) -> tuple[float, str]:
    cache = subject.fork()
    cache.batch_select_indices(torch.tensor([1], device=subject.ids.device))
    alone = subject.follow(copy.deepcopy(cache), [1])
    cache.batch_repeat_interleave(2)
    return max(alone, subject.follow(cache, [1, 1])), "logits, float64; one row of two, then forked"


def rollback(subject: Subject) -> tuple[float, str]:
    cache, other = subject.fork(), subject.ids[:, : TAIL - 5]
    layers = kernel_layers(cache)
    saved = [layer.snapshot() for layer in layers]
    cache.activate_past_recording()  # for softmax layers that are kept
    subject.run(other, cache)
    cache.crop(-other.shape[1])
    for layer, snapshot in zip(layers, saved, strict=True):
        layer.restore(snapshot)
    return subject.follow(cache, [0, 1]), f"logits, float64; back after {other.shape[1]} other tokens"


def cropping(subject: Subject) -> tuple[float, str]:
    """What assisted generation does: read a draft, keep its right beginning."""
    cache, right = subject.fork(), subject.ids[:, subject.cut : subject.cut + 3]
    cache.activate_past_recording()
    draft = torch.cat([right, subject.ids[:, : TAIL - 10]], 1)
    for piece in draft.split([2, draft.shape[1] - 3, 1], 1):
        subject.run(piece, cache)
    cache.crop(-(draft.shape[1] - 3))
    now = slice(subject.cut + 3, subject.cut + 8)
    difference = distance(subject.run(subject.ids[:, now], cache), subject.reference[:, now])
    return difference, f"logits, float64; 3 tokens of a draft of {draft.shape[1]} are kept"


def offloading(subject: Subject) -> tuple[float, str]:
    cache = subject.fork()
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    return subject.follow(cache, [0, 1]), "logits, float64; state to the CPU and back"


def softmax_identity(subject: Subject) -> tuple[float, str]:
    T = min(IDENTITY, subject.length)
    with whole_window(subject.exact, T):
        ours = subject.run(subject.ids[:1, :T])
    with softmax_twin(subject.exact) as twin, KeepDouble():
        difference = distance(logits(twin, subject.ids[:1, :T]), ours)
    return difference, f"logits, float64; {T} tokens, the model's own weights under softmax attention"


def teacher_identity(subject: Subject) -> tuple[float, str]:
    ids = subject.prose
    T = ids.shape[1]
    trained = changed_weights(subject.model, subject.against)
    with whole_window(subject.model, T):
        difference = distance(logits(subject.model, ids).float(), logits(subject.against.eval(), ids).float())
    if trained:
        found = f"{len(trained)} weights were trained, {trained[0]} among them"
        raise NotAskedError(f"not asked: {found}; logits differ by {difference:.2e}")
    return difference, f"logits, {subject.model.dtype}; {T} tokens"


def state_size(subject: Subject) -> tuple[float, str]:
    """Really reads LONG tokens, in the working dtype; only the last logits are made."""
    total = min(LONG, subject.limit)
    cache, sizes = DynamicCache(config=subject.model.config), []
    stream = subject.ids[:1].repeat(1, -(-total // subject.length))[:, :total]
    for start, end in ((0, SHORT), *((a, min(a + 1024, total)) for a in range(SHORT, total, 1024))):
        logits(subject.model, stream[:, start:end], cache, logits_to_keep=1)
        sizes.append(sum(layer.nbytes for layer in kernel_layers(cache)))
    difference = float(max(sizes) - min(sizes))
    return difference, f"bytes; {sizes[0]:,} after {SHORT} tokens, {sizes[-1]:,} after {total}"


def working_dtype(subject: Subject) -> tuple[float, str]:
    """Mean KL(float64 ‖ working dtype, in two chunks and a step) over the tokens of row 0."""
    T, cache = subject.length, DynamicCache(config=subject.model.config)
    pieces = [logits(subject.model, subject.ids[:1, a:b], cache) for a, b in ((0, T // 2), (T // 2, T - 1), (T - 1, T))]
    ours = torch.cat(pieces, 1)[0].double().log_softmax(-1)
    exact = subject.reference[0].log_softmax(-1)
    drift = (exact.exp() * (exact - ours)).sum(-1)
    agree = (exact.argmax(-1) == ours.argmax(-1)).double().mean().item()
    name = str(subject.model.dtype).removeprefix("torch.")
    return drift.mean().item(), f"nats a token, float64 against {name}; same first choice {agree:.1%}"


def save_and_load(subject: Subject) -> tuple[float, str]:
    mine = answer(subject.model)
    return distance(mine["logits"], subject.reloaded["logits"]), f"logits, {len(mine['logits'])} tokens"


def clean_process(subject: Subject) -> tuple[float, str]:
    assert subject.there is not None
    difference = compare(subject.folder, subject.reloaded, subject.there.result())
    return difference, "logits; remote code, where kernelize cannot be imported"


LAWS: dict[str, Callable[[Subject], tuple[float, str]]] = {
    "chunked prefill": chunked_prefill,
    "one token at a time": single_steps,
    "left- and right-padded batch": padding,
    "packed documents": packing,
    "static cache": static_cache,
    "beam reordering": reordering,
    "batch selection": selection,
    "snapshot and restore": rollback,
    "crop": cropping,
    "offload": offloading,
    "window ≥ length is softmax": softmax_identity,
    "identity with the teacher": teacher_identity,
    "state bytes": state_size,
    "working dtype": working_dtype,
    "save and load": save_and_load,
    "clean process": clean_process,
}


# --- what a law does to a model -----------------------------------------------------------------------------


@contextmanager
def whole_window(model: Any, length: int) -> Iterator[None]:
    """Within the context the window of every converted layer covers `length` tokens, all at their true distances, and
    the normaliser holds no learned logit: none was in the softmax."""
    parts = [attention.kernelize for attention in kernelized_layers(model).values()]
    specs = [part.spec for part in parts]
    try:
        for part in parts:
            part.spec = part.spec.replace(window=length, reach=0, sink_logits=False)
        yield
    finally:
        for part, spec in zip(parts, specs, strict=True):
            part.spec = spec


def changed_weights(model: Any, teacher: Any) -> list[str]:
    """Names of the teacher's weights that the model holds with other values."""
    mine = dict(model.named_parameters())
    missing = [name for name, _ in teacher.named_parameters() if name not in mine]
    if missing:
        raise InputError(f"the teacher has a weight {missing[0]!r} that the model lacks; it is another architecture")
    return [name for name, weight in teacher.named_parameters() if not torch.equal(weight.to(mine[name]), mine[name])]
