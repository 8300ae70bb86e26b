"""The audit: every ablation is what it says, against dense attention; shares are shares; verdicts can be bad."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from kernelize.audit import (
    ABLATIONS,
    EVERY,
    SOURCES,
    UNUSED,
    Ablated,
    Meter,
    ablated,
    audit,
    near,
    slots_alone,
    verdict,
)
from kernelize.cli import main
from kernelize.convert import convert
from kernelize.errors import InputError
from kernelize.evaluate import Perplexity, evaluate, sample_text
from kernelize.plan import ConversionPlan
from kernelize.runtime import ops
from kernelize.runtime.attention import KernelAttention
from kernelize.runtime.modeling import kernelized_layers
from kernelize.runtime.reference import attend as reference
from kernelize.runtime.spec import KernelSpec, SpecError
from kernelize.runtime.state import EMPTY

SPEC = KernelSpec(window=9, block=4, sinks=2, slots=6, feature_dim=16)
SPECS = {
    "mixed": SPEC,
    "learned, own sink logits": SPEC.replace(policy="learned+value", sink_logits=True, decay="gated"),
    "delta": SPEC.replace(rule="gated_delta", policy="attention"),
    "no memory": SPEC.replace(feature_map="none", policy="attention"),
    "no slots": SPEC.replace(slots=0),
}


def layer_and_inputs(spec, length=70):
    torch.manual_seed(0)
    layer = KernelAttention(spec, 4, 2, 8).double().eval()
    with torch.no_grad():
        for module in (layer, layer.map_q, layer.map_k) if spec.has_memory else (layer,):
            module.reset()
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if spec.has_memory:
            layer.log_gate.fill_(-0.5)  # so that the memory has a say
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    return layer.kernel(0.4), (2 * q, k, v)


def by_source(kernel, q, k, v):
    """Per query, from the one-token oracle: the exact positions' unnormalised weights and values, by source."""
    state, sums = None, []
    for t in range(q.shape[2]):
        now = slice(t, t + 1)
        out, state = reference(q[:, :, now], k[:, :, now], v[:, :, now], kernel, state)
        ends = (kernel.spec.sinks + kernel.spec.ring, kernel.spec.positions)
        part = []
        for places in (slice(0, ends[0]), slice(ends[0], ends[1])):
            hidden = torch.ones(kernel.spec.positions, dtype=torch.bool)
            hidden[places] = False
            scores = (q[:, :, t].view(2, 2, 2, 8) * kernel.scaling) @ state.keys.mT
            scores = scores.masked_fill((hidden | (state.pos == EMPTY))[:, :, None], -torch.inf)
            part.append(((scores.exp() @ state.values).view(2, 4, 8), scores.exp().sum(-1).view(2, 4)))
        sums.append((part, out))
    return sums


def test_ablations_are_the_terms_that_are_left():
    """y = Σ of the kept terms' numerators / Σ of their normalisers, from the oracle's own state."""
    kernel, (q, k, v) = layer_and_inputs(SPEC)
    with torch.no_grad():
        expected = by_source(kernel, q, k, v)
        found = {name: Ablated(*kept)(q, k, v, kernel) for name, kept in ABLATIONS.items()}
    for t, (parts, out) in enumerate(expected):
        memory_mass = out.memory_lse[:, :, 0].exp()
        terms = [*parts, (out.memory[:, :, 0] * memory_mass[..., None], memory_mass)]
        for name, kept in ABLATIONS.items():
            numerator = sum((n * keep for (n, _), keep in zip(terms, kept, strict=True)), torch.zeros(2, 4, 8))
            norm = sum((m * keep for (_, m), keep in zip(terms, kept, strict=True)), torch.zeros(2, 4))
            y = numerator / norm.where(norm > 0, 1)[..., None]
            torch.testing.assert_close(found[name][:, :, t], y, rtol=1e-6, atol=1e-8, msg=f"{name} at {t}")


@pytest.mark.parametrize("name", SPECS)
def test_everything_left_is_the_layer_itself(name):
    kernel, (q, k, v) = layer_and_inputs(SPECS[name])
    with torch.no_grad():
        y = ops.attend(q, k, v, kernel)[0].y
        torch.testing.assert_close(Ablated(True, True, True)(q, k, v, kernel), y, rtol=1e-9, atol=1e-10)
        if not SPECS[name].slots:
            torch.testing.assert_close(near(q, k, v, kernel)[0], ops.attend(q, k, v, kernel)[0].exact)
            assert not slots_alone(q, k, v, kernel)[0].any()
        if not SPECS[name].has_memory:
            torch.testing.assert_close(Ablated(True, True, False)(q, k, v, kernel), y)
            assert not Ablated(False, False, True)(q, k, v, kernel).any()


@pytest.mark.parametrize("name", SPECS)
def test_the_meter_computes_the_layer_and_its_shares_are_one(name):
    spec = SPECS[name]
    kernel, (q, k, v) = layer_and_inputs(spec, length=3 * EVERY + 1)
    meter = Meter()
    with torch.no_grad():
        torch.testing.assert_close(meter(q, k, v, kernel), ops.attend(q, k, v, kernel)[0].y, rtol=1e-8, atol=1e-10)
    assert meter.queries == 4 * 2 * 4
    shares = dict(zip(SOURCES, (meter.shares / meter.queries).tolist(), strict=True))
    lost = 1 - sum(shares.values())  # a sink logit takes part in the normaliser alone
    assert (0 < lost < 0.1) if spec.sink_logits else abs(lost) < 1e-9
    assert (shares["memory"] > 0) == spec.has_memory
    assert (shares["slots"] > 0) == (spec.slots > 0)
    torch.testing.assert_close(meter.distance.sum(1), meter.shares[:3])
    assert meter.distance[0, 3:].sum() == 0, "the window of 12 tokens ends before a distance of 16"


def test_verdicts():
    assert verdict(SPEC, 0.2, UNUSED / 2) == "memory unused"
    assert verdict(SPEC, 0.0, 0.0) == "slots and memory unused"
    assert verdict(SPEC, 2 * UNUSED, 2 * UNUSED) == "in use"
    assert verdict(SPECS["no memory"], 0.5, 0.0) == "in use", "what is not there cannot be unused"


def gpt2():
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 257}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=0)).eval()


def converted(spec=SPEC):
    return convert(tiny_llama(max_position_embeddings=1024), ConversionPlan.uniform(spec, 2))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("audit") / "text.txt"
    path.write_text(sample_text("novel")[:20_000])
    return str(path)


def run(model, text, **options):
    teacher = tiny_llama(max_position_embeddings=1024)
    return audit(
        model, teacher, byte_tokenizer(), **({"length": 200, "pieces": 1, "trials": 1, "text": text} | options)
    )


def test_an_audit_of_a_model(text):
    model = converted()
    seen = []
    found = run(model, text, pieces=2, on_progress=lambda done, total, label: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert all(layer.kernelize.instead is None for layer in kernelized_layers(model).values())
    assert {row.suite for row in found.rows} == {"audit"}
    kl = {name: found.value(name, "kl") for name in ABLATIONS}
    assert kl["no attention"] > kl["window only"] > kl["whole"] > 0
    teacher = {row.metric: row.value for row in found.rows if row.model == "teacher"}
    assert teacher["kl"] == pytest.approx(0, abs=1e-6)
    assert found.value("whole", "ppl") == pytest.approx(teacher["ppl"], rel=0.2)
    for layer in found.layers:
        assert sum(getattr(layer, source) for source in SOURCES) == pytest.approx(1, abs=1e-5)
    assert json.loads(json.dumps(found.to_dict()))["layers"][1]["layer"] == 1
    rows = evaluate({"model": (model, byte_tokenizer())}, [Perplexity(lengths=(200,), pieces=2, text=text)])
    expected = next(row.value for row in rows if row.metric == "ppl")
    assert math.isclose(found.value("whole", "ppl"), expected, rel_tol=1e-4), "it is evaluation's own perplexity"


def test_a_model_with_a_long_window_is_its_teacher(text):
    found = run(converted(SPEC.replace(window=220)), text)
    assert found.value("whole", "kl") == pytest.approx(0, abs=1e-5)
    assert {layer.verdict for layer in found.layers} == {"slots and memory unused"}


def test_what_cannot_be_audited_is_refused(text):
    with pytest.raises(InputError, match="no converted layer"):
        run(tiny_llama(), text)
    with pytest.raises(InputError, match="different vocabularies, of 257 and 300"):
        audit(converted(), tiny_llama(vocab_size=300), byte_tokenizer(), length=200, text=text)
    model = convert(gpt2(), ConversionPlan.uniform(SPEC, 2))
    with pytest.raises(InputError, match="beyond the 128 learned positions of model"):
        audit(model, gpt2(), byte_tokenizer(), length=200, text=text)
    model = converted()
    ids = torch.ones(1, 20, dtype=torch.long)
    with ablated(model, "window only"), pytest.raises(SpecError, match="whole rows"):
        model(ids, use_cache=True)


def test_the_command_and_the_card(text, tmp_path, capsys):
    tiny_llama(max_position_embeddings=1024).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    options = ["--window", "16", "--block", "8", "--slots", "8", "--feature-dim", "16", "--budget", "uniform"]
    made = str(tmp_path / "made")
    assert main(["convert", str(tmp_path / "source"), "-o", made, *options]) == 0
    assert "Not measured. `kernelize audit made" in (tmp_path / "made/README.md").read_text()
    asked = [
        "--text",
        text,
        "--length",
        "200",
        "--pieces",
        "1",
        "--trials",
        "1",
        "--card",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert main(["audit", made, "--against", str(tmp_path / "source"), *asked]) == 0
    assert "times as large" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "a.json").read_text())["layers"]) == 2
    card = (tmp_path / "made/README.md").read_text()
    assert "| window only |" in card
    assert "below 1% a part is unused" in card
    assert main(["audit", made, "--against", str(tmp_path / "nowhere")]) == 2
