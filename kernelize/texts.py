"""What an evaluation reads: texts that ship and texts from files; lengths as people write them."""

from __future__ import annotations

import functools
import json
import lzma
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from .errors import InputError
from .recall import encode, start_ids
from .runtime.spec import SpecError, choose

SAMPLES = {"novel": "novel.txt", "code": "code.txt.xz", "train": "train.txt"}


LARGEST = 1 << 28  # bytes of a text


def sample_text(name: str) -> str:
    """A text that ships with kernelize: "novel" and "code" (unseen, for evaluation) or "train"."""
    choose_input("sample text", name, SAMPLES)
    raw = (files("kernelize.sample") / SAMPLES[name]).read_bytes()
    return (lzma.decompress(raw) if SAMPLES[name].endswith(".xz") else raw).decode("utf-8")


def read_text(source: str) -> str:
    """A sample's name, or a .txt, .txt.xz or .jsonl file; the `text` fields of JSON lines are joined with ""."""
    if source in SAMPLES:
        return sample_text(source)
    path = Path(source)
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            raw = file.read(LARGEST + 1).decode("utf-8-sig")
        if len(raw) > LARGEST:
            raise ValueError(f"longer than {LARGEST:,} bytes")
        text = _joined(raw) if path.suffix == ".jsonl" else _lines(raw)
    except (OSError, EOFError, ValueError, InputError, lzma.LZMAError) as error:
        raise InputError(f"text={source!r} cannot be read: {error}; a sample ({', '.join(SAMPLES)}), .txt, .txt.xz "
                         "or .jsonl with `text` is allowed") from error  # fmt: skip
    if not text.strip():
        raise InputError(f"text={source!r} is empty")
    return text


def _lines(raw: str) -> str:
    """Plain text with the ends of lines that training reads: newlines, whatever machine the file comes from."""
    return raw.replace("\r\n", "\n").replace("\r", "\n")


def _joined(lines: str) -> str:
    """The texts of JSON lines. They end in newlines alone: in a string other separators may stand as they are."""
    return "".join(_text(line, number) for number, line in enumerate(lines.split("\n"), 1) if line.strip())


def _text(line: str, number: int) -> str:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and "text" not in row:
            raise InputError(f"line {number}: no column 'text'; it has {', '.join(row) or 'none'}")
        text = row["text"]
        if not isinstance(text, str):
            raise TypeError(f"text holds {type(text).__name__}, not text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"line {number}: {type(error).__name__}: {error}") from error
    return unbroken(text, f"line {number}")


def unbroken(text: str, where: str) -> str:
    """`text`; InputError where it holds half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise InputError(f"{where}: {half} is half of a surrogate pair, and no character of its own") from error
    return text


def parse_length(text: str) -> int:
    """ "512" → 512, "4k" → 4096, "1m" → 1048576."""
    digits = text.strip().lower()
    factor = {"k": 1024, "m": 1024**2}.get(digits[-1:], 1)
    number = digits[:-1] if factor > 1 else digits
    if not number.isascii() or not number.isdigit() or len(number) > 18 or int(number) == 0:
        raise InputError(f"length {text!r} is not a positive number of tokens such as 512, 4k or 1m")
    return int(number) * factor


def parse_lengths(text: str) -> tuple[int, ...]:
    """ "1k,4k,128k" → (1024, 4096, 131072), sorted, each once."""
    return tuple(sorted({parse_length(part) for part in text.split(",")}))


def choose_input(field: str, value: object, allowed: Iterable) -> None:
    try:
        choose(field, value, list(allowed))
    except SpecError as error:
        raise InputError(str(error)) from None


@functools.lru_cache(maxsize=8)
def cut_pieces(tokenizer, source: str, length: int) -> list[list[int]]:
    """The text cut into consecutive pieces of exactly `length` tokens, the rest dropped."""
    start, ids = start_ids(tokenizer), encode(tokenizer, read_text(source))
    body = length - len(start)
    if len(ids) < body:
        raise InputError(f"text={source!r} has {len(ids)} tokens, too few for one piece of length={length}")
    return [start + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
