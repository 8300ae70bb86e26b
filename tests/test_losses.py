"""Losses: equal to their dense definitions in float64, finite, with gradients where they belong and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import SPEC as FAMILY_SPEC
from families import tiny_student, tiny_teacher
from tiny import tiny_llama
from torch import nn

from kernelize import losses
from kernelize.losses import TransferProbe, distillation, far_part, softmax_attention, transfer_terms
from kernelize.recipe import DistilWeights, TransferWeights
from kernelize.runtime.layout import Layout, packed
from kernelize.runtime.modeling import kernelize_model, kernelized_layers
from kernelize.runtime.spec import KernelSpec
from kernelize.runtime.state import AttentionOutput, Seen

SPEC = KernelSpec(feature_dim=16, window=9, sinks=1, slots=4, block=4)


def random_qkv(length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def dense(query, key, value, allowed):
    """Plain softmax over the `allowed` [T, T or B, 1, T, T] keys, with its log-sum-exp."""
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = (query @ key.mT * 0.3).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ value, scores.logsumexp(-1)


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("held", [1, 500, 1 << 24])
@pytest.mark.parametrize("with_documents", [False, True])
def test_blockwise_softmax_is_softmax(monkeypatch, held, with_documents):
    monkeypatch.setitem(losses.SCORES_HELD, "cpu", held)
    query, key, value = random_qkv()
    allowed, documents = causal(24), None
    if with_documents:
        documents = torch.tensor([[0] * 5 + [1] * 19, [0] * 12 + [1] * 12])
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    layout = Layout(documents=documents) if with_documents else None
    y, lse = softmax_attention(Seen(query, key, value, 0.3, layout=layout))
    expected, expected_lse = dense(query, key, value, allowed)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_far_part_is_softmax_over_what_the_window_does_not_see(scale):
    query, key, value = random_qkv()
    query = query * scale
    near = causal(24) & ~causal(24).tril(-6)
    y, lse = dense(query, key, value, causal(24))
    exact, exact_lse = dense(query, key, value, near)
    expected, expected_lse = dense(query, key, value, causal(24) & ~near)
    far = far_part(y, lse, exact, exact_lse, torch.ones_like(lse, dtype=torch.bool))
    there = far.mass > 0
    assert torch.equal(there, (expected_lse - lse).exp() > losses.LEAST_MASS)
    torch.testing.assert_close(far.mass[there], (expected_lse - lse).exp()[there], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(far.y[there], expected[there], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(far.lse[there], expected_lse[there], rtol=1e-8, atol=1e-9)
    assert far.y.isfinite().all()


def merged(exact, exact_lse, memory, memory_lse):
    share = torch.sigmoid(exact_lse - memory_lse)[..., None]
    return AttentionOutput(share * exact + (1 - share) * memory, exact, exact_lse, memory, memory_lse)


def test_a_perfect_memory_has_no_error():
    query, key, value = random_qkv()
    near = causal(24) & ~causal(24).tril(-6)
    y, lse = dense(query, key, value, causal(24))
    exact, exact_lse = dense(query, key, value, near)
    output = merged(exact, exact_lse, *dense(query, key, value, causal(24) & ~near))
    far = far_part(y, lse, exact, exact_lse, output.memory_lse.isfinite())
    terms = transfer_terms(y, far, output, torch.ones_like(lse[:, :1], dtype=torch.bool))
    assert all(float(term) < 1e-12 for term in terms)
    worse = output._replace(memory=output.memory * 0, memory_lse=output.memory_lse + 1)
    terms = transfer_terms(y, far, worse, torch.ones_like(lse[:, :1], dtype=torch.bool))
    torch.testing.assert_close(terms.far, torch.tensor(2.0, dtype=torch.float64))  # one a row
    torch.testing.assert_close(terms.mass, torch.tensor(2.0, dtype=torch.float64))


def test_transfer_gradients_are_right_and_padding_does_not_count():
    query, key, value = random_qkv(10)
    near = causal(10) & ~causal(10).tril(-3)
    y, lse = dense(query, key, value, causal(10))
    exact, exact_lse = dense(query, key, value, near)
    valid = torch.ones_like(lse[:, :1], dtype=torch.bool)
    valid[0, :, -2:] = False
    far = far_part(y, lse, exact, exact_lse, lse > -torch.inf)
    generator = torch.Generator().manual_seed(1)
    memory = torch.randn(y.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    memory_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(memory, memory_lse):
        return transfer_terms(y, far, merged(exact, exact_lse, memory, memory_lse), valid).weighted(TransferWeights())

    assert torch.autograd.gradcheck(loss, (memory, memory_lse))
    loss(memory, memory_lse).backward()
    assert not memory.grad[0, :, -2:].any()
    assert memory.grad[1, :, -2:].any()


def test_an_empty_memory_gives_zero_and_finite_gradients():
    query, key, value = random_qkv(6)
    y, lse = dense(query, key, value, causal(6))
    memory = torch.zeros_like(y, requires_grad=True)
    memory_lse = torch.full_like(lse, -torch.inf).requires_grad_()
    output = merged(y + 1e-3, lse - 0.1, memory, memory_lse)
    far = far_part(y, lse, output.exact, output.exact_lse, memory_lse.isfinite())
    terms = transfer_terms(y, far, output, torch.ones_like(lse[:, :1], dtype=torch.bool))
    assert terms.far.item() == terms.mass.item() == 0
    terms.weighted(TransferWeights()).backward()
    assert memory.grad.isfinite().all()
    assert memory_lse.grad.isfinite().all()


# --- the probe in a model ---------------------------------------------------------------------------------------------


def probed_model():
    model = kernelize_model(tiny_llama(), [SPEC, SPEC])
    probes = {}
    for index, layer in kernelized_layers(model).items():
        layer.kernelize.probe = probes[index] = TransferProbe()
    return model, probes


def batch(packed_row: bool):
    ids = torch.randint(1, 257, (2, 48), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(48).expand(2, -1)
    return ids, torch.where(positions < 30, positions, positions - 30) if packed_row else positions


@pytest.mark.parametrize("packed_row", [False, True])
def test_the_probe_passes_the_teachers_states_on(packed_row):
    ids, positions = batch(packed_row)
    model, probes = probed_model()
    with torch.no_grad():
        expected = tiny_llama()(ids, position_ids=positions, use_cache=False).logits
        logits = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert all(float(probe.terms.far) > 0 for probe in probes.values())


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("learned", [False, True])  # a sink that the student learns is not the teacher's
def test_the_probe_honours_soft_caps_and_native_sinks(family, learned):
    model = tiny_student(family, FAMILY_SPEC.replace(sink_logits=learned))
    probes = {index: TransferProbe() for index in kernelized_layers(model)}
    for index, layer in kernelized_layers(model).items():
        layer.kernelize.probe = probes[index]
        if learned:
            layer.kernelize.sink_logit.data.fill_(1.0)
    ids, _ = batch(False)
    with torch.no_grad():
        expected = tiny_teacher(family)(ids, use_cache=False).logits
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_everything_exact_is_the_teacher_under_soft_caps_and_sinks(family):
    model = tiny_student(family, FAMILY_SPEC.replace(slots=96)).double()
    probes = {index: TransferProbe() for index in kernelized_layers(model)}
    for index, layer in kernelized_layers(model).items():
        layer.kernelize.probe = probes[index]
    with torch.no_grad():
        model(batch(False)[0], use_cache=False)
    assert all(float(probe.terms.output) < 1e-10 for probe in probes.values())


def test_each_document_counts_as_it_would_alone():
    _, positions = batch(True)
    query, key, value = (x[:1] for x in random_qkv(48))
    y, lse = softmax_attention(Seen(query, key, value, 0.3, layout=packed(positions[:1])))
    parts = (slice(30), slice(30, 48))
    alone = [softmax_attention(Seen(query[:, :, p], key[:, :, p], value[:, :, p], 0.3)) for p in parts]
    torch.testing.assert_close(y, torch.cat([part[0] for part in alone], 2))
    torch.testing.assert_close(lse, torch.cat([part[1] for part in alone], 2))


def test_transfer_gradients_reach_new_parameters_only_and_all_of_them():
    model, probes = probed_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".kernelize." in name)
    ids, positions = batch(False)
    assert not model(ids, position_ids=positions, use_cache=False).logits.requires_grad
    sum(probe.terms.weighted(TransferWeights()) for probe in probes.values()).backward()
    for name, parameter in model.named_parameters():
        if ".kernelize." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_a_layers_error_does_not_reach_another_layer():
    model, probes = probed_model()
    ids, positions = batch(False)
    model(ids, position_ids=positions, use_cache=False)
    probes[1].terms.output.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith("model.layers.0.self_attn.kernelize") for name in reached)
    assert any(name.startswith("model.layers.1.self_attn.kernelize") for name in reached)


@pytest.mark.parametrize(("term", "share"), [("output", 0.98), ("far", 0.9), ("mass", 0.8)])
def test_training_a_term_lowers_it(term, share):
    model, probes = probed_model()
    new = [parameter for name, parameter in model.named_parameters() if ".kernelize." in name]
    optimizer = torch.optim.AdamW(new, lr=3e-2, weight_decay=0)
    ids, positions = batch(False)
    seen = []
    for _ in range(30):
        model(ids, position_ids=positions, use_cache=False)
        loss = sum(probe.terms._asdict()[term] for probe in probes.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < share * seen[0], (seen[0], seen[-1])


# --- distil -----------------------------------------------------------------------------------------------------------


def heads_and_features(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    heads = [nn.Linear(width, 19, bias=True, dtype=dtype) for width in (6, 5)]
    for head in heads:
        nn.init.normal_(head.weight, generator=generator)
    student = torch.randn(13, 6, generator=generator, dtype=dtype, requires_grad=True)
    teacher = torch.randn(13, 5, generator=generator, dtype=dtype)
    labels = torch.randint(0, 19, (13,), generator=generator)
    labels[[2, 7]] = -100
    return student, teacher, labels, *heads


@pytest.mark.parametrize("held", [1, 1 << 24])
def test_attention_received_later_is_that_past_the_window(monkeypatch, held):
    monkeypatch.setitem(losses.SCORES_HELD, "cpu", held)
    query, key, value = (x.float() for x in random_qkv(30))
    spec = KernelSpec(window=5, block=4)
    scores = query.unflatten(1, (2, 2)) @ key[:, :, None].mT * 0.5
    p = scores.masked_fill(~causal(30), -torch.inf).softmax(-1)
    found = losses.received_later(Seen(query, key, value, 0.5), spec)
    for j in range(30):
        left = (j // 4 + spec.back + 1) * 4
        expected = p[:, :, :, left:, j].amax((2, 3)) if left < 30 else torch.zeros(2, 2)
        torch.testing.assert_close(found[:, :, j], expected)


ASKED = torch.arange(13) % 3 == 0
PAST = torch.arange(13) >= 10
COUNTS = torch.tensor([5.0, 3.0], dtype=torch.float64)


def test_what_is_asked_counts_only_where_answers_are_written():
    torch.manual_seed(0)
    spec = KernelSpec(feature_map="none", decay="none", policy="attention", window=5, block=2, sinks=0, slots=2)
    seen = Seen(torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 8), 0.5)
    asked = torch.zeros(2, 24, dtype=torch.bool)
    asked[0, 20], asked[1, [9, 23]] = True, True
    alone = [losses.received_later(seen, spec, asked & (torch.arange(24) == at)) for at in (9, 20, 23)]
    torch.testing.assert_close(losses.received_later(seen, spec, asked), torch.stack(alone).amax(0))
    assert alone[0][1].any()
    assert not alone[0][0].any()
    everything = losses.received_later(seen, spec, torch.ones_like(asked))
    torch.testing.assert_close(everything, losses.received_later(seen, spec))


def test_a_forecast_of_what_is_asked_errs_by_its_divergence_from_the_shares():
    torch.manual_seed(0)
    came, counts = torch.rand(2, 3, 7) ** 4, torch.rand(2, 3, 7) > 0.3
    said = torch.randn(2, 3, 7, requires_grad=True)
    expected = 0.0
    for row in range(2):
        for head in range(3):
            here = counts[row, head]
            mass = came[row, head][here].sum()
            share = torch.distributions.Categorical(probs=came[row, head][here] / mass)
            guess = torch.distributions.Categorical(logits=said[row, head][here])
            expected += torch.distributions.kl_divergence(share, guess) * mass.clamp(max=1) / 3
    torch.testing.assert_close(losses.asked_error(said, came, counts), expected)
    shares = (came.log() + 3.0).requires_grad_()
    error = losses.asked_error(shares, came, counts)
    error.backward()
    assert abs(error.item()) < 1e-6
    assert shares.grad.abs().max() < 1e-6
    assert not losses.asked_error(said, torch.zeros_like(came), counts).isnan()


@pytest.mark.parametrize("held", [1, 19 * 4, 1 << 25])
def test_the_divergence_is_the_dense_one_with_its_gradients(monkeypatch, held):
    monkeypatch.setitem(losses.LOGITS_HELD, "cpu", held)
    student, teacher, labels, student_head, teacher_head = heads_and_features()
    weights = DistilWeights(kl=0.7, ce=0.3, answer=0.2, beyond=0.4, temperature=2.0)
    got = distillation(student, teacher, labels, ASKED, PAST, student_head, teacher_head, weights, 19, COUNTS)
    counted = labels != -100
    logits, target = student_head(student)[counted], teacher_head(teacher)[counted].detach()
    near = ~PAST[counted]
    kl = F.kl_div((logits[near] / 2).log_softmax(-1), (target[near] / 2).softmax(-1), reduction="sum") * 4
    past = F.cross_entropy(logits[~near], labels[counted & PAST], reduction="sum")
    ce = F.cross_entropy(logits, labels[counted], reduction="sum")
    answer = F.cross_entropy(logits[ASKED[counted]], labels[counted & ASKED], reduction="sum")
    torch.testing.assert_close(got.loss, (0.7 * kl + 0.3 * ce + 0.4 * past) / 5 + 0.2 * answer / 3)
    torch.testing.assert_close((got.kl, got.ce, got.answer), (kl, ce, answer))
    wanted = (student, *student_head.parameters())
    expected = torch.autograd.grad((0.7 * kl + 0.3 * ce + 0.4 * past) / 5 + 0.2 * answer / 3, wanted)
    torch.testing.assert_close(torch.autograd.grad(got.loss, wanted), expected)
    assert teacher_head.weight.grad is None


def test_the_teacher_itself_has_no_divergence():
    student, _, labels, head, _ = heads_and_features()
    got = distillation(student, student.detach(), labels, ASKED, PAST, head, head, DistilWeights(), 19)
    assert abs(got.loss.item()) < 1e-12
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(got.loss, (student, head.weight)))


def test_logits_of_all_tokens_are_never_held(monkeypatch):
    monkeypatch.setitem(losses.LOGITS_HELD, "cpu", 19 * 2)
    student, teacher, labels, student_head, teacher_head = heads_and_features()
    sizes = []
    student_head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    distillation(student, teacher, labels, ASKED, PAST, student_head, teacher_head, DistilWeights(), 19).loss.backward()
    assert max(sizes) == 2


def test_a_batch_without_targets_is_zero():
    student, teacher, labels, student_head, teacher_head = heads_and_features()
    got = distillation(student, teacher, labels * 0 - 100, ASKED, PAST, student_head, teacher_head, DistilWeights(), 19)
    assert got.loss.item() == 0
