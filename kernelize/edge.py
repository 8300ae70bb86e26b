"""Runs what `kernelize export` wrote: needs onnxruntime, tokenizers and numpy, and neither torch nor a GPU.

    model = EdgeModel("exported")
    state = model.start()
    for text in model.write(state, "Once upon a time", max_new_tokens=64):
        print(text, end="", flush=True)

The state has a constant size, whatever was read; it can be saved, loaded and copied. docs/edge.md tells the format.
`python -m kernelize.edge FOLDER --prompt …` is the same for a shell; chat templates need jinja2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from tokenizers import Tokenizer

from .errors import InputError, KernelizeError, first_line

FORMAT = "kernelize-edge 1"
PROGRAM_FORMAT = "kernelize-pte 1"  # an ExecuTorch program: edge_program.py runs it
STATE_FORMAT = "kernelize-edge state 1"
METADATA = "kernelize-edge.json"
DTYPES = {"float32": np.float32, "int64": np.int64}
UNLOADABLE = (
    ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile, ort_errors.NotImplemented, ort_errors.RuntimeException,
)  # fmt: skip
UNFINISHED = "\ufffd"  # how the decoder shows the first bytes of a character whose last ones are still to come


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. Temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all in the race."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("temperature", self.temperature >= 0, "0 or above"),
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)} is not allowed: {allowed}")


class Sampler:
    """Picks tokens after a `Sampling`; the same seed gives the same tokens."""

    def __init__(self, sampling: Sampling):
        self.sampling, self.random = sampling, np.random.default_rng(sampling.seed)

    def pick(self, logits: np.ndarray) -> np.ndarray:
        """logits [B, V] -> tokens [B]."""
        if not self.sampling.temperature:
            return logits.argmax(-1)
        scores = np.stack([self._limited(row / self.sampling.temperature) for row in logits.astype(np.float64)])
        return (scores + self.random.gumbel(size=scores.shape)).argmax(-1)

    def _limited(self, scores: np.ndarray) -> np.ndarray:
        """scores [V] with −inf where top_k or top_p leaves a token out."""
        order = np.argsort(-scores, kind="stable")
        probability = np.exp(scores[order] - scores[order[0]])
        before = np.cumsum(probability) - probability  # of better tokens
        out = before >= self.sampling.top_p * probability.sum()
        if self.sampling.top_k:
            kept = probability[: self.sampling.top_k]
            out = before >= self.sampling.top_p * kept.sum()
            out[self.sampling.top_k :] = True
        limited = scores.copy()
        limited[order[out]] = -np.inf
        return limited


# --- the state ----------------------------------------------------------------------------------------------


class State:
    """What a model remembers of B rows: arrays that stay where they are."""

    def __init__(self, model: EdgeModel, rows: int):
        if rows < 1:
            raise InputError(f"rows={rows} is below 1")
        self.model, self.rows = model, rows
        self.logits = np.zeros((rows, model.facts["vocabulary"]), np.float32)
        self.arrays = model.blank(rows)  # the tensors now, by name; the batch axis first
        beside = {name for names in model.beside.values() for name in names}
        self.beside = {name: np.empty_like(self.arrays[name]) for name in beside}  # where graphs write these
        self.bindings: dict[str, Any] = {}

    @property
    def seen(self) -> np.ndarray:
        """Tokens read so far, [B]."""
        return self.arrays["seen"]

    @property
    def nbytes(self) -> int:
        """Of all rows; the same however much was read."""
        return sum(x.nbytes for x in self.arrays.values())

    def copy(self, rows: Sequence[int] | None = None) -> State:
        """A copy, or one of the given rows, in that order and as often as they are named."""
        chosen = list(range(self.rows)) if rows is None else list(rows)
        new = State(self.model, len(chosen))
        for name, array in self.arrays.items():
            new.arrays[name][:] = array[chosen]
        new.logits[:] = self.logits[chosen]
        return new

    def save(self, path: str | Path) -> Path:
        """Writes a file whose size does not depend on what was read; it is complete or not there."""
        path, facts = Path(path), self.model.facts
        head = json.dumps({"format": STATE_FORMAT, "fingerprint": facts["fingerprint"]})
        aside = path.with_name(f".{path.name}.part")
        try:
            with aside.open("wb") as file:
                arrays: dict[str, Any] = {"head": np.array(head), "logits": self.logits, **self.arrays}
                np.savez(file, **arrays)
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise KernelizeError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
        return path


# --- the model ----------------------------------------------------------------------------------------------


class EdgeModel:
    """An exported folder, ready to run. InputError for one that is none, is incomplete, or is of another format."""

    FORMAT = FORMAT

    def __init__(self, folder: str | Path, *, threads: int = 0):
        self.folder = Path(folder)
        self.facts = read_facts(self.folder, self.FORMAT)
        self.tokenizer = self._tokenizer()
        self.eos = set(self.facts["eos"])
        self.beside = {name: not_in_place(graph) for name, graph in self.facts["graphs"].items()}
        self._load(threads)

    def _load(self, threads: int) -> None:
        self.sessions = {name: self._session(name, threads) for name in self.facts["graphs"]}

    def _tokenizer(self) -> Tokenizer:
        try:
            return Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more special
            raise InputError(f"cannot read {str(self.folder / 'tokenizer.json')!r}: {first_line(error)}") from error

    def _session(self, name: str, threads: int) -> ort.InferenceSession:
        graph, options = self.facts["graphs"][name], ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = name == "model"  # what runs once a block gives its memory back
        path = self.folder / graph["file"]
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except UNLOADABLE as error:
            raise InputError(f"{str(path)!r} is no graph that ONNX Runtime loads: {first_line(error)}") from error
        found = [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]
        if found != (graph["inputs"], graph["outputs"]):
            raise InputError(f"{str(path)!r} is not the graph that {METADATA} describes: its inputs or outputs differ")
        return session

    # --- states ---------------------------------------------------------------------------------------------

    def blank(self, rows: int) -> dict[str, np.ndarray]:
        """The tensors of a state before the first token."""
        found = {}
        for entry in self.facts["state"]:
            found[entry["name"]] = np.zeros((rows, *entry["shape"]), DTYPES[entry["dtype"]])  # no memory until used
            if entry["fill"]:
                found[entry["name"]][:] = entry["fill"]
        return found

    def start(self, rows: int = 1) -> State:
        """The state before the first token."""
        return State(self, rows)

    def load_state(self, path: str | Path) -> State:
        """The state saved at `path`; InputError if it is no state, or that of another model."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            head = json.loads(str(arrays.pop("head")))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InputError(f"{str(path)!r} is no saved state: {first_line(error)}") from error
        if head.get("format") != STATE_FORMAT or head.get("fingerprint") != self.facts["fingerprint"]:
            raise InputError(f"{str(path)!r} is the state of another model, or of another export of this one")
        state = self.start(len(arrays["seen"]))
        state.logits[:] = arrays.pop("logits")
        for name, array in arrays.items():
            state.arrays[name][:] = array
        return state

    # --- tokens ---------------------------------------------------------------------------------------------

    def read(self, state: State, ids: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Reads each row's further ids, as many as it has; logits [B, V] after each row's last token so far."""
        rows = [np.asarray(row, np.int64).reshape(-1) for row in ids]
        if len(rows) != state.rows:
            raise InputError(f"{len(rows)} rows of tokens for a state of {state.rows} rows")
        for row in rows:
            if len(row) and not (row.min() >= 0 and row.max() < self.facts["vocabulary"]):
                raise InputError(f"token ids must lie in 0 … {self.facts['vocabulary'] - 1}")
        done = np.zeros(state.rows, np.int64)
        total = np.array([len(row) for row in rows])
        while (done < total).any():
            count = np.minimum(total - done, self._room(state.seen))
            chunk = np.zeros((state.rows, int(count.max())), np.int64)
            for r, row in enumerate(rows):
                chunk[r, : count[r]] = row[done[r] : done[r] + count[r]]
            self._advance(state, chunk, count)
            done += count
        return state.logits

    def step(self, state: State, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Reads one token a row, [B] -> logits [B, V]."""
        return self.read(state, np.asarray(tokens, np.int64)[:, None])

    def _room(self, seen: np.ndarray) -> np.ndarray:
        """Tokens that each row can take before a block begins, [B]."""
        left = np.full_like(seen, self.facts["max_tokens"])
        for entry in self.facts["blocks"]:
            left = np.minimum(left, entry["block"] - seen % entry["block"])
        return left

    def _block_begins(self, seen: np.ndarray) -> bool:
        """Whether a block leaves the window of any row before its next token."""
        return any(((seen % e["block"] == 0) & (seen >= e["ring"])).any() for e in self.facts["blocks"])

    def _advance(self, state: State, chunk: np.ndarray, count: np.ndarray) -> None:
        """chunk [B, T], of which a row's first count [B] are meant, all inside a block."""
        if self._block_begins(state.seen):
            self._run(state, "leave", {})
        kept = state.logits[count == 0]
        self._run(state, "model", {"ids": chunk, "count": count})
        state.logits[count == 0] = kept

    def _run(self, state: State, name: str, given: dict[str, np.ndarray]) -> None:
        """Runs a graph on the state, and takes over what it gives."""
        binding = self._binding(state, name)
        for entry, array in given.items():
            binding.bind_cpu_input(entry, array)
        self.sessions[name].run_with_iobinding(binding)
        for entry in self.beside[name]:
            state.arrays[entry][:] = state.beside[entry]

    def _binding(self, state: State, name: str) -> Any:
        """The graph's inputs and outputs at the state's arrays. What may be overwritten is: no copy a step."""
        if name not in state.bindings:
            graph = self.facts["graphs"][name]
            binding = state.bindings[name] = self.sessions[name].io_binding()
            arrays, beside = (self._values(x) for x in (state.arrays, state.beside))
            for entry in graph["inputs"]:
                if entry in arrays:
                    binding.bind_ortvalue_input(entry, arrays[entry])
            for entry in graph["outputs"]:
                if entry == "logits":
                    binding.bind_ortvalue_output(entry, ort.OrtValue.ortvalue_from_numpy(state.logits))
                else:
                    changed = entry.removeprefix("new.")
                    target = arrays if changed in graph["in_place"] else beside
                    binding.bind_ortvalue_output(entry, target[changed])
        return state.bindings[name]

    def _values(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """The arrays' own memory, as ONNX Runtime takes it."""
        return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}

    # --- text -----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Token ids of a text; one that goes on gets no special tokens in front."""
        return self.tokenizer.encode(text, add_special_tokens=begins).ids

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """The messages in the model's chat template. InputError without a template, or without jinja2."""
        if not self.facts["chat_template"]:
            raise InputError("the model has no chat template")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise InputError("a chat template needs jinja2; run: pip install jinja2") from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        try:
            template = environment.from_string(self.facts["chat_template"])
            return template.render(messages=messages, add_generation_prompt=True, **self.facts["special_tokens"])
        except TemplateError as error:
            raise InputError(f"the chat template refuses these messages: {first_line(error)}") from error

    def tokens(self, state: State, ids: Sequence[int], max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        """Reads `ids` into a state of one row, and writes up to `max_new_tokens`; the last may be one that ends a text.

        Every token that is handed out has been read, but the last: the state goes on from there.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} is below 1")
        if not len(ids) and not state.seen[0]:
            raise InputError("the prompt is empty")
        sampler, logits = Sampler(sampling), self.read(state, [ids])
        for n in range(max_new_tokens):
            token = int(sampler.pick(logits)[0])
            yield token
            if token in self.eos or n + 1 == max_new_tokens:
                return
            logits = self.step(state, [token])

    def write(
        self, state: State, prompt: str, *, max_new_tokens: int = 256, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Reads a prompt after what the state (one row) has read, and gives the continuation piece by piece."""
        ids = self.encode(prompt, begins=not state.seen[0])
        written: list[int] = []
        shown = 0
        for token in self.tokens(state, ids, max_new_tokens, sampling or Sampling()):
            written.append(token)
            text = self.tokenizer.decode(written)
            if not text.endswith(UNFINISHED):
                yield text[shown:]
                shown = len(text)
        rest = self.tokenizer.decode(written)[shown:]
        if rest:
            yield rest


def not_in_place(graph: dict[str, Any]) -> list[str]:
    """The tensors of the state that a graph writes beside the old ones; of a program, that is all it gives."""
    changed = [name.removeprefix("new.") for name in graph["outputs"] if name != "logits"]
    return [name for name in changed if name not in graph.get("in_place", changed)]


def open_model(folder: str | Path, *, threads: int = 0) -> EdgeModel:
    """The exported folder with the runtime that it was made for; InputError as EdgeModel has it."""
    if read_format(Path(folder)) != PROGRAM_FORMAT:
        return EdgeModel(folder, threads=threads)
    try:
        from .edge_program import ProgramModel
    except ImportError as error:
        raise InputError(f"{str(folder)!r} is for ExecuTorch; run: pip install 'kernelize[executorch]'") from error
    return ProgramModel(folder, threads=threads)


def read_format(folder: Path) -> Any:
    return read_description(folder).get("format")


def read_description(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    try:
        facts = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{str(folder)!r} is no exported model: it has no {METADATA}") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is damaged: {first_line(error)}") from error
    if not isinstance(facts, dict):
        raise InputError(f"{str(path)!r} is damaged: no object")
    return facts


def read_facts(folder: Path, wanted: str) -> dict[str, Any]:
    """kernelize-edge.json of a folder in the `wanted` format whose files are all there, and whole; else InputError."""
    facts = read_description(folder)
    if facts.get("format") != wanted:
        raise InputError(f"{str(folder / METADATA)!r} is not of the format {wanted!r}")
    for name, size in facts["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found is None:
            raise InputError(f"{str(folder)!r} is incomplete: {name} is missing")
        if found != size:
            raise InputError(f"{str(folder / name)!r} is damaged: {found} bytes, and {size} were exported")
    return facts


# --- for a shell --------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("python -m kernelize.edge", description="Write text with an exported model.")
    found.add_argument("folder", help="what `kernelize export` wrote")
    found.add_argument("--prompt", required=True, help="text to go on from")
    found.add_argument("--document", metavar="FILE", help="text that is read first")
    found.add_argument("--chat", action="store_true", help="the prompt is a question, in the model's chat template")
    found.add_argument("--load-state", metavar="FILE", help="go on from what was read before")
    found.add_argument("--save-state", metavar="FILE", help="save what was read, before anything is written")
    found.add_argument("--max-new-tokens", type=int, default=256)
    found.add_argument("--temperature", type=float, default=0.0)
    found.add_argument("--top-k", type=int, default=0)
    found.add_argument("--top-p", type=float, default=1.0)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--threads", type=int, default=0, help="0: one a core")
    return found


def run(options: argparse.Namespace) -> None:
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    model = open_model(options.folder, threads=options.threads)
    state = model.load_state(options.load_state) if options.load_state else model.start()
    if options.document:
        model.read(state, [model.encode(read_document(options.document), begins=not state.seen[0])])
    if options.save_state:
        state.save(options.save_state)
    prompt = options.prompt
    if options.chat:
        prompt = model.chat_prompt([{"role": "user", "content": prompt}])
    for text in model.write(state, prompt, max_new_tokens=options.max_new_tokens, sampling=sampling):
        print(text, end="", flush=True)
    print()


def read_document(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path!r}: {first_line(error)}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes as those of `kernelize`: 0 done, 1 failure, 2 bad input."""
    try:
        run(parser().parse_args(arguments))
    except KernelizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
