"""The training loop: one for all stages, driven by accelerate; it stops and resumes anywhere.

The result depends on the recipe alone, not on micro-batch size or number of processes: losses are sums divided by
the count in the global batch, and the random numbers of a micro-batch are a function of seed, stage, step and its
index. Whatever trains is float32; on a GPU the arithmetic is bfloat16 under autocast.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from . import checkpoints, micro_graph, sharding
from .blockwise import BlockTransfer, Group, Store, blocks_of, groups, place
from .chunks import ChunkedDistil
from .compiled import compiled_layers
from .data import (
    HAYSTACK_PER_TOKEN,
    Documents,
    Row,
    Rows,
    batches,
    fitting_micro_batch,
    longest_sequence,
    open_source,
    prefetched,
    write_text,
)
from .errors import InputError, KernelizeError
from .files import MARK, alone, writing
from .micro_graph import MicroSteps
from .objectives import NEW, Distil, Forecast, Losses, Objective, Transfer, attach_lora, forecasting_layers
from .origin import data_prints, joint_print, weight_prints
from .recipe import DistilWeights, Lora, Recipe, Stage, TransferWeights
from .runtime.layout import are_whole, whole_rows
from .runtime.modeling import kernelized_layers
from .subject import has_position_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINTS, LOG, WRITTEN, HIDDEN = "checkpoints", "train.jsonl", "data", "hidden"
COMPILED_ON, BACKEND = ("cuda",), "inductor"
STDERR, SECOND = 2, b"stopping after this step; Ctrl-C once more stops at once\n"
SKIPPED = 8  # steps in a row that cannot be used end a run even if its recipe skips them

Event = dict[str, Any]


@dataclass(frozen=True)
class StageResult:
    """What one stage did in this process's lifetime; the losses are those of its first and last step here."""

    name: str
    steps: int
    tokens: int
    seconds: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class TrainResult:
    """`completed` is False when SIGTERM or Ctrl-C ended the run early; `finetune(resume=True)` goes on from there."""

    output: Path
    stages: tuple[StageResult, ...]
    completed: bool


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    output: str | Path,
    *,
    teacher: PreTrainedModel | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
    document: Callable[[Path], None] = lambda folder: None,
) -> TrainResult:
    """Trains a converted model in place by the recipe's stages and saves it to the folder `output`.

    `teacher` is the original model, for stages that distil or use data `self`; without it `recipe.source` is loaded.
    The folder also gets train.jsonl (every event), checkpoints/ (the last two) and TensorBoard files if that is
    installed. `on_event` gets each event on the main process: dictionaries with the key event, one of start,
    damaged, writing, stage, graph, step, skipped, memory, checkpoint, stopped, done. `document` may put files beside
    the weights, as for `convert.save`.

    InputError before anything is written when recipe, data, model and processes do not fit together; KernelizeError
    when a loss or gradient is not finite, naming stage, step, layer and batch, or when the disk does not take what is
    saved: `resume` then goes on from the last checkpoint.
    """
    run = _Run(model, tokenizer, recipe, Path(output), teacher, on_event, document)
    run.check(resume, overwrite)
    return run.train(resume)


def _is_trainable(name: str, stage: Stage) -> bool:
    if stage.kind == "forecast":
        return f"{NEW}forecast_" in name
    return stage.trainable == "all" or NEW in name or (stage.trainable == "new+lora" and ".lora_" in name)


@dataclass
class _Training:
    """The moving parts of a stage."""

    stage: Stage
    objective: Objective
    wrapped: nn.Module  # objective, perhaps in a data-parallel wrapper
    optimizer: Any
    scheduler: Any
    micro_batch: int  # sequences at a time
    graphs: MicroSteps | None = None  # where micro-steps may be CUDA graphs
    adapter: Any = None
    adapted: list[str] = field(default_factory=list)
    round: int = 0  # of the groups of layers that train one after the other


class NonfiniteError(KernelizeError):
    """A loss or a gradient is not a finite number."""


class _Stop:
    """Notes a SIGTERM or a first Ctrl-C, so that the step can be finished and saved. Only a process's main thread can.

    `asked` is what this process was told, at any moment; `agreed` is what all processes have heard from one of them in
    the same step: only by that may a process leave the others.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        told = {signal.SIGTERM: self._terminate}
        if (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):  # else somebody ignores it, or has other plans
            told[signal.SIGINT] = self._interrupt
        before = {number: signal.signal(number, handler) for number, handler in told.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _terminate(self, *_: Any) -> None:
        self.asked = True

    def _interrupt(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):  # and not print, which may be what was interrupted
            os.write(STDERR, SECOND)


class _Journal:
    """Events to a file of JSON lines, to TensorBoard if it is installed, and to the caller; on the main process."""

    def __init__(self, output: Path, on_event: Callable[[Event], None] | None):
        self.on_event = on_event
        self.path = output / LOG
        with writing(self.path):
            output.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
            _end_line(self.path)
        self.board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(output / "tensorboard"))

    def __call__(self, event: Event) -> None:
        with writing(self.path):
            self.file.write(json.dumps(event) + "\n")
            self.file.flush()
        if self.board and event["event"] == "step":
            for name, value in event["metrics"].items():
                self.board.add_scalar(f"{event['stage']}/{name}", value, event["step"])
        if self.on_event:
            self.on_event(event)

    def close(self) -> None:
        with suppress(OSError):  # a full disk, which was reported, does not take the rest of the buffer either
            self.file.close()
        if self.board:
            self.board.close()


def _end_line(path: Path) -> None:
    """Takes away the half of a line that a killed run has left."""
    raw = path.read_bytes()
    if not raw.endswith(b"\n"):
        os.truncate(path, raw.rfind(b"\n") + 1)


# --- the run ----------------------------------------------------------------------------------------------------------


class _Run:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        output: Path,
        teacher: PreTrainedModel | None,
        on_event: Callable[[Event], None] | None,
        document: Callable[[Path], None],
    ):
        self.model, self.tokenizer, self.recipe, self.output = model, tokenizer, recipe, output
        self.teacher, self.on_event, self.document = teacher, on_event, document
        self.accelerator = sharding.make_accelerator()
        self.engine = sharding.engine_of(self.accelerator)
        self.reading: PreTrainedModel | None = None  # the teacher, as a distillation has it
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.changed: set[str] = set()  # original parameters that ended stages have changed
        self.prints, self.texts = weight_prints(model), dict[str, str]()
        self.stop = _Stop()
        self.journal: _Journal | None = None

    # --- before anything is written ---

    def check(self, resume: bool, overwrite: bool) -> None:
        if not self.recipe.stages:
            raise InputError(f"recipe {self.recipe.name!r} has no stages, so there is nothing to train")
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {self.output} is a file, not a folder")
        if resume and overwrite:
            raise InputError(
                "resume goes on with the run in the output folder, overwrite begins anew; give one of them"
            )
        self._check_output(resume, overwrite)
        for stage in self.recipe.stages:
            self._check_stage(stage)
        self.accelerator.wait_for_everyone()

    def _check_output(self, resume: bool, overwrite: bool) -> None:
        """InputError for a folder with something in it that this run would take away unasked."""
        if overwrite or not self.output.exists() or not any(self.output.iterdir()):
            return
        if not resume:
            raise InputError(f"output folder {self.output} is not empty; resume the run in it, or choose another")
        if checkpoints.some(self.output / CHECKPOINTS):
            return
        if (self.output / MARK).exists() or not (self.output / LOG).exists():
            raise InputError(f"output folder {self.output} is not empty, and there is no checkpoint to resume from")

    def _check_stage(self, stage: Stage) -> None:
        limit = longest_sequence(self.model.config)
        if limit is not None and stage.sequence_length > limit and not self._may_exceed(stage, limit):
            raise InputError(
                f"stage {stage.name!r}: sequence_length={stage.sequence_length}; the model's positions end at {limit}"
                + (" (distil.beyond weighs what comes after)" if self._can_exceed(stage, limit) else "")
            )
        fitting_micro_batch(stage.rows, stage.micro_batch, self.accelerator.num_processes)
        if self.teacher is None and self.recipe.source is None and needs_teacher(stage):
            raise InputError(
                f"stage {stage.name!r} needs the original model: give a teacher, or a source in the recipe"
            )
        if stage.trainable == "new" and not any(NEW in name for name in self.dtypes):
            raise InputError(f"stage {stage.name!r} trains new parameters only, and the model has none")
        if stage.kind == "forecast" and not forecasting_layers(self.model):
            raise InputError(
                f"stage {stage.name!r} fits forecasts, but no layer's policy has one, as attention+forecast"
            )
        if stage.layers_at_a_time and self.engine.sharded:
            raise InputError(
                f"stage {stage.name!r}: layers_at_a_time={stage.layers_at_a_time} holds those layers whole; use ddp"
            )
        kept = self.model.config.num_hidden_layers - len(kernelized_layers(self.model))
        if stage.chunk_tokens and kept:
            raise InputError(
                f"stage {stage.name!r}: chunk_tokens={stage.chunk_tokens} carries states of constant size, and "
                f"{kept} layers are not converted"
            )
        for source in stage.data:
            if source.builtin != "self":
                open_source(source)

    def _may_exceed(self, stage: Stage, limit: int) -> bool:
        """Whether a sequence may go past the model's positions: rotary ones, and the recipe says what counts there."""
        says = stage.distil is not None and stage.distil.beyond is not None
        return says and self._can_exceed(stage, limit)

    def _can_exceed(self, stage: Stage, limit: int) -> bool:
        return stage.kind == "distil" and not has_position_table(self.model, limit)

    # --- the whole ---

    def train(self, resume: bool) -> TrainResult:
        last, damaged = checkpoints.last(self.output / CHECKPOINTS) if resume else (None, [])
        if last:
            self._check_origin(last)
        with ExitStack() as held:
            if self.accelerator.is_main_process:
                new = not self.output.exists()
                held.enter_context(alone(self.output))
                if not resume:
                    self._clear()
                    held.enter_context(self._leaving_nothing(new))
                self.journal = _Journal(self.output, self.on_event)
                held.callback(self.journal.close)
            for problem in damaged:
                self._tell(event="damaged", problem=problem)
            self.texts = data_prints(self.recipe)
            with self.stop.listening():
                return self._stages(last)

    def _check_origin(self, last: checkpoints.Checkpoint) -> None:
        """InputError unless this run is the one that the checkpoint belongs to."""
        if last.recipe != self.recipe.to_dict():
            raise InputError(f"{last.path} was made by another recipe; resume with the one it was started with")
        if last.origin and last.origin != joint_print(self.prints, last.names()):
            raise InputError(
                f"{last.path} was trained from another model or in another type of numbers; resume with those it was "
                "started with"
            )
        before = last.texts or {}
        for path, value in data_prints(self.recipe, last.stage).items():
            if before.get(path, value) != value:
                raise InputError(f"{path}: has changed since {last.path} was made; its place in the data is lost")

    @contextmanager
    def _leaving_nothing(self, new: bool) -> Iterator[None]:
        """Within it a run whose data are wrong before the first checkpoint leaves no trace: it can be run again."""
        try:
            yield
        except InputError:
            if not (self.output / CHECKPOINTS).exists():
                self._clear()
                if new:
                    with suppress(OSError):  # what somebody else has put there stays
                        self.output.rmdir()
            raise

    def _clear(self) -> None:
        """Removes what an earlier run in this folder has left: only what this module writes."""
        for folder in (CHECKPOINTS, WRITTEN, HIDDEN, "tensorboard"):
            shutil.rmtree(self.output / folder, ignore_errors=True)
        (self.output / LOG).unlink(missing_ok=True)

    def _stages(self, last: checkpoints.Checkpoint | None) -> TrainResult:
        if not torch.cuda.is_available():
            self.model.float()
        processes, engine = self.accelerator.num_processes, self.accelerator.distributed_type.value.lower()
        resumed = last is not None
        self._tell(event="start", recipe=self.recipe.name, resumed=resumed, processes=processes, engine=engine)
        results = []
        for index, stage in enumerate(self.recipe.stages):
            if last and (index, self._rounds(stage) * stage.total_steps) <= (last.stage, last.step):
                continue
            results.append(self._stage(index, stage, last))
            last = None
            if self.stop.agreed:
                self._tell(event="stopped", stage=stage.name)
                return TrainResult(self.output, tuple(results), completed=False)
        if last:
            self._restore(last)
        self._save()
        return TrainResult(self.output, tuple(results), completed=True)

    def _tell(self, **event: Any) -> None:
        if self.journal:
            self.journal(event)

    # --- one stage ---

    def _groups(self, stage: Stage) -> Sequence[Group | None]:
        """The layers that train together, one after the other; None is all at once."""
        return groups(self.model, stage.layers_at_a_time) if stage.layers_at_a_time else [None]

    def _rounds(self, stage: Stage) -> int:
        return len(self._groups(stage))

    def _stage(self, index: int, stage: Stage, last: checkpoints.Checkpoint | None) -> StageResult:
        done = last.step if last and last.stage == index else 0
        rounds, first = divmod(done, stage.total_steps)
        if last and not first:
            self._restore(last)
        stream, results = self._stream(index, stage), []
        for number, group in list(enumerate(self._groups(stage)))[rounds:]:
            training = self._prepare(index, stage, last if first else None, number, group)
            try:
                with closing(stream(last.position if last and first else None)) as data, self._compiled(stage):
                    results.append(self._steps(index, training, data, first))
            finally:
                self._leave(training)
            if self.stop.agreed:
                break
            if group:
                self._store().forget(group.first)
            last, first = None, 0
        return _joined(results)

    @contextmanager
    def _compiled(self, stage: Stage) -> Iterator[None]:
        """On a GPU the stage's models run compiled around their attention, where the stage allows it."""
        with ExitStack() as stack:
            if self.accelerator.device.type in COMPILED_ON and stage.is_compilable and not self.engine.sharded:
                for model in (self.model, self.teacher if stage.kind == "distil" else None):
                    if model is not None:
                        stack.enter_context(compiled_layers(model, BACKEND))
            try:
                yield
            except torch._dynamo.exc.TorchDynamoException as error:  # looked up only then: its import takes seconds
                reason = " ".join(str(error).split())[:200]
                raise KernelizeError(
                    f"stage {stage.name!r}: torch.compile failed ({reason}); with compiled: false it trains without"
                ) from error

    def _store(self) -> Store:
        return Store(self.output / HIDDEN, self.accelerator.process_index)

    def _stream(self, index: int, stage: Stage) -> Callable[..., Generator[tuple[list[Row], dict[str, Any]]]]:
        seed = int(np.random.SeedSequence([self.recipe.seed, index]).generate_state(1)[0])
        haystack = HAYSTACK_PER_TOKEN * stage.sequence_length
        documents = Documents(stage.data, seed, written=self._written(stage, seed), haystack=haystack)
        rows = Rows(documents, self.tokenizer, stage.sequence_length, stage.packing == "joined")
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        micro_batch = fitting_micro_batch(stage.rows, stage.micro_batch, processes)
        return lambda position: prefetched(batches(rows(position), stage.rows, micro_batch, process, processes))

    def _written(self, stage: Stage, seed: int) -> Path | None:
        """The teacher's own text for this stage, written once."""
        share = sum(s.weight for s in stage.data if s.builtin == "self") / sum(s.weight for s in stage.data)
        if not share:
            return None
        path = self.output / WRITTEN / f"{stage.name}.jsonl"
        if self.accelerator.is_main_process and not path.exists():
            tokens = math.ceil(share * stage.total_steps * stage.batch_tokens)
            self._tell(event="writing", stage=stage.name, tokens=tokens)
            write_text(self._teacher(), self.tokenizer, path, tokens, seed=seed, length=stage.sequence_length)
        self.accelerator.wait_for_everyone()
        return path

    def _original(self) -> PreTrainedModel:
        """The model before its conversion, wherever it is."""
        if self.teacher is None:
            from .convert import load

            self.teacher, _ = load(self.recipe.source or "")
        return self.teacher.requires_grad_(False).eval()

    def _teacher(self) -> PreTrainedModel:
        return self._original().to(self.accelerator.device)

    def _prepare(
        self, index: int, stage: Stage, last: checkpoints.Checkpoint | None, number: int, group: Group | None
    ) -> _Training:
        """What trains in round `number` of a stage, its `group` of layers, from the middle of it with `last`."""
        self._seed(index, 0, 0)
        adapter, adapted = None, list[str]()
        if stage.trainable == "new+lora":
            adapter, adapted = attach_lora(self.model, stage.lora or Lora())
        on_device = None if self.engine.sharded else place(self.model, group, self.accelerator.device, "cpu")
        self._choose(stage, group)
        if last:
            self.changed = set(last.changed)
            last.load_parameters(self._parameters())
        self._mode(stage)
        objective = self._objective(stage, copy.deepcopy(self.model) if self.engine.sharded else self.model, group)
        optimizer, scheduler = self._optimizer(stage, objective.model)
        wrapped, prepared = self.engine.prepare(objective, optimizer, stage.clip)
        if last:
            state, schedule = last.load_optimizer(self.accelerator.device)
            self.engine.load_optimizer(wrapped, prepared, state)
            scheduler.load_state_dict(schedule)
        fitting = fitting_micro_batch(stage.rows, stage.micro_batch, self.accelerator.num_processes)
        self._tell(
            event="stage",
            stage=stage.name,
            kind=stage.kind,
            steps=self._rounds(stage) * stage.total_steps,
            tokens=stage.total_steps * stage.batch_tokens,
            parameters=sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad),
            held_parameters=self.engine.held(objective.model, self.reading) if on_device is None else on_device,
            lora_layers=adapted,
        )
        training = _Training(stage, objective, wrapped, prepared, scheduler, fitting, None, adapter, adapted, number)
        training.graphs = self._graphs(training)
        return training

    def _graphs(self, training: _Training) -> MicroSteps | None:
        """What makes CUDA graphs of the stage's micro-steps, on a GPU; None where none can be: the journal says why."""
        stage, device = training.stage, self.accelerator.device
        if device.type not in micro_graph.RECORDERS:
            return None
        tell = partial(self._tell, event="graph", stage=stage.name)
        reason = micro_graph.uncapturable(stage, self.accelerator.distributed_type != DistributedType.NO)
        for model in (self.model, self.reading if stage.kind == "distil" else None):
            if reason is None and model is not None:
                reason = micro_graph.asks_the_host(model, device)
        if reason:
            tell(eager=reason)
            return None
        trained = [p for p in training.objective.model.parameters() if p.requires_grad]
        recorder = micro_graph.RECORDERS[device.type]()
        return MicroSteps(partial(self._micro, training), trained, recorder, lambda found: tell(**found))

    def _choose(self, stage: Stage, group: Group | None) -> None:
        """Sets which parameters train, in float32: those of the stage, within the group."""
        inside = {id(p) for i in group.layers for p in blocks_of(self.model)[i].parameters()} if group else None
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(_is_trainable(name, stage) and (inside is None or id(parameter) in inside))
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _optimizer(self, stage: Stage, model: PreTrainedModel) -> tuple[torch.optim.AdamW, Any]:
        """Optimizer and schedule of what trains in `model`."""
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=stage.learning_rate,
            betas=stage.betas,
            weight_decay=stage.weight_decay,
            fused=self.accelerator.device.type == "cuda",
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_at, stage=stage))

    def _mode(self, stage: Stage) -> None:
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):  # what is learned is a function, not a distribution of functions
                module.eval()
        for layer in kernelized_layers(self.model).values():
            layer.kernelize.window_dropout = stage.window_dropout
        _recompute_layers(self.model, stage.gradient_checkpointing)

    def _objective(self, stage: Stage, model: PreTrainedModel, group: Group | None) -> Objective:
        if group:
            return BlockTransfer(model, stage.transfer or TransferWeights(), group, self._store())
        if stage.kind == "transfer":
            return Transfer(model, stage.transfer or TransferWeights())
        if stage.kind == "forecast":
            return Forecast(model, stage.target == "answers")
        given = model, self._reading_teacher(), stage.distil or DistilWeights()
        if stage.chunk_tokens is None:
            return Distil(*given)
        return ChunkedDistil(*given, stage.chunk_tokens, stage.across or "truncate")

    def _reading_teacher(self) -> PreTrainedModel:
        """The teacher as distillation reads it: sharded where the model is."""
        if self.reading is None:
            self.reading = self.engine.teacher(self._original())
        return self.reading

    def _leave(self, training: _Training) -> None:
        training.graphs = None
        training.objective.close()
        self.engine.leave(training.wrapped)
        _recompute_layers(self.model, False)
        for layer in kernelized_layers(self.model).values():
            layer.kernelize.window_dropout = 0.0
        self.model.eval()

    def _seed(self, stage: int, step: int, micro: int) -> None:
        sequence = np.random.SeedSequence([self.recipe.seed, stage, step, micro])
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    # --- steps ---

    def _steps(self, index: int, training: _Training, stream: Iterator, first: int) -> StageResult:
        stage, losses, began, skipped = training.stage, [], time.monotonic(), 0
        before, steps = training.round * stage.total_steps, self._rounds(stage) * stage.total_steps
        for step in range(first + 1, stage.total_steps + 1):
            micro, position = next(stream)
            try:
                metrics, skipped = self._step(index, step, training, micro), 0
            except NonfiniteError as error:
                skipped += 1
                self._skip(training, error, f"{error} ({_batch(position)})", skipped)
            else:
                losses.append(metrics["loss"])
                seconds = time.monotonic() - began
                self._tell(**_progress(stage, before + step, steps, step - first, seconds, metrics))
            ended = step == stage.total_steps
            if ended:
                self._merge(training)
            if ended or self.stop.agreed or step % self.recipe.checkpoint_steps == 0:
                self._checkpoint(index, before + step, position, None if ended else training)
            if self.stop.agreed:
                break
        tokens = len(losses) * stage.batch_tokens
        first_loss, last_loss = (losses[0], losses[-1]) if losses else (math.nan, math.nan)
        return StageResult(stage.name, len(losses), tokens, time.monotonic() - began, first_loss, last_loss)

    def _step(self, index: int, step: int, training: _Training, micro: list[Row]) -> dict[str, float]:
        summed = self._gradients_in_memory(index, step, training, micro)
        self.stop.agreed = summed.pop() > 0
        norm = self.engine.clipped_norm(training.wrapped, training.stage.clip)
        if not math.isfinite(norm) or not all(map(math.isfinite, summed)):
            problem = self._loss_problem(training, summed) or self._gradient_problem(index, step, training, micro)
            raise NonfiniteError(f"stage {training.stage.name!r}, step {step}: {problem}")
        rate = training.scheduler.get_last_lr()[0]
        self.engine.step(training.wrapped, training.optimizer)
        training.scheduler.step()
        if training.graphs:
            training.graphs.stepped()
        names = ("loss", *training.objective.terms)
        return dict(zip(names, summed, strict=False)) | {"gradient_norm": norm, "learning_rate": rate}

    def _skip(self, training: _Training, error: NonfiniteError, problem: str, skipped: int) -> None:
        """Leaves a step out, as the recipe allows: parameters, optimizer and learning rate stay."""
        if training.stage.on_nonfinite == "stop":
            raise NonfiniteError(problem) from error
        if skipped == SKIPPED:
            raise NonfiniteError(f"{problem}; {skipped} steps in a row could not be used") from error
        self.engine.forget(training.wrapped, training.optimizer)
        self._tell(event="skipped", stage=training.stage.name, problem=problem)

    def _gradients_in_memory(self, index: int, step: int, training: _Training, micro: list[Row]) -> list[float]:
        """`_gradients`, with micro-batches that fit: too large ones are halved, for this stage and its global batch."""
        while True:
            try:
                return self._gradients(index, step, training, micro)
            except torch.OutOfMemoryError as error:
                # what a graph has taken is all that an eager micro-step of another shape lacks
                if training.graphs is None or not training.graphs.give_up("out of memory beside a graph"):
                    self._halve(training, error)
            self.engine.forget(training.wrapped, training.optimizer)
            torch.cuda.empty_cache()

    def _halve(self, training: _Training, error: torch.OutOfMemoryError) -> None:
        """Takes half as many sequences at a time from here on. With several processes the others would wait for
        this one's gradients, so there it is for the recipe to say."""
        stage, size = training.stage, training.micro_batch
        if size == 1 or self.accelerator.num_processes > 1:
            advice = "a smaller micro_batch, " if size > 1 else ""
            raise KernelizeError(
                f"stage {stage.name!r}: out of memory with {size} sequences of {stage.sequence_length} tokens at once; "
                f"{advice}gradient_checkpointing or a shorter sequence_length needs less"
            ) from error
        training.micro_batch = size // 2
        self._tell(event="memory", stage=stage.name, micro_batch=training.micro_batch)

    def _gradients(self, index: int, step: int, training: _Training, micro: list[Row]) -> list[float]:
        """Leaves the gradients of a global batch; its losses (as `_means`), and whether a process was told to stop."""
        processes, objective = self.accelerator.num_processes, training.objective
        micro = [
            Row(*parts) for rows in micro for parts in zip(*(x.split(training.micro_batch) for x in rows), strict=True)
        ]
        # counted before the rows leave the host: there each count would be a sync
        counts = self._sum(torch.tensor([objective.counts(rows) for rows in micro], dtype=torch.float32).sum(0))
        whole = [are_whole(rows.position_ids) for rows in micro]  # asked here for the same reason
        micro = [Row(*(part.to(self.accelerator.device) for part in rows)) for rows in micro]
        counts = counts.clamp(min=1)
        objective.begin(step)
        total: Tensor | float = 0.0
        for number, rows in enumerate(micro):
            self._seed(index, step, number * processes + self.accelerator.process_index)
            if training.graphs:
                total = total + training.graphs(rows, counts, whole[number])
                continue
            for part, ends in self._parts(objective, rows):
                with whole_rows(whole[number]):
                    total = total + self._micro(training, part, counts, ends and number == len(micro) - 1)
        asked = torch.tensor([float(self.stop.asked)], device=self.accelerator.device)
        return self._sum(torch.cat((torch.as_tensor(total), asked))).tolist()

    def _micro(self, training: _Training, part: Row, counts: Tensor, last: bool = True) -> Tensor:
        """Adds the gradients of a part of a micro-batch, and gives its `_means`; nothing here asks the device.

        `last`: they complete those of the global batch, which matters to several processes alone.
        """
        with self.engine.micro(training.wrapped, last):
            with self.accelerator.autocast():  # which FSDP2's wrapper leaves to the loop
                losses: Losses = training.wrapped(*part, counts)
            # data-parallel gradients are means over processes; those of a state are a process's own
            loss = losses.loss * self.accelerator.num_processes
            self.engine.backward(training.wrapped, loss if losses.carried is None else loss + losses.carried)
        return _means(losses, counts, list(training.objective.terms.values()))

    def _parts(self, objective: Objective, rows: Row) -> Iterator[tuple[Row, bool]]:
        """The parts of a micro-batch, each with whether it is the last; what is done between them is under autocast."""
        parts, count = objective.parts(rows), objective.pieces(rows)
        for number in range(count):
            with self.accelerator.autocast():
                part = next(parts)
            yield part, number == count - 1
        next(parts, None)

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum")

    def _loss_problem(self, training: _Training, values: list[float]) -> str | None:
        layers = values[1 + len(training.objective.terms) :]
        for index, loss in zip(training.objective.measured, layers, strict=False):
            if not math.isfinite(loss):
                return f"the loss of layer {index} is {loss}"
        return None if math.isfinite(values[0]) else f"the loss is {values[0]}"

    def _gradient_problem(self, index: int, step: int, training: _Training, micro: list[Row]) -> str:
        """Which gradient is no number. They are made once more: clipping has spread it over all of them."""
        self.engine.forget(training.wrapped, training.optimizer)
        self._gradients(index, step, training, micro)
        name = self.engine.nonfinite_gradient(training.objective.model)
        return f"the gradient of {name or 'all parameters together'} is not finite"

    def _merge(self, training: _Training) -> None:
        """Folds LoRA into the weights and notes what this stage has changed."""
        self._collect(training)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if training.adapter is not None:
            training.adapter.merge_and_unload()
            trained |= {f"{name}.weight" for name in training.adapted}
        self.changed |= {name for name, _ in self.model.named_parameters()} & trained

    def _collect(self, training: _Training) -> None:
        """Brings what the stage's sharded copy has learned into the model."""
        if self.engine.sharded:
            shards = dict(training.objective.model.named_parameters())
            self.engine.collect(shards, dict(self.model.named_parameters()))

    # --- keeping ---

    def _parameters(self) -> dict[str, nn.Parameter]:
        """What has been or is being trained, by name; a LoRA layer's own weight goes by its plain name."""
        named = {name.replace(".base_layer.", "."): parameter for name, parameter in self.model.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad or name in self.changed}

    def _checkpoint(self, index: int, step: int, position: dict[str, Any], training: _Training | None) -> None:
        optimizer, stage = None, self.recipe.stages[index].name
        if training is not None:
            self._collect(training)
            optimizer = self.engine.optimizer_state(training.wrapped, training.optimizer)
        if bad := sharding.nonfinite(self._parameters()):
            raise KernelizeError(f"stage {stage!r}, step {step}: {bad} is not finite, not saved")
        if self.accelerator.is_main_process:
            path = checkpoints.write(
                self.output / CHECKPOINTS,
                stage=stage,
                state=self._state(index, step, position),
                parameters=self._parameters(),
                optimizer=optimizer,
                scheduler=None if training is None else training.scheduler.state_dict(),
            )
            self._tell(event="checkpoint", stage=stage, step=step, path=str(path))
        self.accelerator.wait_for_everyone()

    def _state(self, index: int, step: int, position: dict[str, Any]) -> checkpoints.State:
        return checkpoints.State(
            index, step, position, self.recipe.to_dict(), sorted(self.changed),
            origin=joint_print(self.prints, self._parameters()), texts=self.texts,
        )  # fmt: skip

    def _restore(self, last: checkpoints.Checkpoint) -> None:
        """Takes over what was trained up to the end of a stage."""
        self.changed = set(last.changed)
        last.load_parameters(dict(self.model.named_parameters()))

    def _save(self) -> None:
        """The model as an ordinary checkpoint beside the log."""
        from .convert import save

        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self.dtypes[name])
            parameter.requires_grad_(True)
        if bad := sharding.nonfinite(dict(self.model.named_parameters())):
            raise KernelizeError(f"{bad} is not finite in {self.dtypes[bad]}, nothing is saved")
        if self.accelerator.is_main_process:
            save(self.model, self.tokenizer, self.output, overwrite=True, document=self.document)
            self._tell(event="done", output=str(self.output))
        self.accelerator.wait_for_everyone()


def rate_at(step: int, stage: Stage) -> float:
    """Share of its learning rate that a step of the stage takes: rising from the first on, then falling as a cosine."""
    warmup = math.ceil(stage.warmup * stage.total_steps)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(stage.total_steps - warmup, 1))) / 2


def _means(losses: Losses, counts: Tensor, divisors: list[int]) -> Tensor:
    """[1 + terms + layers]: what a micro-batch adds to the global batch's loss, terms and losses of the layers."""
    loss = losses.loss.detach()[None]
    divided = losses.terms / torch.stack([counts[number] for number in divisors])  # a list as index would be a sync
    return torch.cat((loss, divided, losses.layers / counts[0])).float()


def needs_teacher(stage: Stage) -> bool:
    return stage.kind == "distil" or any(source.builtin == "self" for source in stage.data)


def _recompute_layers(model: PreTrainedModel, enabled: bool) -> None:
    """Gradient checkpointing of every layer. The model's own switch would make frozen inputs need gradients too."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if enabled and not layers:
        raise InputError(f"{type(model).__name__} has no layers that support gradient_checkpointing")
    for layer in layers:
        layer.gradient_checkpointing = enabled
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]


def _batch(position: dict[str, Any]) -> str:
    """Where in the data a batch ends."""
    document = position["document"]
    return f"its batch ends in document {document['offset']} of buffer {document['buffer']} of the shuffled data"


def _joined(rounds: list[StageResult]) -> StageResult:
    """One stage's result from those of its rounds; each round's loss is its layers' part of the stage's."""
    first = rounds[0]
    steps, tokens, seconds, start, end = (
        sum(part) for part in zip(*(dataclasses.astuple(one)[1:] for one in rounds), strict=True)
    )
    return StageResult(first.name, steps, tokens, seconds, start, end)


def _progress(stage: Stage, step: int, steps: int, done: int, seconds: float, metrics: dict[str, float]) -> Event:
    return {
        "event": "step",
        "stage": stage.name,
        "step": step,
        "steps": steps,
        "tokens": step * stage.batch_tokens,
        "tokens_per_second": done * stage.batch_tokens / max(seconds, 1e-9),
        "seconds_left": (steps - step) * seconds / done,
        "metrics": metrics,
    }
