"""Training: it learns, and its result depends on the recipe alone: not on interruptions, processes or micro-batches."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from tolerances import assert_same
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from kernelize import objectives, train
from kernelize.compiled import NESTED
from kernelize.convert import load
from kernelize.errors import InputError, KernelizeError
from kernelize.objectives import NEW, Features, attach_lora
from kernelize.recipe import Lora, Recipe, Stage
from kernelize.runtime.modeling import kernelize_model, kernelized_layers
from kernelize.runtime.spec import KernelSpec
from kernelize.train import finetune, rate_at

SPEC = KernelSpec(feature_dim=16, window=9, sinks=1, slots=4, block=4)
TEXT = "".join(f"line {number}: {number * number} is the square of {number}.\n" for number in range(400))
SHAPE = {"sequence_length": 32, "batch_tokens": 128, "micro_batch": 4, "warmup": 0.0}
TRANSFER = {"name": "transfer", "kind": "transfer", "steps": 5, "learning_rate": 1e-2, **SHAPE}
LORA = {"name": "lora", "kind": "distil", "trainable": "new+lora", "steps": 5, "learning_rate": 1e-2, **SHAPE}
FORECAST = {"name": "forecast", "kind": "forecast", "packing": "joined", "steps": 5, "learning_rate": 1e-2, **SHAPE}
ALL = {"name": "all", "kind": "distil", "trainable": "all", "steps": 5, "learning_rate": 1e-3, **SHAPE}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    pieces = [TEXT[start : start + 150] for start in range(0, len(TEXT), 150)]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return str(path)


def recipe(text, *stages, **fields):
    stages = [{"data": [text]} | stage for stage in stages]
    return Recipe.from_dict({"name": "r", "description": "d", "stages": stages, "checkpoint_steps": 2} | fields)


def student():
    return kernelize_model(tiny_llama(), [SPEC, SPEC])


def run(made, output, **options):
    """(trained model, result, events)"""
    model, events = options.pop("model", None) or student(), []
    hook = options.pop("on_event", None)

    def listen(event):
        events.append(event)
        if hook:
            hook(event)

    options.setdefault("teacher", tiny_llama())
    return model, finetune(model, byte_tokenizer(), made, output, on_event=listen, **options), events


def losses_of(events):
    return [event["metrics"]["loss"] for event in events if event["event"] == "step"]


def assert_same_weights(a, b):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


# --- it learns, and changes what it should ----------------------------------------------------------------------------


def test_a_forecast_learns_what_will_be_attended_to_and_nothing_else_changes(text, tmp_path):
    made = [kernelize_model(tiny_llama(), [SPEC, SPEC.replace(policy="attention+forecast")]) for _ in range(2)]
    _, _, events = run(recipe(text, FORECAST | {"steps": 40}), tmp_path / "out", model=made[0])
    correlations = [event["metrics"]["correlation"] for event in events if event["event"] == "step"]
    assert sum(correlations[-8:]) / 8 > 0.4 > correlations[0] + 0.2
    after, before = (model.state_dict() for model in made)
    assert {name.split(".")[-1] for name in before if not torch.equal(before[name], after[name])} == {
        "forecast_skip", "forecast_in", "forecast_out"
    }  # fmt: skip


def test_a_forecast_learns_what_answers_ask_for(text, tmp_path):
    """Answers repeat what a fact says, so a forecast of their attention comes nearer to it, of other facts, too."""
    model = kernelize_model(tiny_llama(max_position_embeddings=1024), [SPEC.replace(policy="attention+forecast")] * 2)
    data = [{"builtin": "retrieval", "path": text}]
    shape = {"sequence_length": 1024, "batch_tokens": 2048, "micro_batch": 2}
    stage = FORECAST | shape | {"target": "answers", "data": data, "steps": 12}
    _, _, events = run(recipe(text, stage), tmp_path / "out", model=model)
    found = losses_of(events)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_distilling_trains_a_learned_score_end_to_end(text, tmp_path):
    """Even alone: the divergence from the teacher reaches what decides over the slots, in every layer."""
    spec = SPEC.replace(policy="learned+recall")
    before, model = (kernelize_model(tiny_llama(), [spec, spec]) for _ in range(2))
    run(recipe(text, ALL | {"trainable": "new"}), tmp_path / "out", model=model)
    for name, value in before.state_dict().items():
        same = torch.equal(value, model.state_dict()[name])
        assert same == (NEW not in name), name
    assert any(name.endswith("score_weight") for name in before.state_dict())


def test_a_distillation_may_drop_windows_for_the_others_to_carry(text, tmp_path):
    """With a probability near one nearly every pass sees a block alone: the divergence of the first step is larger."""
    first = {}
    for dropout in (0.0, 0.999):
        stage = ALL | {"window_dropout": dropout, "steps": 1}
        model, _, events = run(recipe(text, stage), tmp_path / str(dropout))
        first[dropout] = losses_of(events)[0]
        assert all(layer.kernelize.window_dropout == 0 for layer in kernelized_layers(model).values())
    assert first[0.999] > 1.1 * first[0.0]


@pytest.mark.parametrize("stage", [TRANSFER, LORA, ALL], ids=["transfer", "lora", "all"])
def test_a_stage_lowers_its_loss_and_trains_what_it_says(text, tmp_path, stage):
    before = {name: value.clone() for name, value in student().state_dict().items()}
    model, result, events = run(recipe(text, stage | {"steps": 16}), tmp_path / "out")
    losses = losses_of(events)
    assert result.completed
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])
    assert list(before) == list(model.state_dict())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    new = {name for name in before if NEW in name}
    linear = {name for name in before if name.endswith("_proj.weight")}
    expected = {"transfer": new, "lora": new | linear, "all": set(before)}[stage["name"]]
    assert changed == expected
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("stage", "packing"), [(ALL, "joined"), (ALL, "documents"), (TRANSFER, "joined"), (LORA, "joined")]
)
def test_a_compiled_stage_learns_the_same(text, tmp_path, monkeypatch, stage, packing):
    """A few graphs serve all batches and both models; none stays.

    One for a layer of the teacher, two for one of the student, before and after its attention (and as many for a first
    layer without a gradient).
    """
    stage, losses = stage | {"packing": packing, "steps": 4}, {}
    for on in ((), ("cpu",)):
        monkeypatch.setattr(train, "COMPILED_ON", on)
        monkeypatch.setattr(train, "BACKEND", "eager")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, _, events = run(recipe(text, stage), tmp_path / f"out{len(on)}")
        losses[on] = torch.tensor(losses_of(events))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (0 < graphs <= (5 if NESTED else 12)) if on and packing == "joined" else graphs == 0
        assert not [m for m in model.modules() if "forward" in vars(m)]
    assert_same(losses["cpu",], losses[()], "losses")


def test_where_nothing_compiles_the_way_out_is_named(text, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(train, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(train, "BACKEND", broken)
    torch._dynamo.reset()
    with pytest.raises(KernelizeError, match=r"'all': torch.compile failed .*no compiler.*compiled: false"):
        run(recipe(text, ALL | {"packing": "joined"}), tmp_path / "out")
    run(recipe(text, ALL | {"packing": "joined", "compiled": False}), tmp_path / "again")


def test_the_result_is_an_ordinary_checkpoint_with_its_log(text, tmp_path):
    model, result, events = run(recipe(text, TRANSFER, LORA), tmp_path / "out")
    loaded, _ = load(tmp_path / "out")
    assert_same_weights(loaded, model)
    ids = torch.arange(1, 41)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    logged = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert logged == events
    assert [stage.name for stage in result.stages] == ["transfer", "lora"]
    assert all(stage.tokens == 5 * 128 for stage in result.stages)
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir()) == ["1-lora-4", "1-lora-5"]
    step = next(event for event in events if event["event"] == "step")
    assert {"loss", "output", "far", "mass", "gradient_norm", "learning_rate"} == set(step["metrics"])
    assert step["seconds_left"] >= 0


def test_a_half_precision_model_trains_in_float32_and_keeps_its_type(text, tmp_path):
    model = kernelize_model(tiny_llama().bfloat16(), [SPEC, SPEC])
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    seen = set()

    def look(event):
        if event["event"] == "step":
            seen.update(parameter.dtype for parameter in model.parameters())

    run(recipe(text, ALL), tmp_path / "out", model=model, on_event=look)
    assert seen == {torch.float32}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_the_teacher_writes_the_text_itself(text, tmp_path):
    stage = TRANSFER | {"data": ["self"], "steps": 2}
    _, result, events = run(recipe(text, stage), tmp_path / "out")
    assert result.completed
    assert [event["tokens"] for event in events if event["event"] == "writing"] == [256]


# --- the result depends on the recipe alone ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"micro_batch": 1}, {"gradient_checkpointing": True}], ids=["micro-batch", "checkpointing"]
)
@pytest.mark.parametrize("stage", [TRANSFER, LORA | {"distil": {"kl": 1.0, "ce": 0.5}}], ids=["transfer", "lora"])
def test_memory_savings_do_not_change_the_losses(text, tmp_path, stage, change):
    _, _, plain = run(recipe(text, stage), tmp_path / "plain")
    _, _, saving = run(recipe(text, stage | change), tmp_path / "saving")
    assert losses_of(saving) == pytest.approx(losses_of(plain), rel=1e-4)


class CrashError(Exception):
    pass


def crash_at(stage, step):
    def listen(event):
        if event["event"] == "step" and (event["stage"], event["step"]) == (stage, step):
            raise CrashError

    return listen


@pytest.fixture(scope="module")
def interrupted(text, tmp_path_factory):
    """A recipe of all kinds of stages, and the model that it makes undisturbed."""
    made = recipe(text, TRANSFER | {"window_dropout": 0.5}, LORA, ALL, checkpoint_steps=3)
    return made, run(made, tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.mark.parametrize(("stage", "step"), [("transfer", 1), ("lora", 1), ("lora", 4), ("all", 5)])
def test_a_crashed_run_resumes_to_the_same_bits(interrupted, tmp_path, stage, step):
    made, undisturbed = interrupted
    with pytest.raises(CrashError):
        run(made, tmp_path / "out", on_event=crash_at(stage, step))
    assert not (tmp_path / "out/config.json").exists()
    with pytest.raises(InputError, match="not empty"):
        run(made, tmp_path / "out")
    resumed, result, _ = run(made, tmp_path / "out", resume=True)
    assert result.completed
    assert_same_weights(resumed, undisturbed)


@pytest.fixture
def heard():
    """Ctrl-C as at a terminal: who runs the tests in the background may have them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_finish_the_step_and_save(interrupted, tmp_path, number):
    made, undisturbed = interrupted

    def terminate(event):
        if event["event"] == "step" and event["stage"] == "lora" and event["step"] == 2:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    _, result, events = run(made, tmp_path / "out", on_event=terminate)
    assert signal.getsignal(number) is handler
    assert not result.completed
    assert events[-1] == {"event": "stopped", "stage": "lora"}
    assert sum(event["event"] == "step" for event in events) <= 5 + 3
    resumed, result, events = run(made, tmp_path / "out", resume=True)
    assert result.completed
    steps = [(event["stage"], event["step"]) for event in events if event["event"] == "step"]
    assert steps[0] in (("lora", 3), ("lora", 4))
    assert_same_weights(resumed, undisturbed)


@pytest.mark.usefixtures("heard")
def test_a_second_ctrl_c_stops_at_once(text, tmp_path, capfd):
    def impatient(event):
        if event["event"] == "step":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(recipe(text, LORA), tmp_path / "out", on_event=impatient)
    assert "Ctrl-C once more stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_runs_do_not_write_into_one_folder(text, tmp_path):
    made, output = recipe(text, LORA | {"steps": 2}), tmp_path / "out"

    def second(event):
        if event["event"] == "step" and event["step"] == 1:
            with pytest.raises(InputError, match=f"another run is writing to {output}"):
                run(made, output, overwrite=True)

    model, result, _ = run(made, output, on_event=second)
    assert result.completed
    again, result, _ = run(made, output, resume=True)
    assert result.completed
    assert_same_weights(again, model)


def test_resuming_a_finished_run_trains_nothing(text, tmp_path):
    made = recipe(text, LORA | {"steps": 2})
    model, _, _ = run(made, tmp_path / "out")
    again, result, _ = run(made, tmp_path / "out", resume=True)
    assert result.stages == ()
    assert_same_weights(again, model)
    with pytest.raises(InputError, match="another recipe"):
        run(recipe(text, TRANSFER), tmp_path / "out", resume=True)


def test_a_run_resumes_from_what_it_started_with_or_not_at_all(text, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(Path(text).read_bytes())
    made = recipe(str(data), LORA)
    with pytest.raises(CrashError):
        run(made, tmp_path / "out", on_event=crash_at("lora", 4))
    for other in (kernelize_model(tiny_llama(seed=1), [SPEC, SPEC]), student().bfloat16()):
        with pytest.raises(InputError, match="trained from another model or in another type"):
            run(made, tmp_path / "out", resume=True, model=other)
    data.write_bytes(data.read_bytes() + b'{"text": "a line more"}\n')
    with pytest.raises(InputError, match=f"{data}: has changed since"):
        run(made, tmp_path / "out", resume=True)
    data.write_bytes(Path(text).read_bytes())
    assert run(made, tmp_path / "out", resume=True)[1].completed


@pytest.mark.parametrize("held", [("config.json",), ("notes.txt",), ("config.json", "train.jsonl")])
def test_resuming_takes_nothing_away_that_no_run_has_left(text, tmp_path, held):
    for name in held:
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        run(recipe(text, TRANSFER), tmp_path, resume=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(held, "mine")


def test_a_run_goes_on_or_begins_anew(text, tmp_path):
    with pytest.raises(InputError, match="give one of them"):
        run(recipe(text, TRANSFER), tmp_path / "out", resume=True, overwrite=True)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_the_layer_and_saves_nothing(text, tmp_path):
    model = student()
    model.model.layers[1].self_attn.kernelize.log_gate.data[0] = math.nan
    with pytest.raises(KernelizeError, match="stage 'transfer', step 1: the loss of layer 1 is nan"):
        run(recipe(text, TRANSFER), tmp_path / "out", model=model)
    assert not (tmp_path / "out/checkpoints").exists()
    assert not (tmp_path / "out/config.json").exists()


def test_a_gradient_that_is_no_number_names_the_parameter(text, tmp_path):
    model = student()
    gate = model.model.layers[0].self_attn.kernelize.log_gate
    gate.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(KernelizeError, match=r"step 1: the gradient of .*layers\.0.*log_gate is not finite"):
        run(recipe(text, TRANSFER), tmp_path / "out", model=model)
    assert gate.isfinite().all()


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (TRANSFER | {"sequence_length": 512, "batch_tokens": 512}, {}, "sequence_length=512.*end at 256$"),
        (LORA | {"sequence_length": 512, "batch_tokens": 512}, {}, r"end at 256 \(distil.beyond weighs"),
        (LORA, {"teacher": None}, "needs the original model"),
        (TRANSFER | {"data": ["nothing.txt"]}, {}, "nothing.txt"),
        (LORA | {"lora": {"targets": ["qq_proj"]}}, {}, "'qq_proj' ends no linear"),
        (FORECAST, {}, "no layer's policy has one"),
        (ALL | {"sequence_length": 512, "batch_tokens": 512}, {}, "sequence_length=512.*distil.beyond"),
    ],
)
def test_bad_input_is_named(text, tmp_path, stage, options, message):
    with pytest.raises(InputError, match=message):
        run(recipe(text, stage), tmp_path / "out", **options)
    assert not (tmp_path / "out/config.json").exists()


def test_a_recipe_without_stages_and_a_model_without_new_parameters(text, tmp_path):
    with pytest.raises(InputError, match="no stages"):
        run(recipe(text), tmp_path / "out")
    window = KernelSpec(feature_map="none", window=9, slots=0, policy="attention")
    with pytest.raises(InputError, match="the model has none"):
        run(recipe(text, TRANSFER), tmp_path / "out", model=kernelize_model(tiny_llama(), [window, window]))
    assert not (tmp_path / "out").exists()


# --- parts ------------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": tiny_llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=257)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL, num_key_value_heads=2, head_dim=8, vocab_size=257, pad_token_id=0, final_logit_softcapping=0.1
        )
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, vocab_size=257, logits_scaling=3.0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_and_head_make_the_models_logits(name):
    model = MODELS[name]().eval()
    ids = torch.arange(1, 21)[None]
    positions = torch.arange(20)[None]
    with torch.no_grad():
        features, head = Features(model)(ids, positions)
        torch.testing.assert_close(head(features), model(ids, position_ids=positions).logits, rtol=0, atol=1e-6)
    assert Features(model).own_logits == (name in ("gemma2", "granite"))


@pytest.mark.parametrize(("name", "layers"), [("llama", 2 * 7), ("gpt2", 2 * 4)])
def test_lora_reaches_every_linear_layer_but_the_head(name, layers):
    model = kernelize_model(MODELS[name](), [SPEC, SPEC])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapper, adapted = attach_lora(model, Lora())
    assert len(adapted) == layers
    assert not any("lm_head" in name or NEW in name for name in adapted)
    wrapper.merge_and_unload()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_lora_that_misses_a_layer_is_an_error(monkeypatch):
    def lazy(model, config, name):
        config.target_modules = set(sorted(config.target_modules)[1:])
        return original(model, config, name)

    original = objectives.peft.LoraModel
    monkeypatch.setattr(objectives.peft, "LoraModel", lazy)
    with pytest.raises(KernelizeError, match="13 of 14"):
        attach_lora(student(), Lora())


# --- answers ----------------------------------------------------------------------------------------------------------


ASKED = {"name": "asked", "kind": "distil", "trainable": "all", "steps": 4, "learning_rate": 1e-3, "packing": "joined"}
ASKED |= {"sequence_length": 256, "batch_tokens": 1024, "data": ["retrieval"]}


def metric_of(events, name):
    return [event["metrics"][name] for event in events if event["event"] == "step"]


def test_answers_are_weighed_by_their_own_count(text, tmp_path):
    """Whatever the micro-batch: the mean over the answers' tokens of the global batch."""
    stage = ASKED | {"distil": {"kl": 1.0, "answer": 0.5}}
    _, _, whole = run(recipe(text, stage | {"micro_batch": 4}), tmp_path / "whole")
    _, _, single = run(recipe(text, stage | {"micro_batch": 1}), tmp_path / "single")
    assert losses_of(single) == pytest.approx(losses_of(whole), rel=1e-4)
    answers = metric_of(whole, "answer")
    assert metric_of(single, "answer") == pytest.approx(answers, rel=1e-4)
    assert min(answers) > 3.0, "a random model does not know them"
    expected = [kl + 0.5 * answer for kl, answer in zip(metric_of(whole, "kl"), answers, strict=True)]
    assert losses_of(whole) == pytest.approx(expected, rel=1e-5)


def test_text_without_answers_has_no_answer_loss(text, tmp_path):
    _, _, events = run(recipe(text, ALL | {"distil": {"kl": 1.0, "answer": 0.5}}), tmp_path / "out")
    assert metric_of(events, "answer") == [0.0] * 5
    assert losses_of(events) == metric_of(events, "kl")


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_every_step_of_a_schedule_moves(steps):
    """Also the first of a warm-up, which may be the only one."""
    stage = Stage.model_validate({**ALL, "data": ["sample"], "steps": steps, "warmup": 0.1})
    rates = [rate_at(step, stage) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) == 1
    assert sorted(rates[steps // 10 :], reverse=True) == rates[steps // 10 :]
