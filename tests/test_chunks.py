"""Training by chunks: the gradients are those that the recipe names, and memory does not depend on the length."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from test_train import losses_of, metric_of, recipe, run
from tiny import tiny_llama
from tolerances import GRADIENT_TOLERANCE, assert_same
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache

from kernelize.chunks import ChunkedDistil, states_of
from kernelize.data import Row
from kernelize.errors import InputError
from kernelize.objectives import Distil
from kernelize.recipe import DistilWeights
from kernelize.runtime.cache import kernel_layers
from kernelize.runtime.modeling import kernelize_model
from kernelize.runtime.spec import KernelSpec

SPEC = KernelSpec(feature_dim=16, window=9, sinks=1, slots=4, block=4, policy="learned+recall")
LENGTH, SIZE, REACH = 96, 24, 64
WEIGHTS = DistilWeights(kl=1.0, ce=0.3, beyond=0.5)


def student(spec=SPEC, **changes):
    return kernelize_model(tiny_llama(**changes), [spec, spec])


def rows(length=LENGTH, batch=2):
    ids = torch.randint(1, 257, (batch, length), generator=torch.Generator().manual_seed(3))
    return Row(ids, torch.arange(length).expand(batch, -1), ids.clone(), torch.zeros_like(ids, dtype=torch.bool))


def gradients(objective, given):
    """Of the summed loss, by parameter."""
    for part in objective.parts(given):
        losses = objective(*part)
        loss = losses.loss.sum()
        (loss if losses.carried is None else loss + losses.carried).backward()
    return {name: p.grad for name, p in objective.model.named_parameters()}


def teacher_of():
    """One whose positions end inside the sequence."""
    return tiny_llama(seed=1, max_position_embeddings=REACH).double()


def assert_same_gradients(got, expected):
    for name, gradient in expected.items():
        assert_same(got[name], gradient, name, GRADIENT_TOLERANCE)


SPECS = {
    "slots": SPEC,
    "delta": SPEC.replace(rule="gated_delta", decay="gated", policy="learned"),
    "decay": SPEC.replace(decay="gated", policy="attention"),
}


@pytest.mark.parametrize("size", [SIZE, LENGTH])
@pytest.mark.parametrize("spec", SPECS)
def test_recompute_gives_the_gradient_of_the_whole_sequence(spec, size):
    whole = gradients(Distil(student(SPECS[spec]).double(), teacher_of(), WEIGHTS), rows())
    chunked = ChunkedDistil(student(SPECS[spec]).double(), teacher_of(), WEIGHTS, size, "recompute")
    assert_same_gradients(gradients(chunked, rows()), whole)


def test_truncate_is_truncated_backpropagation_through_time():
    chunked = ChunkedDistil(student().double(), teacher_of(), WEIGHTS, SIZE, "truncate")
    got = gradients(chunked, rows())
    model, (ids, positions, *_) = student().double(), rows()
    with torch.no_grad():
        says = teacher_of()(ids).logits.log_softmax(-1)
    cache = DynamicCache(config=model.config)
    for start in range(0, LENGTH, SIZE):
        at = slice(start, start + SIZE)
        logits = model(ids[:, at], position_ids=positions[:, at], past_key_values=cache, use_cache=True).logits
        following = ids[:, start + 1 : start + SIZE + 1]
        logits = logits[:, : following.shape[1]]
        ce = F.cross_entropy(logits.transpose(1, 2), following, reduction="none")
        target, beyond = (x[:, at][:, : logits.shape[1]] for x in (says, positions >= REACH))
        kl = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
        (kl * ~beyond + 0.3 * ce + 0.5 * ce * beyond).sum().backward()
        for layer in kernel_layers(cache):
            layer.state = layer.state.map(torch.detach)
    assert_same_gradients(got, {name: p.grad for name, p in model.named_parameters()})
    whole = gradients(Distil(student().double(), teacher_of(), WEIGHTS), rows())
    assert any(not torch.allclose(got[name], whole[name]) for name in whole), "states carry something"


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations within have made and that are still held; and the most there were."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


def peak(length, across):
    """(bytes held at most during the gradients of a sequence of `length` tokens, bytes of the layers' states)"""
    objective = ChunkedDistil(student(), tiny_llama(max_position_embeddings=REACH), WEIGHTS, 32, across)
    gradients(objective, rows(64, 1))  # gradients are there from now on
    given = rows(length, 1)
    with LiveBytes() as seen:
        for part in objective.parts(given):
            losses = objective(*part)
            (losses.loss.sum() if losses.carried is None else losses.loss.sum() + losses.carried).backward()
            states = sum(state.nbytes for state in states_of(objective.cache))
    return seen.peak, states


@pytest.mark.parametrize("across", ["truncate", "recompute"])
def test_memory_does_not_depend_on_the_length(across):
    """But for the states that `recompute` keeps in host memory, one of each layer a chunk."""
    (short, _), (long, states) = (peak(length, across) for length in (128, 512))
    kept = states * (512 - 128) // 32 if across == "recompute" else 0
    assert long - kept < 1.1 * short
    assert long > 0.5 * short + kept


STAGE = {"name": "far", "kind": "distil", "trainable": "all", "steps": 3, "learning_rate": 1e-3, "packing": "joined"}
STAGE |= {"sequence_length": 128, "batch_tokens": 512, "micro_batch": 2, "data": ["retrieval"]}
STAGE |= {"distil": {"kl": 1.0, "answer": 0.5}, "window_dropout": 0.0}


def test_a_stage_that_recomputes_trains_as_one_that_holds_whole_sequences(tmp_path):
    _, _, whole = run(recipe("", STAGE), tmp_path / "whole")
    stage = STAGE | {"chunk_tokens": 32, "across": "recompute"}
    _, _, chunked = run(recipe("", stage), tmp_path / "chunked")
    assert losses_of(chunked) == pytest.approx(losses_of(whole), rel=1e-4)
    assert metric_of(chunked, "gradient_norm") == pytest.approx(metric_of(whole, "gradient_norm"), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_tokens": 48}, "sequence_length=128 is no multiple of chunk_tokens=48"),
        ({"across": "truncate"}, "give chunk_tokens"),
        ({"chunk_tokens": 32, "packing": "documents"}, "packing='joined'"),
        ({"chunk_tokens": 32, "gradient_checkpointing": True}, "gradient_checkpointing=False"),
    ],
)
def test_a_recipe_that_cannot_be_chunked_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        recipe("", STAGE | change)


def test_a_model_with_softmax_layers_has_no_state_to_carry(tmp_path):
    model = kernelize_model(tiny_llama(), [SPEC, None])
    with pytest.raises(InputError, match="1 layers are not converted"):
        run(recipe("", STAGE | {"chunk_tokens": 32}), tmp_path / "out", model=model)
