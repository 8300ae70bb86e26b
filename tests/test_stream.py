"""A streamed conversion gives what one in memory gives, and holds a layer at a time."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_train import assert_same_weights
from tiny import byte_tokenizer, tiny_llama

from kernelize.budget import Budget, BudgetText
from kernelize.convert import initialise, load
from kernelize.errors import InputError
from kernelize.objectives import NEW
from kernelize.pipeline import convert_source
from kernelize.plan import ConversionPlan
from kernelize.recipe import Recipe
from kernelize.stream import INDEX, local_folder, recomputing, streamed_model

KERNEL = {"feature_dim": 16, "window": 32, "sinks": 1, "slots": 24, "block": 8}


def recipe(**fields):
    return Recipe.from_dict({"name": "r", "description": "d", "kernel": KERNEL} | fields)


def make_source(folder, tied):
    model = tiny_llama(num_hidden_layers=3, tie_word_embeddings=tied, max_position_embeddings=512)
    model.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def source(request, tmp_path):
    return make_source(tmp_path / "source", request.param)


@pytest.mark.parametrize("budget", ["uniform", "auto"])
def test_a_streamed_conversion_is_the_one_in_memory(source, tmp_path, budget):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    for name, stream in (("whole", False), ("streamed", True)):
        convert_source(str(source), lambda layers: recipe(budget=budget), tmp_path / name, stream=stream)
    whole, streamed = (load(tmp_path / name)[0] for name in ("whole", "streamed"))
    assert streamed.config.kernelize == whole.config.kernelize
    assert_same_weights(streamed, whole)
    assert {file.name for file in (tmp_path / "whole").iterdir()} - {"model.safetensors"} <= {
        file.name for file in (tmp_path / "streamed").iterdir()
    }
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_no_more_than_a_module_is_held(tmp_path):
    """Of the source's parameters, while the model computes; and nothing after."""
    source, plan = make_source(tmp_path / "source", False), ConversionPlan.from_recipe(recipe(), 3)
    model, _ = streamed_model(str(source), source, plan)
    held = []

    def count(*_):
        held.append(sum(p.numel() for name, p in model.named_parameters() if NEW not in name and not p.is_meta))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    with recomputing(model):
        initialise(model, [torch.arange(1, 200)[None]], Budget([BudgetText(torch.arange(1, 200)[None])]))
    largest = max(p.numel() for p in model.parameters())
    assert 0 < max(held) <= largest
    count()
    assert held[-1] == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source: next(source.glob("*.safetensors")).unlink(), "which is not there"),
        (lambda source: (source / INDEX).write_text("{"), "cannot be read as JSON"),
        (lambda source: (source / INDEX).write_text('{"weight_map": {"a": "../b.safetensors"}}'), "no file of its own"),
        (lambda source: (source / INDEX).unlink(), "has neither"),
        (lambda source: next(source.glob("*.safetensors")).write_bytes(b"nothing"), "cannot read"),
        (lambda source: save_file({"x": torch.ones(1)}, next(source.glob("*.safetensors"))), "holds no tensor"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, spoil, message):
    source = make_source(tmp_path / "source", False)
    spoil(source)
    with pytest.raises(InputError, match=message):
        convert_source(str(source), lambda layers: recipe(), tmp_path / "out", stream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_streamed_conversion_cannot_do_is_said(tmp_path):
    source = str(make_source(tmp_path / "source", False))
    for options, fields, message in (
        ({"dtype": "float32"}, {}, "keeps the tensors"),
        ({}, {"keep_auto": 1}, "reads the model many times"),
    ):
        with pytest.raises(InputError, match=message):
            convert_source(source, lambda layers, f=fields: recipe(**f), tmp_path / "out", stream=True, **options)
    with pytest.raises(InputError, match="unpacked"):
        local_folder("b.gguf", None)
