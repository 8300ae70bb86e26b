"""Training text: documents streamed from files, datasets or the teacher, tokenised and packed into rows.

A row is cut from the stream of documents; every piece of a document counts its positions from 0, and the first token
of a piece is no target, so that nothing crosses a border. All processes walk the same stream and take their own
micro-batches from it: the global batch does not depend on how many there are. The position in the stream is plain data.
"""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .recipe import DataSource

TEXT_PIECE = 1 << 17  # characters of a text file that make one document: bounds memory, and mixes long files
BUFFER_DOCUMENTS = 1024
BUFFER_CHARACTERS = 1 << 22
WITHOUT_TEXT = 10_000  # documents in a row without a token, after which the source counts as empty
IGNORED = -100

Document = dict[str, str]  # {"text"} or {"prompt", "response"}


class Row(NamedTuple):
    """One packed sequence. Positions restart at 0 with each document; labels are -100 there."""

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    labels: Tensor  # [T]


# --- files ------------------------------------------------------------------------------------------------------------


def read_documents(path: str, text_field: str = "text") -> Iterator[Document]:
    """The documents of a .txt, .txt.xz, .jsonl or .parquet file; InputError names the file and what is wrong."""
    reader = next((read for suffix, read in READERS.items() if path.endswith(suffix)), None)
    if reader is None:
        raise InputError(f"{path}: not a kind of data file that is read; allowed: {', '.join(READERS)}")
    found = False
    try:
        for document in reader(path, text_field):
            found = True
            yield document
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}, byte 0x{error.object[error.start]:02x})") from error
    except (OSError, EOFError, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not found:
        raise InputError(f"{path}: empty, there is no text in it")


def _read_text(path: str, text_field: str) -> Iterator[Document]:
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        rest = ""
        while piece := file.read(TEXT_PIECE):
            if "\0" in piece:
                raise InputError(f"{path}: binary, not text (it holds NUL characters)")
            head, newline, tail = (rest + piece).rpartition("\n")
            text, rest = (head + newline, tail) if head else (tail, "")
            if text.strip():
                yield {"text": text}
        if rest.strip():
            yield {"text": rest}


def _read_jsonl(path: str, text_field: str) -> Iterator[Document]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _document(_parse_line(line, f"{path}, line {number}"), text_field, f"{path}, line {number}")


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is needed, not {type(value).__name__}")
    return value


def _read_parquet(path: str, text_field: str) -> Iterator[Document]:
    with pyarrow.parquet.ParquetFile(path) as file:
        columns = _columns(file.schema_arrow.names, text_field, path)
        for batch in file.iter_batches(batch_size=64, columns=list(columns)):
            for row in batch.to_pylist():
                yield _document(row, text_field, path)


READERS: dict[str, Callable[[str, str], Iterator[Document]]] = {
    ".txt": _read_text,
    ".txt.xz": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _columns(names: list[str], text_field: str, where: str) -> tuple[str, ...]:
    if text_field in names:
        return (text_field,)
    if "prompt" in names and "response" in names:
        return ("prompt", "response")
    raise InputError(f"{where}: no column {text_field!r}, nor prompt and response; it has {', '.join(names) or 'none'}")


def _document(row: dict[str, Any], text_field: str, where: str) -> Document:
    columns = _columns(list(row), text_field, where)
    for column in columns:
        if not isinstance(row[column], str):
            raise InputError(f"{where}: {column} holds {type(row[column]).__name__}, not text")
    if columns == (text_field,):
        return {"text": row[text_field]}
    return {column: row[column] for column in columns}


# --- sources ----------------------------------------------------------------------------------------------------------


def open_source(source: DataSource, written: Path | None = None) -> datasets.IterableDataset:
    """The endless stream of a source's documents. `written` is the file of what the teacher wrote, for `self`.

    The first document is read at once, so that bad data is an InputError before anything is trained.
    """
    if source.dataset is not None:
        stream = _hub_dataset(source)
    else:
        path = source.path or str(written if source.builtin == "self" else _sample())
        stream = datasets.IterableDataset.from_generator(
            read_documents, gen_kwargs={"path": path, "text_field": source.text_field}
        )
    next(iter(stream))
    return stream.repeat(None)


def _sample() -> Path:
    return Path(str(resources.files("kernelize.sample") / "train.txt"))


def _hub_dataset(source: DataSource) -> datasets.IterableDataset:
    try:
        stream = datasets.load_dataset(source.dataset, split=source.split, streaming=True)
        first = next(iter(stream), None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"dataset {source.dataset!r}: {' '.join(str(error).split())}") from error
    if first is None:
        raise InputError(f"dataset {source.dataset!r}: split {source.split!r} is empty")
    columns = _columns(list(first), source.text_field, f"dataset {source.dataset!r}")
    stream = stream.select_columns(list(columns))
    return stream if columns != (source.text_field,) else stream.rename_columns({source.text_field: "text"})


def _mixed(sources: tuple[DataSource, ...], seed: int, written: Path | None) -> datasets.IterableDataset:
    streams = [open_source(source, written) for source in sources]
    if len(streams) == 1:
        return streams[0]
    total = sum(source.weight for source in sources)
    return datasets.interleave_datasets(
        streams,
        probabilities=[source.weight / total for source in sources],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


class Documents:
    """Shuffled documents without end, as (document, position); `position` leads back to just before the document.

    The stream is shuffled a buffer at a time, and a buffer's order depends on its number alone. So a position is
    small (the stream's own state at the buffer's start), and exact, which a rolling shuffle buffer's is not.
    """

    def __init__(
        self,
        sources: tuple[DataSource, ...],
        seed: int,
        *,
        written: Path | None = None,
        buffer: int = BUFFER_DOCUMENTS,
    ):
        self.stream = _mixed(sources, seed, written)
        self.seed, self.buffer = seed, buffer

    def __call__(self, position: dict[str, Any] | None = None) -> Iterator[tuple[Document, dict[str, Any]]]:
        start = position or {"buffer": 0, "offset": 0, "stream": self.stream.state_dict()}
        self.stream.load_state_dict(start["stream"])
        documents, number, offset, state = iter(self.stream), start["buffer"], start["offset"], start["stream"]
        while True:
            held = self._fill(documents)
            after = self.stream.state_dict()
            order = np.random.default_rng([self.seed, number]).permutation(len(held))
            for index in range(offset, len(held)):
                yield held[order[index]], {"buffer": number, "offset": index, "stream": state}
            number, offset, state = number + 1, 0, after

    def _fill(self, documents: Iterator[Document]) -> list[Document]:
        held: list[Document] = []
        characters = 0
        for row in itertools.islice(documents, self.buffer):
            # interleaving streams with different columns fills the missing ones with None
            document = {column: text for column, text in row.items() if text is not None}
            held.append(document)
            characters += sum(map(len, document.values()))
            if characters >= BUFFER_CHARACTERS:
                break
        return held


# --- rows -------------------------------------------------------------------------------------------------------------


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one document; prompt and response go through the chat template where the tokenizer has one."""
    if "text" in document:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return tokenizer(document["text"], verbose=False)["input_ids"] + end
    if tokenizer.chat_template is None:
        return encode({"text": f"{document['prompt']}\n{document['response']}"}, tokenizer)
    turns = [{"role": "user", "content": document["prompt"]}, {"role": "assistant", "content": document["response"]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def pack(pieces: list[list[int]], joined: bool = False) -> Row:
    """One row out of pieces of documents; `joined`: as if they were one."""
    ids = torch.tensor([token for piece in pieces for token in piece])
    positions = torch.arange(len(ids)) if joined else torch.cat([torch.arange(len(piece)) for piece in pieces])
    return Row(ids, positions, ids.masked_fill(positions == 0, IGNORED))


class Rows:
    """Packed rows of `length` tokens without end, as (row, position); `position` leads back to just after the row."""

    def __init__(self, documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int, joined: bool = False):
        self.documents, self.tokenizer, self.length, self.joined = documents, tokenizer, length, joined

    def __call__(self, position: dict[str, Any] | None = None) -> Iterator[tuple[Row, dict[str, Any]]]:
        skip = position["token"] if position else 0
        pieces: list[list[int]] = []
        room = self.length
        for tokens, document in self._encoded(position and position["document"]):
            start, skip = skip, 0
            while start < len(tokens):
                piece = tokens[start : start + room]
                pieces.append(piece)
                start, room = start + len(piece), room - len(piece)
                if room == 0:
                    yield pack(pieces, self.joined), {"document": document, "token": start}
                    pieces, room = [], self.length

    def _encoded(self, position: dict[str, Any] | None) -> Iterator[tuple[list[int], dict[str, Any]]]:
        without = 0
        for document, at in self.documents(position):
            tokens = encode(document, self.tokenizer)
            without = 0 if len(tokens) > 1 else without + 1
            if without == WITHOUT_TEXT:
                raise InputError(f"the data holds no text: {without} documents in a row had no token")
            if len(tokens) > 1:
                yield tokens, at


def fitting_micro_batch(rows: int, micro_batch: int, processes: int) -> int:
    """The most sequences, up to `micro_batch`, that cut a global batch of `rows` evenly over the processes."""
    if rows % processes:
        raise InputError(f"a batch of {rows} sequences cannot be shared out evenly to {processes} processes")
    share = rows // processes
    return max(size for size in range(1, micro_batch + 1) if share % size == 0)


def batches(
    rows: Iterator[tuple[Row, dict[str, Any]]], count: int, micro_batch: int, process: int = 0, processes: int = 1
) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """Global batches of `count` rows, as (this process's micro-batches of [b, T] tensors, position after the batch)."""
    while True:
        taken = list(itertools.islice(rows, count))
        micro = [taken[start : start + micro_batch] for start in range(0, count, micro_batch)]
        mine = micro[process::processes]
        yield [Row(*map(torch.stack, zip(*(row for row, _ in part), strict=True))) for part in mine], taken[-1][1]


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Tokens that the positions of a model reach; None for a model without such a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


# --- text by the teacher ----------------------------------------------------------------------------------------------


@torch.no_grad()
def write_text(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    tokens: int,
    *,
    seed: int,
    length: int = 1024,
    batch: int = 16,
) -> None:
    """Lets the teacher write `tokens` tokens as JSON lines: samples at temperature 1 that start from one token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file, torch.random.fork_rng():
        torch.manual_seed(seed)
        written = 0
        while written < tokens:
            samples = _sample_documents(teacher, tokenizer, min(length, tokens), batch)
            written += sum(len(sample) for sample in samples)
            for text in tokenizer.batch_decode(samples, skip_special_tokens=True):
                if text.strip():
                    file.write(json.dumps({"text": text}) + "\n")
    part.replace(path)


def _sample_documents(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, batch: int
) -> list[list[int]]:
    end = tokenizer.eos_token_id
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    if first is None:
        raise InputError("data 'self' needs a tokenizer with a first or a last token to start a text from")
    start = torch.full((batch, 1), first, device=teacher.device)
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": end or 0,
    }
    mask = torch.ones_like(start)
    written = teacher.generate(start, attention_mask=mask, max_new_tokens=length, **options)  # type: ignore[operator]
    samples = written[:, 1:].tolist()
    return [sample[: sample.index(end) + 1] if end in sample else sample for sample in samples]
