"""Generation gives the same tokens in every mode, or is refused in one line."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from functools import partial

import datasets
import pytest
import torch
import torch._dynamo.testing
from families import SPEC, tiny_student, tiny_teacher
from peft import PromptTuningConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from kernelize import files
from kernelize.convert import save
from kernelize.errors import InputError, KernelizeError
from kernelize.runtime.attention import ATTENTION
from kernelize.runtime.cache import CACHE, kernel_layers
from kernelize.runtime.modeling import kernelize_model, kernels_of
from kernelize.runtime.spec import KernelSpec, SpecError
from kernelize.states import fork, generate_from, load_state, read, save_state

pytestmark = pytest.mark.fast
NEW = 12
SMALL = 8  # places of a static cache: fewer than there are in
WINDOWS = {"gpt_oss": 12, "llama4_text": 24, "qwen2": 12}  # the native windows of tests' tiny models


@pytest.fixture(scope="module")
def model():
    return tiny_student("llama").double()  # in float64 no tie between slots can flip


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 257, (2, 90), generator=torch.Generator().manual_seed(0))


def write(model, ids, **settings):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | settings
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


def rerun(model, ids):
    """Greedy tokens without any cache."""
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, -NEW:]


def test_greedy_equals_recomputation(model, ids):
    assert torch.equal(write(model, ids), rerun(model, ids))


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill_chunk_size": 17},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_mode_equals_greedy(model, ids, settings):
    assert torch.equal(write(model, ids, **settings), write(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_row_without_positions_is_the_row(ids, family, use_cache):
    """As for softmax with rotary positions, which sees distances alone."""
    model, mask = tiny_student(family).double(), torch.ones_like(ids)
    mask[0, :23] = 0
    found = model(ids.masked_fill(mask == 0, 0), attention_mask=mask, use_cache=use_cache).logits
    torch.testing.assert_close(found[0, 23:], model(ids[:1, 23:]).logits[0], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_a_left_padded_row_is_read_on_without_positions(model, ids, masked):
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    cache = model(ids[:, :60].masked_fill(mask[:, :60] == 0, 0), attention_mask=mask[:, :60]).past_key_values
    found = model(ids[:, 60:], attention_mask=mask if masked else None, past_key_values=cache).logits
    torch.testing.assert_close(found[0], model(ids[:1, 23:]).logits[0, 37:], rtol=0, atol=1e-9)


def test_a_prompt_makes_the_logits_of_its_last_token_alone(model, ids):
    made = []
    handle = model.lm_head.register_forward_hook(lambda module, given, logits: made.append(logits.shape[1]))
    write(model, ids, max_new_tokens=2)
    handle.remove()
    assert made == [1, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_embeddings_in_place_of_tokens_write_the_same(ids, family):
    model = tiny_student(family).double()
    found = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(found, write(model, ids))


def test_a_cache_that_is_asked_for_in_training_is_made(model, ids):
    model = copy.deepcopy(model).train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == ids.shape[1]


def test_a_pickled_model_is_the_same(model, ids):
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)


def test_a_model_made_from_its_config_begins_at_the_initial_values(model):
    """As `AutoModelForCausalLM.from_config` makes it, and where a checkpoint lacks what the surgery has added."""
    made = type(model)(copy.deepcopy(model.config))
    found = copy.deepcopy(made.state_dict())
    with torch.no_grad():
        for kernel in kernels_of(made):
            kernel.reset()
    assert all(torch.equal(found[name], x) for name, x in made.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gptj", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batch_equals_single_rows(ids, family, cache):
    # Gemma 2's eager softmax is float32 always, and there the least float64 of its masks is minus infinity
    model = tiny_student(family).to(torch.float32 if family == "gemma2" else torch.float64)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    both = write(model, ids, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(both[:1], write(model, ids[:1, 7:]))
    assert torch.equal(both[1:], write(model, ids[1:]))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_search_equals_the_same_without_a_cache(model, ids, settings):
    outcomes = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outcomes.append(write(model, ids, use_cache=use_cache, max_new_tokens=8, **settings))
    assert torch.equal(*outcomes)


def test_candidates_that_are_tried_and_dropped_leave_no_trace(model, ids):
    """What contrastive search does with a cache: every row k times, one token tried in each, the best one kept."""
    cache, best = read(model, ids[:, :80]), torch.tensor([2, 0])
    tried = torch.randint(1, 257, (2, 3), generator=torch.Generator().manual_seed(1))
    cache.batch_repeat_interleave(3)
    with torch.no_grad():
        model(tried.view(-1, 1), use_cache=True, **{CACHE: cache})
        cache.batch_select_indices(torch.arange(2) * 3 + best)
        out = model(ids[:, 80:], use_cache=True, **{CACHE: cache}).logits
        chosen = torch.cat([ids[:, :80], tried.gather(1, best[:, None]), ids[:, 80:]], 1)
        expected = model(chosen, use_cache=False).logits[:, 81:]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # rotations are float32


def test_prompt_look_up_equals_greedy(model, ids):
    again = torch.cat([ids[:1], ids[:1, :40]], 1)
    assert torch.equal(write(model, again, prompt_lookup_num_tokens=4), write(model, again))


def test_assisted_generation_equals_greedy(model, ids):
    torch.manual_seed(0)
    assistant = copy.deepcopy(model)
    assistant.lm_head.weight.data += 0.05 * torch.randn(assistant.lm_head.weight.shape).double()
    assert torch.equal(write(model, ids[:1], assistant_model=assistant), write(model, ids[:1]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "qwen2"])
def test_a_static_cache_that_cuts_native_windows_short_is_right_until_it_is_full(ids, family):
    """And refused then, as the original refuses any that is full; one that holds the windows goes on."""
    model = tiny_student(family).double()
    exact, longest = model(ids, use_cache=False).logits, max(SMALL, WINDOWS[family])
    for room in (SMALL, longest + 1):
        cache = StaticCache(config=model.config, max_cache_len=room)
        steps = [model(x, use_cache=True, **{CACHE: cache}).logits for x in ids[:, :SMALL].split(SMALL - 2, 1)]
        torch.testing.assert_close(torch.cat(steps, 1), exact[:, :SMALL], rtol=0, atol=1e-5)
        read_on = partial(model, ids[:, SMALL:], use_cache=True, **{CACHE: cache})
        if room > SMALL:
            torch.testing.assert_close(read_on().logits, exact[:, SMALL:], rtol=0, atol=1e-5)
        else:
            with pytest.raises(SpecError, match=r"static cache: 90 tokens do not fit into max_cache_len=8"):
                read_on()


@torch.no_grad()
@pytest.mark.parametrize("recording", [True, False])
def test_a_cache_records_after_a_look_up_if_it_did_before(model, ids, recording):
    """Else every later token would keep the state before it."""
    cache = DynamicCache(config=model.config)
    model(ids[:1, :4], use_cache=True, **{CACHE: cache})
    if recording:
        cache.activate_past_recording()
    write(model, ids[:1], prompt_lookup_num_tokens=4, **{CACHE: cache})
    for token in ids[:1, :3].split(1, 1):
        model(token, use_cache=True, **{CACHE: cache})
    assert [len(layer.recorded) >= 3 for layer in kernel_layers(cache)] == [recording] * 2
    if not recording:
        with pytest.raises(RuntimeError, match=r"crop\(-1\)"):
            cache.crop(-1)


def test_crop_without_recording_is_refused(model, ids):
    cache = read(model, ids)
    with pytest.raises(RuntimeError, match=r"crop\(-2\): .* snapshot\(\)"):
        cache.crop(-2)


def test_continuous_batching_is_refused(model, ids):
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate_batch([ids[0].tolist()])


def test_four_dimensional_mask_is_refused(model, ids):
    mask = torch.ones(2, 1, 90, 90, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=mask)


def original_and_itself():
    """A model, and the same converted with a window over all."""
    teacher = tiny_llama()
    return teacher, kernelize_model(copy.deepcopy(teacher), [KernelSpec(window=128, feature_dim=8)] * 2).eval()


def test_smoothed_labels_are_those_of_the_next_token(ids, tmp_path):
    """The Trainer asks the name of the class whether it has to shift them."""
    options = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    losses = [
        Trainer(model, options).compute_loss(model, {"input_ids": ids, "labels": ids})
        for model in original_and_itself()
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids are not supported")  # both of peft
@pytest.mark.parametrize("masked", [True, False])
def test_learned_prompts_are_read_as_the_original_reads_them(ids, masked):
    """PEFT puts them in front of what `generate` has prepared, and lengthens the mask that it finds there."""
    written, config = [], PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    for plain in original_and_itself():
        torch.manual_seed(0)
        tuned = get_peft_model(plain, config).eval()
        mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
        written.append(tuned.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **mask))
    assert torch.equal(*written)


@pytest.mark.parametrize("shape", [(2, 60), (3, 90), (2, 1)], ids=str)
def test_a_mask_of_other_tokens_is_refused(model, ids, shape):
    with pytest.raises(SpecError, match=rf"attention_mask is \[{shape[0]}, {shape[1]}\], .* \[2, 90\]"):
        model(ids, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("made", [tiny_student, tiny_teacher])
def test_the_attention_of_converted_layers_is_refused_in_others(made, ids):
    model = made("qwen2")
    model.set_attn_implementation(ATTENTION)
    with pytest.raises(SpecError, match=r"attn_implementation='kernelize' .* a Qwen2Attention is none"):
        model(ids)


def test_a_model_that_is_given_no_tokens_says_so(model):
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_pipeline_writes_text():
    write_text = pipeline("text-generation", model=tiny_student("llama"), tokenizer=byte_tokenizer(), device="cpu")
    text = write_text("Once upon a time", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("Once upon a time")


def writer(model, **options):
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", **options)


def test_batches_of_a_dataset_equal_single_texts(model):
    texts = [
        "Once upon a time there was a window.",
        "Short.",
        "And a third one, which is longer than both, by far: " * 2,
    ]
    data = datasets.Dataset.from_dict({"text": texts})
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    write_text = writer(model)
    alone = [write_text(text, **settings)[0]["generated_text"] for text in texts]
    batches = write_text(KeyDataset(data, "text"), batch_size=3, **settings)
    assert [written[0]["generated_text"] for written in batches] == alone


def test_a_conversation_goes_through_the_chat_template(model):
    tokenizer, messages = byte_tokenizer(chat=True), [{"role": "user", "content": "Call me"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    answer = writer(model)(messages, max_new_tokens=NEW, do_sample=False)[0]["generated_text"][-1]
    expected = tokenizer.decode(write(model, ids, eos_token_id=0)[0], skip_special_tokens=True)
    assert (answer["role"], answer["content"]) == ("assistant", expected)


def test_automatic_placement_with_layers_on_disk(ids, tmp_path):
    plain = tiny_student("smollm3")
    plain.save_pretrained(tmp_path / "model")
    room = sum(p.nbytes for p in plain.parameters()) * 9 // 10
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path / "disk"
    )
    assert {"cpu", "disk"} == set(map(str, placed.hf_device_map.values()))
    assert torch.equal(write(placed, ids), write(plain, ids))
    with pytest.raises(InputError, match="is offloaded"):
        save_state(read(placed, ids), tmp_path / "state", placed)


@pytest.mark.parametrize("reach", [0, SPEC.least_reach])
def test_step_compiles_once_whatever_the_position(reach):
    model = tiny_student("llama", SPEC.replace(reach=reach)).double()
    ids = torch.randint(1, 257, (2, 170), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    cache = read(model, ids[:, :165])
    for layer in kernel_layers(cache):
        layer.static = True
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits[:, 165:]
        steps = [step(input_ids=ids[:, t : t + 1], use_cache=True, **{CACHE: cache}).logits for t in range(165, 170)]
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(steps, 1), exact, rtol=0, atol=1e-5)  # rotations are float32


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the older name is in all releases
def test_gradient_checkpointing_gives_the_same_gradient(ids):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_student("llama").double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# --- states ---------------------------------------------------------------------------------------------------


def test_saved_state_answers_as_if_all_was_read_at_once(model, ids, tmp_path):
    row = ids[:1]
    path = save_state(read(model, row[:, :80], chunk=33), tmp_path / "book.safetensors", model)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    later = generate_from(
        model, load_state(path, model), row[:, 80:], **settings
    )  # fmt: skip
    assert torch.equal(later, write(model, row))
    longer = save_state(read(model, ids.view(1, -1)), tmp_path / "longer.safetensors", model)
    assert longer.stat().st_size == path.stat().st_size


LATER = """\
import sys, torch
from kernelize import load
from kernelize.states import generate_from, load_state
model, _ = load(sys.argv[1])
question = torch.tensor([[int(token) for token in sys.argv[3].split()]])
tokens = generate_from(model, load_state(sys.argv[2], model), question, max_new_tokens=12, do_sample=False,
                       pad_token_id=0, eos_token_id=None)
print(*tokens[0].tolist())
"""


def test_a_document_read_once_is_answered_from_in_a_new_process(tmp_path):
    model = tiny_student("llama")
    document = torch.randint(1, 257, (1, 16384), generator=torch.Generator().manual_seed(2))
    question = document[:, 100:109]
    save(model, byte_tokenizer(), tmp_path / "model")
    sizes = [
        save_state(read(model, document[:, :length]), tmp_path / f"{length}", model).stat().st_size
        for length in (512, 16384)
    ]
    assert sizes[0] == sizes[1]
    asked = [str(tmp_path / "model"), str(tmp_path / "16384"), " ".join(map(str, question[0].tolist()))]
    later = subprocess.run([sys.executable, "-c", LATER, *asked], capture_output=True, text=True, check=True).stdout
    at_once = write(model, torch.cat([document, question], 1), prefill_chunk_size=3000)
    assert list(map(int, later.split())) == at_once[0].tolist()


def test_a_state_of_more_rows_than_the_prompt_is_refused(model, ids):
    with pytest.raises(InputError, match="the state holds 2 rows, the prompt 1"):
        generate_from(model, read(model, ids), ids[:1], max_new_tokens=1)


def test_a_state_of_other_weights_is_refused(model, ids, tmp_path):
    path = save_state(read(model, ids), tmp_path / "a.safetensors", model)
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data[200, 3] += 1e-9
    with pytest.raises(InputError, match="another model: its weights differ"):
        load_state(path, other)
    load_state(path, copy.deepcopy(model))


def test_a_state_that_cannot_be_written_leaves_the_old_one(model, ids, tmp_path, monkeypatch):
    path = save_state(read(model, ids), tmp_path / "a.safetensors", model)
    before = path.read_bytes()

    def full(written):
        raise OSError("no space left")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(KernelizeError, match="no space left"):
        save_state(read(model, ids[:, :50]), path, model)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_fork_leaves_the_original_alone(model, ids):
    cache = read(model, ids[:1, :80])
    both = fork(cache, 2)
    with torch.no_grad():
        out = model(ids[:, 80:], use_cache=True, **{CACHE: both}).logits
        alone = model(ids[:1, 80:], use_cache=True, **{CACHE: cache}).logits
    torch.testing.assert_close(out[:1], alone, rtol=0, atol=1e-5)  # rotations are float32


def test_state_of_another_plan_is_refused(model, ids, tmp_path):
    path = save_state(read(model, ids), tmp_path / "a.safetensors", model)
    other = tiny_student("llama", KernelSpec(window=8, block=8, slots=12, sinks=2, feature_dim=8)).double()
    with pytest.raises(InputError, match="another model: its plan differ"):
        load_state(path, other)
    with pytest.raises(InputError, match="no saved state"):
        load_state(tmp_path / "missing", model)
    with pytest.raises(InputError, match="nothing yet"):
        save_state(DynamicCache(), path, model)
    hybrid = tiny_student("gemma2")
    with pytest.raises(InputError, match="layer 0 keeps softmax attention, whose cache a saved"):
        save_state(read(hybrid, ids), path, hybrid)
