"""check() passes for a right model, and fails for each way of being wrong."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from families import tiny_student, tiny_teacher
from tiny import byte_tokenizer

from kernelize.check import LAWS, check
from kernelize.errors import InputError
from kernelize.runtime import attention, chunked, layout, modeling
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.spec import SpecError

pytestmark = pytest.mark.fast
WHOLE = ["window ≥ length is softmax", "identity with the teacher"]
MUTABLE = [name for name in LAWS if name not in ("clean process", "save and load", "state bytes", "working dtype")]


def failed(**options) -> set[str]:
    rows = check(tiny_student("llama"), only=MUTABLE, **options)
    return {row.name for row in rows if not row.passed}


def test_right_model_passes_every_law():
    seen = []
    rows = check(
        tiny_student("llama"), byte_tokenizer(), against=tiny_teacher("llama"),
        on_progress=lambda done, total, label: seen.append(label),
    )  # fmt: skip
    assert [row.name for row in rows] == list(LAWS) == seen[:-1]
    assert not [row for row in rows if not row.passed]


def test_a_learned_logit_is_no_part_of_the_softmax_that_a_whole_window_is():
    spec = families.SPEC.replace(sink_logits=True)
    student = modeling.kernelize_model(tiny_teacher("llama"), [spec] * tiny_teacher("llama").config.num_hidden_layers)
    assert [row.passed for row in check(student.eval(), against=tiny_teacher("llama"), only=WHOLE)] == [True, True]


def test_padding_that_is_not_masked(monkeypatch):
    monkeypatch.setattr(modeling, "layout_of", lambda *_: None)
    assert "left- and right-padded batch" in failed()


def test_state_that_is_not_reset_between_documents(monkeypatch):
    monkeypatch.setattr(layout, "packed", lambda position_ids: None)
    assert failed() == {"packed documents"}


def test_slots_off_by_one(monkeypatch):
    right = chunked.outlives
    monkeypatch.setattr(chunked, "outlives", lambda s, a, capacity, b: right(s, a, max(0, capacity - 1), b))
    assert "one token at a time" in failed()


def test_wrong_scaling(monkeypatch):
    right = KernelAttention.kernel
    monkeypatch.setattr(KernelAttention, "kernel", lambda self, scaling, *a: right(self, 1.01 * scaling, *a))
    assert failed() == {"window ≥ length is softmax"}


def test_swapped_groups(monkeypatch):
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v, *a, **kw: right(q, k.flip(1), v.flip(1), *a, **kw))
    assert failed() == {"window ≥ length is softmax"}


def test_state_that_forgets_the_chunk_before(monkeypatch):
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v, kernel, state=None, valid=None: right(q, k, v, kernel))
    assert "chunked prefill" in failed()


def test_trained_weights_are_not_held_against_the_teacher():
    student = tiny_student("llama")
    student.lm_head.weight.data += 0.1
    row = check(student, against=tiny_teacher("llama"), only=["identity with the teacher"])[0]
    assert row.passed is None
    assert "lm_head.weight" in row.note


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere", "gemma3_text"])
def test_a_reach_below_the_whole_window_is_set_aside_and_not_a_law_that_passes_unrun(name):
    student = tiny_student(name)
    reach = families.SPEC.least_reach
    for layer in modeling.kernelized_layers(student).values():
        layer.kernelize.spec = layer.kernelize.spec.replace(reach=reach)
    laws = ["window ≥ length is softmax", "identity with the teacher"]
    rows = check(student, against=tiny_teacher(name), only=laws, length=160)
    assert [(row.passed, row.difference is None) for row in rows] == [(True, False)] * 2
    assert {x.kernelize.spec.reach for x in modeling.kernelized_layers(student).values()} == {reach}


def test_a_way_of_running_that_is_refused_was_not_run(monkeypatch):
    def refused(subject):
        raise SpecError("window=0")

    monkeypatch.setitem(LAWS, "crop", refused)
    (row,) = check(tiny_student("llama"), only=["crop"])
    assert (row.passed, row.failed, row.note) == (None, False, "refused: window=0")


def test_low_precision_stays_within_its_bound():
    student = tiny_student("llama").bfloat16()
    rows = check(student, only=["working dtype", "chunked prefill"])
    assert all(row.passed for row in rows)
    assert rows[0].difference > 1e-9  # it was really another dtype


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match="not kernelized"):
        check(tiny_teacher("llama"))
    with pytest.raises(InputError, match="'beams' is not one of chunked prefill"):
        check(tiny_student("llama"), only=["beams"])
    with pytest.raises(InputError, match="length=9999"):
        check(tiny_student("llama"), length=9999)
    other = tiny_teacher("gpt2")
    row = check(tiny_student("llama"), against=other, only=["identity with the teacher"])[0]
    assert not row.passed
    assert "another architecture" in row.note


def test_the_model_is_left_as_it_was():
    student = tiny_student("llama")
    before = copy.deepcopy(student.state_dict())
    check(student, only=["window ≥ length is softmax", "chunked prefill"])
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(student).__name__ == "KernelizedLlamaForCausalLM"
