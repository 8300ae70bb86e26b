"""A kernelized checkpoint as files for edge runtimes; docs/edge.md tells what is in them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, KernelizeError, first_line
from .runtime.modeling import KernelizedModelMixin

PRECISIONS = ("fp32", "fp16", "int8-float", "int8", "int4")
METADATA = "kernelize-edge.json"  # as kernelize.edge has it, which needs onnxruntime
HOST_ROPES = ("dynamic", "longrope")  # their frequencies are chosen on the host, by the length
LONGEST = 512  # tokens of a window that a comparison fills
FP32_TOLERANCE = 1e-4  # of logits, relative to the largest


@dataclass(frozen=True)
class Target:
    """A runtime that files are written for."""

    format: str  # as kernelize.edge names it
    extra: str  # of pyproject.toml
    needed: tuple[str, ...]  # packages
    precisions: tuple[str, ...]


TARGETS = {
    "onnx": Target("kernelize-edge 1", "export", ("onnx", "onnxscript", "onnxruntime"), PRECISIONS),
    "executorch": Target("kernelize-pte 1", "executorch", ("executorch", "onnxruntime"), ("fp32",)),
}


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its logits are from the checkpoint's on a short text."""

    folder: Path
    precision: str
    files: dict[str, int]  # bytes
    state_bytes: int  # of one row
    difference: float  # largest, relative to the largest logit


def export(
    source: str | Path,
    output: str | Path,
    *,
    to: str = "onnx",
    precision: str = "fp32",
    overwrite: bool = False,
    on_progress: Callable[[str], None] = lambda what: None,
    **loading: Any,
) -> Exported:
    """Writes a kernelized checkpoint for an edge runtime, and compares it with the original.

    InputError for a target or precision that is not known, a target whose packages are missing, a model that is not
    kernelized, is quantised or keeps softmax attention in a layer, and an output that is not empty; KernelizeError
    where the files do not compute what the checkpoint does.
    """
    from .convert import load
    from .files import check_apart, check_output

    check_request(to, precision)
    check_output(output, overwrite)
    check_apart(output, source)
    model, tokenizer = load(source, dtype="float32", **loading)
    return export_model(model, tokenizer, output, to=to, precision=precision, name=str(source), on_progress=on_progress)


def check_request(to: str, precision: str) -> None:
    if to not in TARGETS:
        raise InputError(f"to={to!r} is not one of {', '.join(TARGETS)}")
    target = TARGETS[to]
    if precision not in target.precisions:
        raise InputError(f"precision={precision!r} is not one of {', '.join(target.precisions)} (to={to!r})")
    missing = [name for name in target.needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"to={to!r} needs {', '.join(missing)}; run: pip install 'kernelize[{target.extra}]'")


def refuse(model: Any) -> None:
    """InputError for a model that has no constant state, is quantised, or whose graph would depend on the length."""
    if not isinstance(model, KernelizedModelMixin):
        raise InputError(f"the model is not kernelized ({model.config.model_type}); `kernelize convert` makes it so")
    config: Any = model.config
    if config.to_dict().get("quantization_config"):
        raise InputError("the model is quantised; export the checkpoint with full weights, and choose a precision here")
    kept = sorted(set(range(config.num_hidden_layers)) - set(model.converted))
    if kept:
        layers = ", ".join(map(str, kept))
        raise InputError(f"layers {layers} keep softmax attention, which an exported graph does not support")
    rope = (config.to_dict().get("rope_parameters") or {}).get("rope_type")
    if rope in HOST_ROPES:
        raise InputError(f"rope_type={rope!r} chooses its frequencies by the length, on the host: no graph holds it")


# --- any target ---------------------------------------------------------------------------------------------


def export_model(
    model: Any,
    tokenizer: Any,
    output: str | Path,
    *,
    to: str = "onnx",
    precision: str = "fp32",
    name: str = "model",
    on_progress: Callable[[str], None] = lambda what: None,
) -> Exported:
    """As `export`, of a model that is loaded, in float32; see there."""
    check_request(to, precision)
    refuse(model)
    if to == "executorch":
        return write_program(model, tokenizer, output, name, on_progress)
    graphs = trace_graphs(model, name, on_progress)
    on_progress(f"writing {precision}")
    return write_graphs(graphs, model, tokenizer, output, precision)


def write_folder(
    fill: Callable[[Path], dict[str, Any]], model: Any, tokenizer: Any, output: str | Path, precision: str
) -> Exported:
    """Writes the folder, complete or not at all; `fill` writes what the model is, and says what is known of it."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        facts = fill(aside)
        write_tokenizer(tokenizer, aside / "tokenizer.json")
        files = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        facts |= text_facts(model, tokenizer) | {"precision": precision, "files": files}
        (aside / METADATA).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
        difference = compare(aside, model)
        if precision == "fp32" and not difference <= FP32_TOLERANCE:
            raise KernelizeError(f"the graphs do not compute what the model does: logits differ by {difference:.1e}")
        take_over(aside, output)
    except OSError as error:
        raise KernelizeError(f"cannot write {str(output)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(output, precision, files, facts["state_bytes"], difference)


def state_facts(model: Any, layout: Any, most: int, name: str, to: str) -> dict[str, Any]:
    """What a runner needs to know of the state, and of when a block begins."""
    pairs = sorted({(layer.spec.block, layer.spec.ring) for layer in layout.layers})
    state = [
        {"name": name, "dtype": str(layout.dtype(name)).removeprefix("torch."), "shape": list(shape),
         "fill": layout.fill(name)}
        for name, shape in layout.shapes.items()
    ]  # fmt: skip
    return {
        "format": TARGETS[to].format,
        "source": name,
        "max_tokens": most,
        "blocks": [{"block": block, "ring": ring} for block, ring in pairs],
        "vocabulary": model.config.vocab_size,
        "state": state,
        "state_bytes": sum(x.nbytes for x in layout.empty(1).values()),
    }


def text_facts(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What a runner needs to know of texts."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
    begin = tokenizer("")["input_ids"]
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return {
        "eos": sorted({*eos, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}),
        "bos": begin[0] if begin else None,
        "chat_template": tokenizer.chat_template,
        "special_tokens": special,
    }


def write_tokenizer(tokenizer: Any, path: Path) -> None:
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} has no tokenizer.json, which a runner without Transformers needs")
    tokenizer.backend_tokenizer.save(str(path))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_over(aside: Path, output: Path) -> None:
    """Puts the finished folder where it belongs; what was exported there before goes."""
    aside.chmod(0o755)
    if output.exists():
        for file in aside.iterdir():
            file.replace(output / file.name)
    else:
        aside.rename(output)


@torch.no_grad()
def compare(folder: Path, model: Any) -> float:
    """The largest difference of logits to the model's, relative to the largest logit, on tokens past every window."""
    from .edge import open_model

    edge = open_model(folder)
    length = min(max(entry["ring"] for entry in edge.facts["blocks"]), LONGEST) + edge.facts["max_tokens"] + 3
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=ids, use_cache=False).logits[0, -2:].double()
    state = edge.start()
    first = torch.from_numpy(edge.read(state, ids[:, :-1].tolist()).copy())
    second = torch.from_numpy(edge.step(state, ids[0, -1:].tolist()).copy())
    return float((torch.cat([first, second]).double() - wanted).abs().max() / wanted.abs().max().clamp(min=1))


# --- ONNX ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graphs:
    """What was traced of a model: enough to write it in any precision."""

    model: Any  # ir.Model of new tokens inside a block
    leave: Any  # ir.Model of a block that leaves the window
    facts: dict[str, Any]  # of kernelize-edge.json, what is known by now


@contextmanager
def tracing(name: str) -> Iterator[None]:
    """KernelizeError where torch cannot trace; its warnings are about itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise KernelizeError(f"{name} cannot be traced: {first_line(error)}") from error


def trace_graphs(model: Any, name: str, on_progress: Callable[[str], None] = lambda what: None) -> Graphs:
    """Traces a float32 model. KernelizeError where torch cannot."""
    from .graphs import StateLayout, Tokens, shapes_of
    from .leaving import Leave
    from .onnx_files import share, trace

    layout = StateLayout(shapes_of(model))
    most = min(layer.spec.block for layer in layout.layers)
    batch, tokens = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim.DYNAMIC
    state, rows = layout.empty(2), {name: {0: batch} for name in layout.shapes}
    given = {"ids": torch.zeros(2, min(most, 3), dtype=torch.int64), "count": torch.ones(2, dtype=torch.int64)}
    dims = {"ids": {0: batch, 1: tokens} if most > 1 else {0: batch}, "count": {0: batch}}
    with tracing(name):
        on_progress("tracing what is between two blocks")
        leave = trace(Leave(model, layout), {"flat": state}, {"flat": rows})
        on_progress("tracing the model")
        whole = trace(Tokens(model, layout), {**given, "flat": state}, {**dims, "flat": rows})
    share(whole.graph)
    return Graphs(whole, leave, state_facts(model, layout, most, name, "onnx"))


def write_graphs(graphs: Graphs, model: Any, tokenizer: Any, output: str | Path, precision: str) -> Exported:
    """Writes the folder, complete or not at all. Changes `graphs`: they are used up, but for fp32."""
    from .onnx_files import lower, save

    def fill(folder: Path) -> dict[str, Any]:
        save(graphs.model, folder / "model.onnx", "weights.bin")
        save(graphs.leave, folder / "leave.onnx")
        named = {"model": interface(graphs.model, "model.onnx"), "leave": interface(graphs.leave, "leave.onnx")}
        return graphs.facts | {"graphs": named, "fingerprint": digest(folder / "weights.bin")}

    lower(graphs.model, precision)
    return write_folder(fill, model, tokenizer, output, precision)


def interface(model: Any, file: str) -> dict[str, Any]:
    from .onnx_files import in_place

    graph = model.graph
    return {
        "file": file,
        "inputs": [value.name for value in graph.inputs],
        "outputs": [value.name for value in graph.outputs],
        "in_place": in_place(graph),
    }


# --- ExecuTorch ---------------------------------------------------------------------------------------------


def write_program(
    model: Any, tokenizer: Any, output: str | Path, name: str, on_progress: Callable[[str], None]
) -> Exported:
    """Traces, lowers and writes a float32 model. KernelizeError where torch cannot trace it."""
    from .graphs import StateLayout, shapes_of
    from .programs import interface, lower, trace_methods, write

    layout = StateLayout(shapes_of(model))
    most = min(layer.spec.block for layer in layout.layers)
    with tracing(name):
        on_progress("tracing the model")
        methods = trace_methods(model, layout, most)
    graphs = {key: interface(method, layout) for key, method in methods.items()}
    on_progress("lowering to XNNPACK: minutes")
    program = lower(methods)

    def fill(folder: Path) -> dict[str, Any]:
        write(program, folder / "model.pte")
        known = {"program": "model.pte", "graphs": graphs, "fingerprint": digest(folder / "model.pte")}
        return state_facts(model, layout, most, name, "executorch") | known

    return write_folder(fill, model, tokenizer, output, "fp32")
