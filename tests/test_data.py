"""Data: what comes out is the text that went in; positions resume exactly; bad files are named."""

from __future__ import annotations

import itertools
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from kernelize.data import (
    IGNORED,
    Documents,
    Rows,
    batches,
    encode,
    fitting_micro_batch,
    longest_sequence,
    open_source,
    read_documents,
    write_text,
)
from kernelize.errors import InputError
from kernelize.recipe import DataSource

TEXTS = [f"document {number} " * (number + 1) for number in range(12)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def source(tmp_path):
    return DataSource(path=write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]))


@pytest.fixture
def pair(source, tmp_path):
    table = pyarrow.table({"prompt": ["why?", "how?"], "response": ["so", "thus"], "license": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    return (source, DataSource(path=str(tmp_path / "b.parquet"), weight=0.5))


def rows_of(sources, seed=0, length=32, buffer=5):
    return Rows(Documents(sources, seed, buffer=buffer), byte_tokenizer(chat=True), length)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_text(tmp_path):
    text = "Größe – 大小\nsecond line\n"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 3}])
    pyarrow.parquet.write_table(pyarrow.table({"id": [3], "text": [text]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.txt.xz", "a.jsonl", "a.parquet"):
        assert list(read_documents(str(tmp_path / name))) == [{"text": text}], name


def test_a_long_text_is_cut_at_lines_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {number}\n" for number in range(50_000)) + "x" * 300_000 + "\nend"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    pieces = [document["text"] for document in read_documents(str(tmp_path / "a.txt"))]
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert pieces[0].endswith("\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n \n", "empty"),
        ("a.txt", b"caf\xe9", "not UTF-8.*0xe9"),
        ("a.txt", b"PK\x00\x00", "binary"),
        ("a.txt.xz", b"not xz", "cannot be read"),
        ("a.txt.xz", lzma.compress(b"text" * 1000)[:-20], "cannot be read"),
        ("a.jsonl", b"\n", "empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: a JSON object is needed, not list"),
        ("a.jsonl", b'{"body": "a", "id": 3}\n', "no column 'text', nor prompt and response; it has body, id"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text holds int"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.csv", b"text", "allowed: .txt"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_documents(str(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_columns_are_found_before_training(tmp_path):
    with pytest.raises(InputError, match="nothing"):
        open_source(DataSource(path=str(tmp_path / "nothing.txt")))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="it has body, id"):
        open_source(DataSource(path=str(tmp_path / "a.parquet")))


def test_a_dataset_folder_reads_like_a_hub_dataset(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"body": text, "n": 1} for text in TEXTS])
    stream = open_source(DataSource(dataset=str(tmp_path), text_field="body"))
    assert [row["text"] for row in stream.take(len(TEXTS))] == TEXTS
    with pytest.raises(InputError, match="it has body, n"):
        open_source(DataSource(dataset=str(tmp_path)))
    with pytest.raises(InputError, match=r"data 'no/such.*' is no file here, and as a dataset"):
        open_source(DataSource(dataset=f"no/such/{tmp_path.name}"))


def test_the_shipped_sample_is_text():
    document = next(iter(open_source(DataSource(builtin="sample"))))
    assert len(document["text"]) > 1000


# --- packing ----------------------------------------------------------------------------------------------------------


def test_prompt_and_response_go_through_the_template():
    document = {"prompt": "a", "response": "b"}
    rendered = byte_tokenizer(chat=True)
    assert rendered.decode(encode(document, rendered)) == "<user>a\n<assistant>b\n"
    plain = byte_tokenizer()
    assert plain.decode(encode(document, plain)) == "a\nb</s>"


def test_rows_hold_every_token_once_and_respect_documents(source):
    tokenizer = byte_tokenizer()
    rows = [row for row, _ in itertools.islice(rows_of((source,), buffer=12)(), 60)]
    stream = torch.cat([row.input_ids for row in rows])
    texts = tokenizer.decode(stream).split("</s>")[:-1]
    assert sorted(texts[:12]) == sorted(TEXTS)
    for row in rows:
        starts = row.position_ids == 0
        assert row.input_ids.shape == (32,)
        assert starts[0]
        assert torch.equal(row.labels == IGNORED, starts)
        assert torch.equal(row.labels[~starts], row.input_ids[~starts])
        assert torch.equal(starts[1:], row.position_ids.diff() != 1)
        after_end = (row.input_ids[:-1] == tokenizer.eos_token_id).nonzero() + 1
        assert starts[after_end].all()


def test_the_seed_decides_the_order(source):
    first = [next(rows_of((source,), seed)())[0].input_ids for seed in (1, 1, 2)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_resuming_continues_exactly(pair, cut):
    undisturbed = list(itertools.islice(rows_of(pair)(), cut + 20))
    position = json.loads(json.dumps(undisturbed[cut - 1][1]))
    resumed = itertools.islice(rows_of(pair)(position), 20)
    for (row, at), (expected, expected_at) in zip(resumed, undisturbed[cut:], strict=True):
        assert same(row, expected)
        assert at == expected_at


def test_weights_are_shares_of_documents(tmp_path):
    paths = [write_jsonl(tmp_path / f"{letter}.jsonl", [{"text": letter * 5}]) for letter in "ab"]
    sources = tuple(DataSource(path=path, weight=weight) for path, weight in zip(paths, (3.0, 1.0), strict=True))
    drawn = [document["text"][0] for document, _ in itertools.islice(Documents(sources, 0)(), 400)]
    assert 0.68 < drawn.count("a") / len(drawn) < 0.82


def test_documents_without_a_token_do_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("kernelize.data.WITHOUT_TEXT", 50)
    source = DataSource(path=write_jsonl(tmp_path / "a.jsonl", [{"text": ""}]))
    with pytest.raises(InputError, match="no text"):
        next(rows_of((source,))())


def test_processes_share_one_global_batch(source):
    def taken(process, processes):
        return list(itertools.islice(batches(rows_of((source,))(), 8, 2, process, processes), 3))

    alone, shared = taken(0, 1), [taken(process, 2) for process in (0, 1)]
    for step in range(3):
        micro = [part for parts in zip(*(run[step][0] for run in shared), strict=True) for part in parts]
        assert len(micro) == 4
        assert all(same(a, b) for a, b in zip(micro, alone[step][0], strict=True))
        assert shared[0][step][1] == alone[step][1]


def test_the_micro_batch_fits_the_processes():
    assert fitting_micro_batch(8, 4, 1) == 4
    assert fitting_micro_batch(8, 4, 4) == 2
    assert fitting_micro_batch(6, 4, 1) == 3
    with pytest.raises(InputError, match=r"6 sequences .* 4 processes"):
        fitting_micro_batch(6, 1, 4)


# --- text by the teacher ----------------------------------------------------------------------------------------------


def test_the_teacher_writes_the_same_text_again(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    for name in ("a", "b"):
        write_text(model, tokenizer, tmp_path / f"{name}.jsonl", 200, seed=3, length=24, batch=4)
    texts = [(tmp_path / f"{name}.jsonl").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    stream = open_source(DataSource(builtin="self"), tmp_path / "a.jsonl")
    assert len(list(stream.take(3))) == 3


def test_longest_sequence():
    assert longest_sequence(tiny_llama().config) == 256
