"""Transfer a few layers at a time: the same result, in the memory of those layers."""

from __future__ import annotations

import pytest
import torch
from families import tiny_student
from test_train import (
    ALL,
    TEXT,
    TRANSFER,
    CrashError,
    assert_same_weights,
    crash_at,
    losses_of,
    metric_of,
    recipe,
    run,
)
from tiny import tiny_llama

from kernelize.blockwise import blocks_of, groups, place
from kernelize.errors import InputError
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(feature_dim=16, window=9, sinks=1, slots=4, block=4)
STAGE = TRANSFER | {"steps": 4, "micro_batch": 2, "clip": 1e9}
LAYERS = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n\n".join(TEXT[start : start + 150] for start in range(0, len(TEXT), 150)))
    return str(path)


def student(keep=(2,)):
    teacher = tiny_llama(num_hidden_layers=LAYERS)
    return kernelize_model(teacher, [None if i in keep else SPEC for i in range(LAYERS)])


@pytest.fixture(scope="module")
def at_once(text, tmp_path_factory):
    return run(recipe(text, STAGE), tmp_path_factory.mktemp("once"), model=student())


def trained(model):
    return {name: p for name, p in model.named_parameters() if ".kernelize." in name}


@pytest.mark.parametrize("size", [3, 4, pytest.param(1, marks=pytest.mark.slow)])
def test_layers_in_groups_become_what_they_become_at_once(text, at_once, tmp_path, size):
    """All four in one group: bit for bit. In more groups the losses of the groups add up to that of the stage."""
    model, result, events = run(recipe(text, STAGE | {"layers_at_a_time": size}), tmp_path / "out", model=student())
    expected = losses_of(at_once[2])
    if size == 4:
        assert_same_weights(model, at_once[0])
        assert losses_of(events) == expected
        assert metric_of(events, "gradient_norm") == metric_of(at_once[2], "gradient_norm")
    for (name, p), q in zip(trained(model).items(), trained(at_once[0]).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    rounds = -(-4 // size)
    losses = torch.tensor(losses_of(events)).view(rounds, -1).sum(0)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert result.stages[0].steps == rounds * STAGE["steps"]
    assert not list((tmp_path / "out/hidden").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "family", ["gpt_neo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon", "gpt2"))]
)
def test_blocks_that_give_tuples_are_left_and_entered_alike(text, tmp_path, family):
    stage = STAGE | {"steps": 2}
    whole, _, _ = run(recipe(text, stage), tmp_path / "whole", model=tiny_student(family))
    parts, _, _ = run(recipe(text, stage | {"layers_at_a_time": 1}), tmp_path / "parts", model=tiny_student(family))
    for (name, p), q in zip(trained(parts).items(), trained(whole).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_no_more_than_a_group_is_on_the_device(text, tmp_path):
    """Beside embeddings and norm; the LM head stays away too."""
    model = student(keep=())
    block = sum(p.numel() for p in blocks_of(model)[0].parameters())
    around = model.model.embed_tokens.weight.numel() + model.model.norm.weight.numel()
    for group in groups(model, 2):
        held = place(model, group, "cpu", "meta")
        assert held == around + (group.end - group.first) * block
        assert held == sum(p.numel() for p in model.parameters() if not p.is_meta)
        model = student(keep=())
    _, _, events = run(recipe(text, STAGE | {"steps": 1, "layers_at_a_time": 2}), tmp_path / "out", model=model)
    assert [event["held_parameters"] - around for event in events if event["event"] == "stage"] == [
        2 * block, 2 * block, block
    ]  # fmt: skip


@pytest.mark.parametrize("step", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_a_crashed_run_resumes_to_the_same_bits(text, tmp_path, step):
    made = recipe(text, STAGE | {"layers_at_a_time": 2}, ALL | {"steps": 2}, checkpoint_steps=1)
    teacher = tiny_llama(num_hidden_layers=LAYERS)
    undisturbed, _, _ = run(made, tmp_path / "whole", model=student(), teacher=teacher)
    with pytest.raises(CrashError):
        run(made, tmp_path / "out", model=student(), on_event=crash_at("transfer", step), teacher=teacher)
    resumed, result, events = run(made, tmp_path / "out", model=student(), resume=True, teacher=teacher)
    assert result.completed
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps[0] == step
    assert_same_weights(resumed, undisturbed)


def test_only_a_transfer_can(text):
    with pytest.raises(InputError, match="layers_at_a_time needs kind='transfer'"):
        recipe(text, ALL | {"layers_at_a_time": 1})
