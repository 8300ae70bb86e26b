"""A stage whose micro-steps are graphs learns what it would learn without, to the bit; what cannot be one says why.

There is no GPU here: instead of a capture, the step is run again on the same tensors. Whether it could be captured, so
far as that shows without one: `capturable` in fused_laws.py. On a GPU: benchmarks/training.py graph.
"""

from __future__ import annotations

import math
import threading

import pytest
import torch
from test_train import (
    ALL,
    FORECAST,
    LORA,
    SPEC,
    TRANSFER,
    CrashError,
    assert_same_weights,
    crash_at,
    losses_of,
    recipe,
    run,
    text,  # noqa: F401  a fixture
)
from tiny import tiny_llama
from transformers.utils import import_utils

from kernelize import micro_graph
from kernelize.data import Row
from kernelize.micro_graph import WARM_UPS, MicroSteps
from kernelize.runtime.kept import holding, kept
from kernelize.runtime.layout import are_whole, layout_of, whole_rows
from kernelize.runtime.modeling import kernelize_model, kernelized_layers

JOINED = {"packing": "joined", "steps": 5}
FORECASTING = SPEC.replace(policy="attention+forecast")


class Rerun:
    """A recorder whose graphs are the recorded function itself; and as a capture does, recording computes nothing."""

    made: list[Rerun] = []

    def __init__(self):
        self.recorded = self.replayed = self.freed = 0
        self.sync = None
        Rerun.made.append(self)

    def run(self, micro):
        return micro()

    def syncs(self, micro):
        return micro(), self.sync

    def record(self, micro):
        self.recorded += 1

        def replay():
            self.replayed += 1
            micro()

        return replay

    def free(self):
        self.freed += 1


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on the CPU; gives the recorders of the stages."""
    monkeypatch.setattr(Rerun, "made", [])
    monkeypatch.setitem(micro_graph.RECORDERS, "cpu", Rerun)
    monkeypatch.setattr(micro_graph, "CAPTURED", ("chunked",))
    return Rerun.made


def reasons(events):
    return [event["eager"] for event in events if event["event"] == "graph" and "eager" in event]


def student_of(stage):
    return kernelize_model(tiny_llama(), [SPEC, FORECASTING if stage["kind"] == "forecast" else SPEC])


def both(monkeypatch, made, tmp_path, stage=ALL, **options):
    """Two models, trained without graphs and with them; and the events with them."""
    with monkeypatch.context() as without:
        without.delitem(micro_graph.RECORDERS, "cpu")
        plain, _, before = run(made, tmp_path / "plain", model=student_of(stage), **options)
    model, _, events = run(made, tmp_path / "graphs", model=student_of(stage), **options)
    assert losses_of(events) == losses_of(before)
    assert_same_weights(model, plain)
    return plain, model, events


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [TRANSFER, FORECAST, LORA, ALL], ids=["transfer", "forecast", "lora", "all"])
def test_a_stage_learns_the_same_to_the_bit(text, tmp_path, monkeypatch, graphs, stage):  # noqa: F811
    """Several micro-batches a step, with what they say of losses; and the model is left as ever."""
    _, model, events = both(monkeypatch, recipe(text, stage | JOINED | {"micro_batch": 2}), tmp_path, stage)
    assert [event for event in events if event["event"] == "graph"] == [
        {"event": "graph", "stage": stage["name"], "micro_batch": 2, "apart": 0.0}
    ]
    (recorder,) = graphs
    assert (recorder.recorded, recorder.replayed) == (1, 5 * 2 - WARM_UPS)
    assert all(layer.kernelize.probe is None for layer in kernelized_layers(model).values())


def test_a_last_smaller_micro_batch_has_its_own(text, tmp_path, monkeypatch, graphs):  # noqa: F811
    """Four rows, three at a time: the last one alone is another shape, warm one step later than its neighbour."""
    rows = ALL | JOINED | {"steps": 7}
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, size: split(x, min(size, 3)))
    _, _, events = both(monkeypatch, recipe(text, rows), tmp_path)
    assert [event["micro_batch"] for event in events if event["event"] == "graph"] == [3, 1]
    (recorder,) = graphs
    assert (recorder.recorded, recorder.replayed) == (2, 2 * 4)


def test_a_run_that_broke_off_goes_on_to_the_same_bits(text, tmp_path, graphs):  # noqa: F811
    made = recipe(text, TRANSFER | JOINED, ALL | JOINED, checkpoint_steps=2)
    undisturbed, _, _ = run(made, tmp_path / "undisturbed")
    for number, (stage, step) in enumerate((("transfer", 4), ("all", 5))):
        with pytest.raises(CrashError):
            run(made, tmp_path / str(number), on_event=crash_at(stage, step))
        resumed, result, _ = run(made, tmp_path / str(number), resume=True)
        assert result.completed
        assert_same_weights(resumed, undisturbed)
    assert sum(recorder.replayed for recorder in graphs) > 4


def test_a_step_that_is_no_number_is_skipped_and_leaves_nothing(text, tmp_path, monkeypatch, graphs):  # noqa: F811
    """Not in gradients either, which are the graphs' own and stay."""
    stage = TRANSFER | JOINED | {"on_nonfinite": "skip", "micro_batch": 2, "steps": 6}

    def spoil(model):
        gate, count = model.model.layers[0].self_attn.kernelize.log_gate, [0]

        def hook(gradient):
            count[0] += 1
            bad = count[0] in (8, 9, 10)  # the fourth step, of which the gradients are made twice to name the parameter
            return gradient * math.nan if bad else gradient

        gate.register_hook(hook)
        return model

    made = recipe(text, stage)
    with monkeypatch.context() as without:
        without.delitem(micro_graph.RECORDERS, "cpu")
        plain, _, before = run(made, tmp_path / "plain", model=spoil(student_of(stage)))
    model, _, events = run(made, tmp_path / "graphs", model=spoil(student_of(stage)))
    assert [event for event in events if event["event"] == "skipped"] == [
        event for event in before if event["event"] == "skipped"
    ]
    assert sum(event["event"] == "skipped" for event in events) == 1
    assert losses_of(events) == losses_of(before)
    assert_same_weights(model, plain)


# --- what cannot be a graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"window_dropout": 0.5}, "window_dropout is drawn by the host"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"packing": "documents"}, "packing='documents' makes as many shapes as rows; allowed: 'joined'"),
        ({"chunk_tokens": 16}, "chunk_tokens: what happens between chunks is the host's"),
    ],
)
def test_a_stage_that_cannot_be_captured_says_why_once(text, tmp_path, graphs, change, reason):  # noqa: F811
    _, result, events = run(recipe(text, ALL | JOINED | {"steps": 2} | change), tmp_path / "out")
    assert result.completed
    assert reasons(events) == [reason]
    assert graphs == []


def test_a_layer_that_is_not_fused_says_why(text, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(micro_graph.RECORDERS, "cpu", Rerun)
    _, _, events = run(recipe(text, ALL | JOINED | {"steps": 1}), tmp_path / "out")
    assert reasons(events) == ["layer 0 is chunked: the tensors are on cpu, not on a GPU"]


def test_without_a_gpu_nothing_is_said(text, tmp_path):  # noqa: F811
    _, _, events = run(recipe(text, ALL | JOINED | {"steps": 1}), tmp_path / "out")
    assert "graph" not in {event["event"] for event in events}


def test_positions_that_the_host_computes_are_refused(graphs):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    teacher = tiny_llama(rope_parameters=rope)
    assert "rope_type='dynamic'" in micro_graph.asks_the_host(teacher, torch.device("cpu"))


@pytest.mark.parametrize("when", ["sync", "capture", "kept"])
def test_a_step_that_cannot_be_captured_goes_on_eagerly(text, tmp_path, monkeypatch, graphs, when):  # noqa: F811
    """Found by torch's own warning, by a capture that fails, or by what a capture has done."""

    def broken(recorder, micro):
        if when == "capture":
            raise RuntimeError("an operation that is not permitted\nand more")
        if when == "kept":
            kept(1)(later)()
        return micro

    def later():
        return torch.zeros(1)

    monkeypatch.setattr(Rerun, "record", broken)
    if when == "sync":
        monkeypatch.setattr(Rerun, "syncs", lambda self, micro: (micro(), "modeling.py:7"))
    model = student_of(ALL)
    with monkeypatch.context() as without:
        without.delitem(micro_graph.RECORDERS, "cpu")
        plain, _, _ = run(recipe(text, TRANSFER | JOINED), tmp_path / "plain", model=student_of(ALL))
    _, _, events = run(recipe(text, TRANSFER | JOINED), tmp_path / "out", model=model)
    assert reasons(events) == [
        {
            "sync": "modeling.py:7 waits for the device",
            "capture": "its capture failed: an operation that is not permitted",
            "kept": "later made anew what it keeps",
        }[when]
    ]
    assert graphs[0].replayed == 0
    assert_same_weights(model, plain)


def test_out_of_memory_gives_up_graphs_before_it_halves_the_micro_batch(text, tmp_path, monkeypatch, graphs):  # noqa: F811
    """A first time the graph goes, a second time rows; the smaller shape has a graph of its own."""
    calls = [0]

    def failing(self, rows, counts, whole):
        calls[0] += 1
        if calls[0] in (6, 8):
            raise torch.OutOfMemoryError("none left")
        return real(self, rows, counts, whole)

    real = MicroSteps.__call__
    monkeypatch.setattr(MicroSteps, "__call__", failing)
    _, result, events = run(recipe(text, TRANSFER | JOINED | {"steps": 10}), tmp_path / "out")
    told = [event for event in events if event["event"] in ("graph", "memory")]
    assert [{key: x for key, x in event.items() if key not in ("event", "stage", "apart")} for event in told] == [
        {"micro_batch": 4}, {"eager": "out of memory beside a graph"}, {"micro_batch": 2}, {"micro_batch": 2}
    ]  # fmt: skip
    assert [event["event"] for event in told] == ["graph", "graph", "memory", "graph"]
    assert result.completed
    (recorder,) = graphs
    assert recorder.recorded == 2


# --- micro-steps by themselves ----------------------------------------------------------------------------------------


def micro_steps(told):
    """Of a loss that is a weight times the sum of the tokens."""
    weight, idle = (torch.nn.Parameter(torch.ones(())) for _ in range(2))

    def micro(rows, counts):
        loss = (weight * rows.input_ids.sum() / counts).sum()
        loss.backward()
        return loss.detach()[None]

    steps = MicroSteps(micro, [weight, idle], Rerun(), told.append)
    steps.stepped()
    return weight, idle, steps


def rows_of(*ids, size=1):
    x = torch.tensor([ids] * size)
    return Row(x, torch.arange(len(ids)).expand(size, -1), x, x > 0)


def test_a_graph_reads_what_it_is_given_and_adds_to_what_is_there():
    """Gradients from before it in the step stay, those of an earlier step go; a parameter without one keeps none."""
    told = []
    weight, idle, steps = micro_steps(told)
    for number in range(1, WARM_UPS + 6):
        weight.grad = None
        count = torch.tensor([2.0**number])
        if number % 2:  # what came before in the step was eager, of another shape
            steps(rows_of(1, 1, 1, size=number), count, True)
        before = 0.0 if weight.grad is None else float(weight.grad)
        losses = steps(rows_of(number, 5), count, True)
        assert float(weight.grad) == before + float(losses) == before + (number + 5) / 2**number
    assert told == [{"micro_batch": 1, "apart": 0.0}]
    assert steps.recorder.replayed == 5
    assert idle.grad is None


def test_a_gradient_that_comes_up_in_the_capture_alone_is_no_gradient():
    told = []
    weight, idle, steps = micro_steps(told)

    def record(micro):
        idle.grad = torch.full_like(idle, torch.nan)
        return micro

    steps.recorder.record = record
    for _ in range(WARM_UPS + 1):
        weight.grad = None
        steps(rows_of(1, 2), torch.ones(1), True)
    assert told == [{"eager": "1 parameters had no gradient before"}]
    assert idle.grad is None
    assert float(weight.grad) == 3


def test_a_capture_that_breaks_off_says_what_broke_it():
    """And the gradients that the step has so far stay; no other shape is captured after it."""
    told = []
    weight, idle, steps = micro_steps(told)
    body = steps.micro

    def record(micro):
        idle.grad = torch.full_like(idle, torch.nan)
        steps.micro = lambda *given: 1 // 0
        try:
            micro()
        finally:
            steps.micro = body
            raise RuntimeError("the end of a capture that failed")

    steps.recorder.record = record
    for number in range(WARM_UPS + 1):
        weight.grad = None
        if number == WARM_UPS:
            steps(rows_of(1, 1, 1), torch.ones(1), True)
        assert float(steps(rows_of(1, 2), torch.ones(1), True)) == 3
    assert told == [{"eager": "its capture failed: integer division or modulo by zero"}]
    assert float(weight.grad) == 6
    assert idle.grad is None
    assert not steps.gradients
    for _ in range(WARM_UPS + 2):
        steps(rows_of(7), torch.ones(1), True)
    assert not steps.graphs


def test_a_graph_with_other_gradients_is_no_graph():
    """Such as one that reads what was copied once. The step goes on with the eager ones."""
    told = []
    weight, _, steps = micro_steps(told)

    def record(micro):
        def replay():
            micro()
            weight.grad += 0.5

        return replay

    steps.recorder.record = record
    for _ in range(WARM_UPS + 2):
        weight.grad = torch.ones(())  # of an earlier micro-batch
        losses = steps(rows_of(1, 2), torch.ones(1), True)
        assert (float(losses), float(weight.grad)) == (3, 4)
    assert told == [{"eager": "its gradients are 0.5 from eager ones of 3; allowed: 0.1 of it"}]
    assert not steps.graphs


def test_memory_that_runs_out_while_a_graph_is_made_is_the_graphs(monkeypatch):
    told = []
    weight, _, steps = micro_steps(told)

    def short(self):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(MicroSteps, "_attach", short)
    for _ in range(WARM_UPS):
        steps(rows_of(1, 2), torch.ones(1), True)
    with pytest.raises(torch.OutOfMemoryError):
        steps(rows_of(1, 2), torch.ones(1), True)
    assert steps.give_up("out of memory beside a graph")
    weight.grad = None
    assert float(steps(rows_of(1, 2), torch.ones(1), True)) == float(weight.grad) == 3
    assert told == [{"eager": "out of memory beside a graph"}]
    assert not steps.give_up("again")


def test_what_the_host_draws_is_not_captured():
    told = []
    weight, _, steps = micro_steps(told)
    body = steps.micro
    steps.micro = lambda *given: body(*given) * (1 + 0 * torch.rand(()))
    for _ in range(WARM_UPS + 2):
        weight.grad = None
        steps(rows_of(1, 2), torch.ones(1), True)
    assert told == [{"eager": "the model draws random numbers on the host"}]
    assert float(weight.grad) == 3


def test_nothing_is_captured_before_the_optimizer_has_its_moments():
    told = []
    _, _, steps = micro_steps(told)
    steps.steps = 0
    for _ in range(WARM_UPS + 3):
        steps(rows_of(1, 2), torch.ones(1), True)
    assert told == []
    steps.stepped()
    steps(rows_of(1, 2), torch.ones(1), True)
    assert told == [{"micro_batch": 1, "apart": 0.0}]


def test_a_refused_shape_leaves_the_graphs_of_others_alone():
    """What one graph's capture has taken, others read."""
    told = []
    weight, _, steps = micro_steps(told)
    for size in (1, 2):
        for _ in range(WARM_UPS + 1):
            weight.grad = None
            steps(rows_of(1, 2, size=size), torch.ones(1), True)
        steps.recorder.record = lambda micro: 1 // 0
    assert told == [
        {"micro_batch": 1, "apart": 0.0},
        {"eager": "its capture failed: integer division or modulo by zero"},
    ]
    assert steps.recorder.freed == 0
    weight.grad = None
    steps(rows_of(1, 2), torch.ones(1), True)
    assert float(weight.grad) == 3


def test_packed_rows_are_left_to_the_eager_step():
    told = []
    weight, _, steps = micro_steps(told)
    for _ in range(WARM_UPS + 3):
        weight.grad = None
        steps(rows_of(1, 2), torch.ones(1), False)
    assert told == [{"eager": "rows hold several documents"}]
    assert float(weight.grad) == 3


def test_what_the_host_knows_of_rows_is_not_asked_again(monkeypatch):
    """The same logits, of both models; and without that knowledge packed rows are still seen."""
    whole, packed = torch.arange(12).expand(2, -1), torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert are_whole(whole)
    assert not are_whole(packed)
    for model in (tiny_llama(), kernelize_model(tiny_llama(), [SPEC, None])):
        ids = torch.arange(1, 25).view(2, 12)
        expected = model(ids, position_ids=whole).logits
        with whole_rows():
            assert torch.equal(model(ids, position_ids=whole).logits, expected)
    with whole_rows():
        assert layout_of(6, None, packed, 1, False) is None
        with whole_rows(False):
            assert layout_of(6, None, packed, 1, False) is None  # what is known further out stays known
    with whole_rows(False):
        assert layout_of(6, None, packed, 1, False).documents is not None
    assert layout_of(6, None, packed, 1, False).documents is not None


def test_what_one_thread_knows_another_does_not():
    packed, seen = torch.tensor([[0, 1, 2, 0, 1, 2]]), []
    other = threading.Thread(target=lambda: seen.append(layout_of(6, None, packed, 1, False)))
    with whole_rows():
        other.start()
        other.join()
        assert layout_of(6, None, packed, 1, False) is None
    assert seen[0].documents is not None


def test_a_capture_makes_no_mask_of_whole_rows(monkeypatch):
    """Softmax attention gets the same in a capture as before it: what torch.compile has compiled serves there, too."""
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    model, seen = tiny_llama().eval(), []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    ids, positions = torch.arange(1, 25).view(2, 12), torch.arange(12).expand(2, -1)
    model(ids, position_ids=positions, use_cache=False)
    with whole_rows():
        model(ids, position_ids=positions, use_cache=False)
    assert seen[0] is not None
    assert seen[1] is None


def test_a_graph_reads_rows_that_lie_as_those_before_it():
    """Or compiled code would be compiled anew, in the capture, where that is not allowed."""
    seen = []
    _, _, steps = micro_steps([])
    body = steps.micro

    def micro(rows, counts):
        seen.append([(x.stride(), x.dtype) for x in rows])
        return body(rows, counts)

    steps.micro = micro
    positions = torch.arange(6).expand(2, -1)  # of stride 0
    ids = torch.ones(2, 12, dtype=torch.int64)[:, ::2]
    for _ in range(WARM_UPS + 2):
        steps(Row(ids, positions, ids, ids > 0), torch.ones(1), True)
    assert len(steps.graphs) == 1
    assert len(seen) == WARM_UPS + 3  # one more beside the graph's first
    assert all(one == seen[0] for one in seen)


def test_what_is_kept_can_be_held():
    made = []

    @kept(1)
    def shelf(number):
        made.append(number)
        return [number]

    first = shelf(1)
    with holding() as held:
        assert shelf(1) is first
        assert held.made == []
        shelf(2)
        assert shelf(1) is not first  # there is room for one
    assert held.found == [[1], [2], [1]]
    assert held.made == ["shelf", "shelf"]
    shelf(3)
    assert len(held.found) == 3
    assert made == [1, 2, 1, 3]
