"""Reads a whole book into a state of constant size, saves it, and questions the file.

    python examples/read_a_book.py MODEL BOOK STATE [QUESTION...]

MODEL: a checkpoint that `kernelize convert` wrote. BOOK: a .txt or .txt.xz file, or "novel", a sample that kernelize
carries. STATE: the file for what was read; the book is read only if it is not there yet. Every question begins at the
end of the book, at the cost of the question alone. What a model can tell of a book depends on its size and on what its
slots kept: recall is bounded by the state.
"""

import sys
from pathlib import Path

import torch

from kernelize.convert import load
from kernelize.evaluate import read_text
from kernelize.recall import encode, start_ids
from kernelize.states import generate_from, load_state, read, save_state

QUESTIONS = ("Who is the main character of this book?", "Where does the story take place?")
TEMPLATE = "\n\nQuestion: {}\nAnswer:"


def read_book(model, tokenizer, book: str, state: str) -> None:
    """Feeds the book to the model, a chunk at a time, and writes the state."""
    ids = start_ids(tokenizer) + encode(tokenizer, read_text(book))
    print(f"reading {len(ids):,} tokens …", flush=True)
    save_state(read(model, torch.tensor([ids])), state, model)
    print(f"{state}: {Path(state).stat().st_size:,} bytes", flush=True)


def answer(model, tokenizer, state: str, question: str) -> str:
    ids = torch.tensor([encode(tokenizer, TEMPLATE.format(question))], device=model.device)
    cache = load_state(state, model)
    written = generate_from(model, cache, ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    return tokenizer.decode(written[0], skip_special_tokens=True).strip()


def main(source: str, book: str, state: str, *questions: str) -> None:
    model, tokenizer = load(source)
    if not Path(state).exists():
        read_book(model, tokenizer, book, state)
    for question in questions or QUESTIONS:
        print(f"{question}\n  {answer(model, tokenizer, state, question)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
