"""Files that are damaged or lie: valid ones, ways to spoil them, and what must hold when they are read.

`python tests/mutations.py COUNT SEED` reads COUNT spoilt files and reports what happened, by kind of file.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from gguf import GGUFWriter
from tiny import byte_tokenizer, tiny_llama
from transformers import DynamicCache

from kernelize import checkpoints
from kernelize.card import read_facts
from kernelize.cli.app import report_error
from kernelize.convert import convert, demo_source, load, save
from kernelize.data import read_documents
from kernelize.plan import ConversionPlan
from kernelize.recipe import load_recipe
from kernelize.rows import load_rows
from kernelize.runtime.spec import KernelSpec
from kernelize.sources import check_gguf
from kernelize.states import load_state, read, save_state
from kernelize.texts import read_text

SPEC = KernelSpec(feature_dim=8, window=9, sinks=1, slots=4, block=4)
NASTY: list[Any] = [
    None,
    -1,
    0,
    1,
    10**5,
    10**12,
    2**63,
    2**80,
    1e308,
    True,
    "",
    "x",
    "../../x",
    "é" * 9,
    [],
    {},
    [0] * 9,
]
LARGE = 1 << 24  # bytes of a file of which only the beginning is spoilt
SECONDS, MEMORY, ADDRESSES = (
    20,
    400 << 20,
    16 << 30,
)  # what reading one spoilt file may take at most; bytes over those of the whole ones


# --- spoiling ---------------------------------------------------------------------------------------------------------

Edit = tuple[str, float, bytes]  # (operation, where from 0 to 1, bytes)
OPERATIONS = ("flip", "cut", "insert", "delete", "write", "repeat", "empty", "huge")


def edited(raw: bytes, edits: list[Edit]) -> bytes:
    """`raw` after some edits of bytes."""
    out = bytearray(raw)
    for operation, where, some in edits:
        at, some = int(where * max(0, len(out) - 1)), some or b"\0"
        if operation == "flip" and out:
            out[at] ^= 1 << (some[0] % 8)
        elif operation == "cut":
            del out[at:]
        elif operation == "insert":
            out[at:at] = some
        elif operation == "delete":
            del out[at : at + len(some)]
        elif operation == "write":
            out[at : at + len(some)] = some
        elif operation == "repeat":
            out[at:at] = out[at : at + 64 * len(some)]
        elif operation == "empty":
            out.clear()
        elif operation == "huge":
            out[at : at + 8] = b"\xff" * 7 + b"\x7f"
    return bytes(out)


def some_edits(rng: random.Random, skew: int) -> list[Edit]:
    """At random, by `skew` the more to the beginning of the file, where headers are."""
    count = rng.choice((1, 1, 1, 2, 4))
    operations = rng.choices(OPERATIONS, (8, 2, 2, 2, 6, 1, 0.1, 3), k=count)
    return [(name, rng.random() ** skew, rng.randbytes(rng.randint(1, 12))) for name in operations]


def twisted(data: Any, rng: random.Random) -> Any:
    """Nested data with one value replaced by a nasty one, or taken away."""
    spots = list(_spots(data))
    if not spots:
        return rng.choice(NASTY)
    container, key = rng.choice(spots)
    if rng.random() < 0.15:
        del container[key]
    elif isinstance(container, dict) and rng.random() < 0.05:
        container[rng.choice(("auto_map", "x", "../y"))] = container.pop(key)
    else:
        container[key] = rng.choice(NASTY)
    return data


def _spots(data: Any):
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items)[:200]:
        yield data, key
        yield from _spots(value)


def spoilt_json(raw: bytes, rng: random.Random) -> bytes:
    return json.dumps(twisted(json.loads(raw), rng)).encode() if rng.random() < 0.7 else edited(raw, some_edits(rng, 1))


def spoilt_yaml(raw: bytes, rng: random.Random) -> bytes:
    whole = rng.random() < 0.3
    return edited(raw, some_edits(rng, 1)) if whole else yaml.safe_dump(twisted(yaml.safe_load(raw), rng)).encode()


def spoilt_safetensors(raw: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return edited(raw, some_edits(rng, 3))
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(twisted(json.loads(raw[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


def spoilt_bytes(raw: bytes, rng: random.Random) -> bytes:
    return edited(raw, some_edits(rng, rng.choice((1, 3))))


# --- what is read -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file: where a valid one is, how it is spoilt, who reads it."""

    path: Path
    spoil: Callable[[bytes, random.Random], bytes]
    read: Callable[[], object]
    weight: float = 1.0


def kinds(folder: Path) -> dict[str, Kind]:
    """Valid files of every kind that kernelize reads, made in `folder`."""
    torch.set_num_threads(1)
    plain, sharded, made = folder / "plain", folder / "sharded", folder / "made"
    tokenizer = byte_tokenizer(chat=True)
    tiny_llama().save_pretrained(plain)
    tiny_llama().save_pretrained(sharded, max_shard_size="30KB")
    for where in (plain, sharded):
        tokenizer.save_pretrained(where)
    model = convert(tiny_llama(), ConversionPlan.uniform(SPEC, 2))
    save(model, tokenizer, made)
    (made / "recipe.yaml").write_text(load_recipe("default").to_yaml())
    (made / "kernelize.json").write_text(
        json.dumps({"tokens": 5, "commands": ["kernelize convert x"], "rows": [_row()]})
    )
    cache = read(model, torch.arange(1, 41)[None], after=DynamicCache(config=model.config))
    save_state(cache, folder / "state.safetensors", model)
    place = checkpoints.State(0, 4, {"document": {}}, {"name": "r"}, [])
    checkpoints.write(folder / "run" / "checkpoints", "transfer", place, dict(model.named_parameters()), None, None)
    (folder / "rows.json").write_text(json.dumps({"rows": [_row()] * 3}))
    lines = [{"text": line} for line in read_text("train")[:20_000].splitlines() if line]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text(read_text("train")[:20_000])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "text.parquet")
    (folder / "recipe.yaml").write_text(load_recipe("default").to_yaml())
    write_gguf(folder / "gguf" / "tiny.gguf")
    saved = folder / "run" / "checkpoints" / "0-transfer-4"
    text, lines_, table = (str(folder / f"text.{suffix}") for suffix in ("txt", "jsonl", "parquet"))
    state, gguf, rows = folder / "state.safetensors", folder / "gguf" / "tiny.gguf", folder / "rows.json"
    shard = sorted(sharded.glob("*.safetensors"))[1]
    return {
        "safetensors": Kind(plain / "model.safetensors", spoilt_safetensors, lambda: load(plain), 3),
        "config.json": Kind(plain / "config.json", spoilt_json, lambda: load(plain), 3),
        "tokenizer.json": Kind(plain / "tokenizer.json", spoilt_json, lambda: load(plain)),
        "tokenizer_config.json": Kind(plain / "tokenizer_config.json", spoilt_json, lambda: load(plain)),
        "index": Kind(sharded / "model.safetensors.index.json", spoilt_json, lambda: load(sharded)),
        "shard": Kind(shard, spoilt_safetensors, lambda: load(sharded)),
        "plan in config.json": Kind(made / "config.json", spoilt_json, lambda: (load(made), read_facts(made)), 2),
        "facts of the card": Kind(made / "kernelize.json", spoilt_json, lambda: read_facts(made)),
        "GGUF": Kind(gguf, spoilt_bytes, lambda: load(gguf)),
        "recipe": Kind(folder / "recipe.yaml", spoilt_yaml, lambda: load_recipe(folder / "recipe.yaml"), 2),
        "text": Kind(Path(text), spoilt_bytes, lambda: list(read_documents(text))),
        "JSON lines": Kind(Path(lines_), spoilt_bytes, lambda: list(read_documents(lines_)), 2),
        "evaluation text": Kind(Path(lines_), spoilt_bytes, lambda: read_text(lines_)),
        "parquet": Kind(Path(table), spoilt_bytes, lambda: list(read_documents(table)), 2),
        "rows": Kind(rows, spoilt_json, lambda: load_rows(rows)),
        "state": Kind(state, spoilt_safetensors, lambda: load_state(state, model)),
        "training checkpoint": Kind(saved / "state.json", spoilt_json, lambda: checkpoints.last(saved.parent)),
    }


def real_kinds(folder: Path) -> dict[str, Kind]:
    """The header of the real checkpoint, which is larger than the tiny one's."""
    path = shutil.copy(demo_source(), folder / "real.gguf")
    return {"real GGUF": Kind(Path(path), spoilt_bytes, lambda: check_gguf(Path(path)))}


def _row() -> dict[str, Any]:
    return {"model": "m", "suite": "ppl", "metric": "ppl", "length": 8, "depth": None, "value": 1.0, "low": None,
            "high": None, "n": 1}  # fmt: skip


def write_gguf(path: Path) -> None:
    """A tiny Llama as GGUF, with a vocabulary of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model, tokens = tiny_llama(vocab_size=258), sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(258)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in tokens] + ["ab"])
    writer.add_token_types([1] * 258)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, value in model.state_dict().items():
        parts = name.split(".")
        layer = f"blk.{parts[2]}." if "layers" in parts else ""
        writer.add_tensor(f"{layer}{names[parts[-2]]}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- what must hold ---------------------------------------------------------------------------------------------------


class HangsError(Exception):
    pass


@contextmanager
def limited():
    """Raises HangsError in what takes longer than SECONDS. Only in the main thread."""

    def stop(*_):
        raise HangsError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind) -> str:
    """`read`, or `refused` with one line and exit code 2; else what went wrong."""
    small = kind.path.stat().st_size < LARGE
    before = hashlib.sha256(kind.path.read_bytes()).digest() if small else b""
    try:
        with limited():
            kind.read()
        said = "read"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        code = report_error(error)
        said = "refused" if code == 2 else f"bad: exit code {code}: {type(error).__name__}: {error}"
    changed = small and hashlib.sha256(kind.path.read_bytes()).digest() != before
    return "bad: the source was modified" if changed else said


def peak() -> int:
    """Bytes of this process at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main(count: int, seed: int) -> int:
    """Spoils `count` files, and says of each kind how many were read and refused; 1 if something else happened."""
    counted = Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        tried = kinds(Path(folder)) | real_kinds(Path(folder))
        for kind in tried.values():
            assert outcome(kind) == "read", kind.path
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, resource.RLIM_INFINITY))
        whole = peak()
        for number, what in _spoil_many(tried, count, seed):
            counted[what] += 1
            if what[1] not in ("read", "refused"):
                print(f"case {number}, {what[0]}: {what[1]}", flush=True)
            if number % 1000 == 0:
                print(f"{number} files, {(peak() - whole) >> 20} MB above the whole ones", flush=True)
        used = peak() - whole
    bad = sum(n for (_, what), n in counted.items() if what not in ("read", "refused"))
    for name in tried:
        print(f"{name:24} {counted[name, 'read']:6} read {counted[name, 'refused']:6} refused")
    print(f"{count} files: {bad} neither read nor refused; {used >> 20} MB above the whole ones at most")
    return int(bad > 0 or used > MEMORY)


def _spoil_many(tried: dict[str, Kind], count: int, seed: int) -> Iterator[tuple[int, tuple[str, str]]]:
    """(number, (kind, outcome)) of each file, of which the number and `seed` alone decide what becomes."""
    weights = [kind.weight for kind in tried.values()]
    for number in range(1, count + 1):
        rng = random.Random(f"{seed} {number}")
        name = rng.choices(list(tried), weights)[0]
        yield number, (name, _try(tried[name], rng))


def _try(kind: Kind, rng: random.Random) -> str:
    """Spoils a file, of a large one only the beginning, reads it, and makes it whole again."""
    size = kind.path.stat().st_size
    with kind.path.open("rb") as file:
        raw = file.read(min(size, LARGE >> 3))
    spoilt = kind.spoil(raw, rng)
    _put(kind.path, spoilt if size == len(raw) else spoilt[: len(raw)].ljust(len(raw), b"\0"), size == len(raw))
    try:
        return outcome(kind)
    finally:
        _put(kind.path, raw, size == len(raw))


def _put(path: Path, content: bytes, whole: bool) -> None:
    with path.open("wb" if whole else "r+b") as file:
        file.write(content)


if __name__ == "__main__":
    began = time.monotonic()
    code = main(int(sys.argv[1]), int(sys.argv[2]))
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(code)
