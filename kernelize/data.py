"""Training text: documents streamed from files, datasets or the teacher, tokenised and packed into rows.

A row is cut from the stream of documents; every piece of a document counts its positions from 0, and the first token
of a piece is no target, so that nothing crosses a border. All processes walk the same stream and take their own
micro-batches from it: the global batch does not depend on how many there are. The position in the stream is plain data.
"""

from __future__ import annotations

import itertools
import json
import lzma
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from .errors import InputError
from .files import PART, sync, writing
from .retrieval import Marked, write
from .texts import unbroken

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .recipe import DataSource

TEXT_PIECE = 1 << 17  # characters of a text file that make one document: bounds memory, and mixes long files
DOCUMENT = 1 << 24  # characters that one may have: what it costs to tokenise more is no mistake worth a night
BUFFER_DOCUMENTS = 1024
BUFFER_CHARACTERS = 1 << 22
WITHOUT_TEXT = 10_000  # documents in a row without a token, after which the source counts as empty
IGNORED = -100

HAYSTACK = 1 << 16  # characters that a retrieval document's haystack has at least, if the source has them
HAYSTACK_PER_TOKEN = 6  # characters of haystack for each token of a row
SHORTEST = 512  # tokens: the least length drawn for a retrieval document
TRIES = 4  # lengths tried until a retrieval document fits into what is left of a row
RATIO_CHARACTERS = 600  # of a haystack, by which its characters a token are guessed

Item = TypeVar("Item")
Document = dict[str, str]  # {"text"}, {"prompt", "response"}, or {"haystack"}


class Encoded(NamedTuple):
    """A document's tokens and which of them are answers."""

    ids: list[int]
    answers: list[bool]


class Row(NamedTuple):
    """One packed sequence. Positions restart at 0 with each document; labels are -100 there."""

    input_ids: Tensor  # [T]
    position_ids: Tensor  # [T]
    labels: Tensor  # [T]
    answers: Tensor  # [T] bool, the tokens of answers to be found again


# --- files ------------------------------------------------------------------------------------------------------------


def read_documents(path: str, text_field: str | None = "text") -> Iterator[Document]:
    """The documents of a .txt, .txt.xz, .jsonl or .parquet file; InputError names the file and what is wrong.

    Without a `text_field`, all the text in a row's columns, of whatever name, is its document.
    """
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


def _read_text(path: str, text_field: str | None) -> Iterator[Document]:
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
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


def _read_jsonl(path: str, text_field: str | None) -> Iterator[Document]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(DOCUMENT + 1), ""), 1):
            where = f"{path}, line {number}"
            if len(line) > DOCUMENT:
                raise InputError(f"{where}: longer than {DOCUMENT:,} characters; is it one document a line?")
            if line.strip():
                document = _document(_parse_line(line, where), text_field, where)
                yield {column: unbroken(text, where) for column, text in document.items()}


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is needed, not {type(value).__name__}")
    return value


def _read_parquet(path: str, text_field: str | None) -> Iterator[Document]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        columns = names if text_field is None else list(_columns(names, text_field, path))
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                yield _document(row, text_field, path)


READERS: dict[str, Callable[[str, str | None], Iterator[Document]]] = {
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


def _document(row: dict[str, Any], text_field: str | None, where: str) -> Document:
    if text_field is None:
        return {"text": "\n".join(_strings(row))}
    columns = _columns(list(row), text_field, where)
    for column in columns:
        if not isinstance(row[column], str):
            raise InputError(f"{where}: {column} holds {type(row[column]).__name__}, not text")
        if len(row[column]) > DOCUMENT:
            raise InputError(f"{where}: {column} is longer than {DOCUMENT:,} characters")
    if columns == (text_field,):
        return {"text": row[text_field]}
    return {column: row[column] for column in columns}


def _strings(value: Any) -> Iterator[str]:
    """Every piece of text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


# --- sources ----------------------------------------------------------------------------------------------------------


def open_source(source: DataSource, written: Path | None = None, haystack: int = HAYSTACK) -> datasets.IterableDataset:
    """The endless stream of a source's documents. `written` is the file of what the teacher wrote, for `self`;
    `haystack`, for `retrieval`, is the least number of characters of what things are hidden in.

    The first document is read at once, so that bad data is an InputError before anything is trained.
    """
    if source.dataset is not None:
        stream = _hub_dataset(source)
    else:
        path = source.path or str(written if source.builtin == "self" else _sample())
        options: dict[str, Any] = {"path": path, "text_field": source.text_field}
        read: Callable[..., Iterator[Document]] = read_documents
        if source.builtin == "retrieval":
            read, options = haystacks, {**options, "size": haystack}
        stream = datasets.IterableDataset.from_generator(read, gen_kwargs=options)
    next(iter(stream))
    return stream.repeat(None)


def haystacks(path: str, text_field: str, size: int) -> Iterator[Document]:
    """The documents of a file, joined until they have `size` characters; the last one may be shorter."""
    held, characters = list[str](), 0
    for document in read_documents(path, text_field):
        held.append("\n".join(document.values()))
        characters += len(held[-1])
        if characters >= size:
            yield {"haystack": "\n\n".join(held)}
            held, characters = [], 0
    if held:
        yield {"haystack": "\n\n".join(held)}


def _sample() -> Path:
    return Path(str(resources.files("kernelize.sample") / "train.txt"))


def _hub_dataset(source: DataSource) -> datasets.IterableDataset:
    try:
        stream = datasets.load_dataset(source.dataset, split=source.split, streaming=True)
        first = next(iter(stream), None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"data {source.dataset!r} is no file here, and as a dataset: {' '.join(str(error).split())}"
        ) from error
    if first is None:
        raise InputError(f"dataset {source.dataset!r}: split {source.split!r} is empty")
    columns = _columns(list(first), source.text_field, f"dataset {source.dataset!r}")
    stream = stream.select_columns(list(columns))
    return stream if columns != (source.text_field,) else stream.rename_columns({source.text_field: "text"})


def _mixed(sources: tuple[DataSource, ...], seed: int, written: Path | None, haystack: int) -> datasets.IterableDataset:
    streams = [open_source(source, written, haystack) for source in sources]
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
        haystack: int = HAYSTACK,
    ):
        self.stream = _mixed(sources, seed, written, haystack)
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


def encode_retrieval(
    haystack: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: str,
    room: int,
    shortest: int = SHORTEST,
    kind: str | None = None,
) -> Encoded:
    """At most `room` tokens of the haystack, with something to be found again if they suffice for that.

    The length is drawn between `shortest` and `room`; all follows from `seed`. `kind` is one of `retrieval.KINDS`, or
    any of them.
    """
    if not tokenizer.is_fast:
        raise InputError("data 'retrieval' needs a fast tokenizer, which knows where in the text a token stands")
    rng = random.Random(seed)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    target = rng.randint(min(shortest, room), room)
    sample = haystack[:RATIO_CHARACTERS]
    ratio = len(sample) / max(1, len(tokenizer(sample, verbose=False)["input_ids"]))
    characters, encoded = max(1, int((target - len(end)) * ratio * 0.97)), Encoded([], [])
    for _ in range(TRIES):
        marked = write(haystack, characters, random.Random(seed), kind)
        encoded = mark(marked, tokenizer, end)
        if not marked.answers or len(encoded.ids) <= room:
            break
        characters = int(characters * room / len(encoded.ids) * 0.98)
    else:
        return Encoded(encoded.ids[:room], [False] * room)
    return Encoded(encoded.ids[:room], encoded.answers[:room])


def mark(marked: Marked, tokenizer: PreTrainedTokenizerBase, end: list[int]) -> Encoded:
    """The tokens of a text and of its `end`, and which of them touch an answer."""
    found = tokenizer(marked.text, return_offsets_mapping=True, verbose=False)
    inside = np.zeros(len(marked.text) + 1, dtype=np.int64)
    for first, last in marked.answers:
        inside[first + 1 : last + 1] = 1
    before = inside.cumsum()
    offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    answers = before[offsets[:, 1]] > before[offsets[:, 0]]
    return Encoded(found["input_ids"] + end, [*answers.tolist(), *(False for _ in end)])


def pack(pieces: list[Encoded], joined: bool = False) -> Row:
    """One row out of pieces of documents; `joined`: as if they were one."""
    ids = torch.tensor([token for piece in pieces for token in piece.ids])
    answers = torch.tensor([answer for piece in pieces for answer in piece.answers])
    positions = torch.arange(len(ids)) if joined else torch.cat([torch.arange(len(piece.ids)) for piece in pieces])
    return Row(ids, positions, ids.masked_fill(positions == 0, IGNORED), answers & (positions > 0))


class Rows:
    """Packed rows of `length` tokens without end, as (row, position); `position` leads back to just after the row.

    A document goes on in the next row where it does not fit, but for those with something to be found again: they are
    made to fit into what is left of the row.
    """

    def __init__(self, documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int, joined: bool = False):
        self.documents, self.tokenizer, self.length, self.joined = documents, tokenizer, length, joined

    def __call__(self, position: dict[str, Any] | None = None) -> Iterator[tuple[Row, dict[str, Any]]]:
        skip, without = position["token"] if position else 0, 0
        pieces: list[Encoded] = []
        room = self.length
        for document, at in self.documents(position and position["document"]):
            if skip and "haystack" in document:
                skip = 0
                continue
            encoded = self._encode(document, at, room)
            without = 0 if encoded.ids else without + 1
            if without == WITHOUT_TEXT:
                raise InputError(f"the data holds no text: {without} documents in a row had no token")
            start, skip = skip, 0
            while start < len(encoded.ids):
                piece = Encoded(encoded.ids[start : start + room], encoded.answers[start : start + room])
                pieces.append(piece)
                start, room = start + len(piece.ids), room - len(piece.ids)
                if room == 0:
                    yield pack(pieces, self.joined), {"document": at, "token": start}
                    pieces, room = [], self.length

    def _encode(self, document: Document, at: dict[str, Any], room: int) -> Encoded:
        if "haystack" in document:
            seed = f"{self.documents.seed} {at['buffer']} {at['offset']}"
            return encode_retrieval(document["haystack"], self.tokenizer, seed, room)
        ids = encode(document, self.tokenizer)
        return Encoded(ids, [False] * len(ids)) if len(ids) > 1 else Encoded([], [])


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


def prefetched(items: Iterator[Item], depth: int = 2) -> Generator[Item]:
    """The same items of an endless iterator, of which `depth` are made ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(next, items) for _ in range(depth))
        try:
            while True:
                item = ahead.popleft().result()
                ahead.append(pool.submit(next, items))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


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
    part = path.with_suffix(PART)
    with writing(path), torch.random.fork_rng():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_samples(teacher, tokenizer, part, tokens, seed, length, batch)
        sync(part)
        part.replace(path)


def _write_samples(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    tokens: int,
    seed: int,
    length: int,
    batch: int,
) -> None:
    with path.open("w", encoding="utf-8") as file:
        torch.manual_seed(seed)
        written = 0
        while written < tokens:
            samples = _sample_documents(teacher, tokenizer, min(length, tokens), batch)
            written += sum(len(sample) for sample in samples)
            for text in tokenizer.batch_decode(samples, skip_special_tokens=True):
                if text.strip():
                    file.write(json.dumps({"text": text}) + "\n")


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
