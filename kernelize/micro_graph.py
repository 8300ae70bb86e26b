"""A training stage's micro-step as one CUDA graph: forward, loss, backward and what is reported, in one launch.

The host needs longer to ask for the kernels of a micro-step than a GPU to run them. So after a few eager micro-steps
of a shape, which train like any other, the next is captured, and from then on replayed. What a graph reads and writes
stays where it is: rows and counts are copied in, the losses out, and the gradients are tensors of the graphs' own,
which are put in place before a replay. So the loop may forget gradients as it always does.

Whatever a graph cannot do runs eagerly, and the reason is told, once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .data import Row
from .decode import HOST_ROPES
from .errors import KernelizeError, first_line
from .graphs import shapes_of
from .runtime.fused import supports
from .runtime.kept import holding
from .runtime.layout import whole_rows
from .runtime.modeling import kernelized_layers
from .runtime.ops import forced, implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .recipe import Stage

WARM_UPS = 3  # eager micro-steps of a shape before its capture: kernels compile, libraries allocate, tensors are kept
ALIKE = 0.1  # of their norm a graph's first gradients may differ from eager ones; two eager ones do by .002 (atomics)
CAPTURED = ("fused",)  # implementations that ask the host for nothing
SYNC = "called a synchronizing CUDA operation"  # how torch's warning begins

Micro = Callable[[Row, Tensor], Tensor]  # rows [b, T], counts [C] -> losses [N]; adds to the gradients
Shape = tuple[int, ...]


# --- how a micro-step is run and recorded -----------------------------------------------------------------------------


class Recorder(Protocol):
    """The device's part: running what will be captured, and capturing it."""

    def run(self, micro: Callable[[], Tensor]) -> Tensor:
        """Runs it eagerly, where a capture of it may follow."""

    def syncs(self, micro: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
        """`run`, and which line waited for the device, if one did."""

    def record(self, micro: Callable[[], None]) -> Callable[[], None]:
        """Captures it, which computes nothing; what then runs it. RuntimeError where that is not possible."""

    def free(self) -> None:
        """Gives back the memory of all that was captured; none of it is replayed again."""


class CudaRecorder:
    """On one stream: a gradient's place in autograd's graph remembers the stream that made it.

    Graphs of one stream share its workspaces, which go with the first of them that does: so they go together.
    """

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def run(self, micro: Callable[[], Tensor]) -> Tensor:
        outer = torch.cuda.current_stream()
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                return micro()
        finally:
            outer.wait_stream(self.stream)

    def syncs(self, micro: Callable[[], Tensor]) -> tuple[Tensor, str | None]:
        before = torch.cuda.get_sync_debug_mode()
        # other warnings are not heard this time; they have been in the micro-steps before
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                losses = self.run(micro)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        at = next((f"{Path(w.filename).name}:{w.lineno}" for w in told if str(w.message).startswith(SYNC)), None)
        return losses, at

    def record(self, micro: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self.graphs.append(graph)
        # a capture that fails would leave its own stream the current one
        before = torch.cuda.stream(torch.cuda.current_stream())
        # one pool serves all shapes: nothing in it outlives a replay
        with before, torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            micro()
        return graph.replay

    def free(self) -> None:
        self.graphs.clear()
        torch.cuda.empty_cache()


RECORDERS: dict[str, Callable[[], Recorder]] = {"cuda": CudaRecorder}  # by type of device


# --- whether it can be ------------------------------------------------------------------------------------------------


def uncapturable(stage: Stage, distributed: bool) -> str | None:
    """Why the micro-steps of a stage cannot be graphs, whatever the model, or None."""
    refused = {
        "gradients are reduced between processes": distributed,
        "chunk_tokens: what happens between chunks is the host's": stage.chunk_tokens is not None,
        "layers_at_a_time reads and writes hidden states on disk": stage.layers_at_a_time is not None,
        "window_dropout is drawn by the host": stage.window_dropout > 0,
        "gradient_checkpointing": stage.gradient_checkpointing,
        f"packing={stage.packing!r} makes as many shapes as rows; allowed: 'joined'": stage.packing != "joined",
    }
    return next((reason for reason, holds in refused.items() if holds), None)


def asks_the_host(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why a forward of the model's own code, or of its kernelized layers, cannot be captured, or None."""
    rope = (model.config.get_text_config().to_dict().get("rope_parameters") or {}).get("rope_type")
    if rope in HOST_ROPES:
        return f"rope_type={rope!r} asks the host for the length"
    layers = kernelized_layers(model)
    for (index, layer), shape in zip(layers.items(), shapes_of(model) if layers else [], strict=True):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as under autocast
        q = torch.empty(1, shape.heads, 1, shape.head_dim, dtype=dtype, device=device)
        k, kernel = q[:, : shape.kv_heads], layer.kernelize.kernel(1.0)
        if (name := implementation(kernel, q, k, k)) not in CAPTURED:
            return f"layer {index} is {name}: {supports(kernel, q, k, k) or f'{forced()} is forced'}"
    return None


# --- micro-steps ------------------------------------------------------------------------------------------------------


class UncapturableError(KernelizeError):
    """A micro-step was captured, but its replay would be another micro-step."""


@dataclass
class Graph:
    """One shape's micro-step, and the tensors that it reads and writes."""

    rows: Row
    counts: Tensor
    losses: Tensor
    replay: Callable[[], None]
    held: list[Any]  # what its kernels read and others made


class MicroSteps:
    """The micro-steps of a stage, by the shape of their rows: eager at first, then graphs where that is possible.

    `tell` gets each shape's capture, {"micro_batch": b, "apart": x} with how far its gradients were from eager ones,
    and once each reason to run eagerly, {"eager": why}.
    """

    def __init__(
        self, micro: Micro, parameters: list[nn.Parameter], recorder: Recorder, tell: Callable[[dict[str, Any]], None]
    ):
        self.micro, self.parameters, self.recorder, self.tell = micro, parameters, recorder, tell
        self.graphs: dict[Shape, Graph] = {}
        self.refused: set[Shape] = set()
        self.eager: Counter[Shape] = Counter()  # micro-steps so far
        self.gradients: dict[int, Tensor] = {}  # the graphs' own, by number of the parameter
        self.reached: set[int] = set()  # numbers of the parameters that eager micro-steps gave a gradient
        self.width = 0  # of the losses
        self.told: set[str] = set()
        self.steps = 0
        self.trying = False  # to make a graph, which takes memory
        self.failed = False  # a capture: what that leaves of torch's state may serve for eager work alone

    def stepped(self) -> None:
        """Is told that the optimizer has made a step."""
        self.steps += 1

    def __call__(self, rows: Row, counts: Tensor, whole: bool) -> Tensor:
        """Adds the gradients of rows [b, T] on the device, and gives their losses; `whole`: each is one document."""
        shape = tuple(rows.input_ids.shape)
        rows = Row(*(x.contiguous() for x in rows))  # as a graph's own: other strides would be compiled anew
        if not whole:
            self._say("rows hold several documents")
            return self.recorder.run(lambda: self.micro(rows, counts))
        with whole_rows():
            if shape not in self.graphs and shape not in self.refused and not self.failed:
                if not self._is_warm(shape):
                    return self._warm_up(shape, rows, counts)
                return self._capture(shape, rows, counts)
            if shape in self.graphs:
                return self._replay(self.graphs[shape], rows, counts)
            return self.recorder.run(lambda: self.micro(rows, counts))

    def give_up(self, reason: str) -> bool:
        """Runs the shapes that have a graph eagerly from now on, and frees what graphs hold; whether there was one."""
        found = bool(self.graphs or self.gradients or self.trying)
        self.trying = False
        self.refused |= set(self.graphs)
        self.graphs.clear()
        self.gradients.clear()
        self.recorder.free()
        if found:
            self._say(reason)
        return found

    def _is_warm(self, shape: Shape) -> bool:
        """Not in the first step: the optimizer's moments, which it makes, must have found their place."""
        return self.eager[shape] >= WARM_UPS and self.steps > 0

    def _warm_up(self, shape: Shape, rows: Row, counts: Tensor) -> Tensor:
        if self.eager[shape] + 1 == WARM_UPS:
            losses = self._last_warm_up(shape, rows, counts)
        else:
            losses = self.recorder.run(lambda: self.micro(rows, counts))
        self.eager[shape] += 1
        return losses

    def _last_warm_up(self, shape: Shape, rows: Row, counts: Tensor) -> Tensor:
        """The one that is looked at: what the host decides or draws in it, a graph would repeat for ever."""
        drawn = torch.get_rng_state()
        losses, sync = self.recorder.syncs(lambda: self.micro(rows, counts))
        self.reached |= {number for number, p in enumerate(self.parameters) if p.grad is not None}
        self.width = len(losses)
        if sync:
            self._refuse(shape, f"{sync} waits for the device")
        elif not torch.equal(drawn, torch.get_rng_state()):
            self._refuse(shape, "the model draws random numbers on the host")
        return losses

    def _capture(self, shape: Shape, rows: Row, counts: Tensor) -> Tensor:
        """Makes the shape's graph, where that can be; in any case adds these rows' gradients, and gives their losses.

        The rows are read eagerly first, before the graph takes its memory: it must give the same gradients.
        """
        self.refused.add(shape)  # until there is a graph, and so if memory runs out
        self.trying = True
        self._attach()
        own = [self.gradients[number] for number in sorted(self.reached)]
        before = [gradient.clone() for gradient in own]
        with torch.random.fork_rng([rows.input_ids.device.index] if rows.input_ids.is_cuda else []):
            losses = self.recorder.run(lambda: self.micro(rows, counts))
        after = [gradient.clone() for gradient in own]
        put(before, own)
        found = self._tried(shape, rows, counts, before, after)
        self.trying = False
        if isinstance(found, Tensor):
            return found
        put(after, own)
        self.failed = True
        self._refuse(shape, found)
        return losses

    def _tried(
        self, shape: Shape, rows: Row, counts: Tensor, before: list[Tensor], after: list[Tensor]
    ) -> Tensor | str:
        """The losses of a first replay, whose gradients lead from `before` to `after`; or why there is no graph."""
        attached = [p.grad for p in self.parameters]
        try:
            graph = self._captured(Row(*(x.clone() for x in rows)), counts.clone(), attached)
            losses = self._replay(graph, rows, counts)
            gap = distance([self.parameters[number].grad for number in sorted(self.reached)], after)
            size = distance(before, after)
            if not gap <= ALIKE * size:
                raise UncapturableError(
                    f"its gradients are {gap:.2g} from eager ones of {size:.2g}; allowed: {ALIKE} of it"
                )
        except UncapturableError as error:
            problem = str(error)
        except Exception as error:
            problem = f"its capture failed: {first_line(error)}"
        else:
            self.refused.remove(shape)
            self.graphs[shape] = graph
            self.tell({"micro_batch": shape[0], "apart": gap / size if size else 0.0})
            return losses
        for parameter, gradient in zip(self.parameters, attached, strict=True):
            parameter.grad = gradient  # what came up in the capture has no numbers
        return problem

    def _captured(self, rows: Row, counts: Tensor, before: list[Tensor | None]) -> Graph:
        """The graph on these tensors, beside the parameters' gradients `before`. UncapturableError where it is none."""
        losses, errors = counts.new_zeros(self.width), list[Exception]()

        def once() -> None:
            try:
                losses.copy_(self.micro(rows, counts))
            except Exception as error:
                errors.append(error)
                raise

        try:
            with holding() as held:
                replay = self.recorder.record(once)
        except Exception as error:  # the end of a capture that broke off raises another
            raise errors[0] if errors else error from None
        if held.made:
            raise UncapturableError(f"{held.made[0]} made anew what it keeps")
        if strays := sum(p.grad is not g for p, g in zip(self.parameters, before, strict=True)):
            raise UncapturableError(f"{strays} parameters had no gradient before")
        return Graph(rows, counts, losses, replay, held.found)

    def _replay(self, graph: Graph, rows: Row, counts: Tensor) -> Tensor:
        for kept, given in zip((*graph.rows, graph.counts), (*rows, counts), strict=True):
            kept.copy_(given)
        self._attach()
        graph.replay()
        return graph.losses.clone()

    def _attach(self) -> None:
        """Makes the graphs' own tensors the gradients, with what the parameters' have so far."""
        fresh = []
        for number in self.reached:
            parameter = self.parameters[number]
            if number not in self.gradients:
                self.gradients[number] = torch.zeros_like(parameter)
            own = self.gradients[number]
            if parameter.grad is None:
                fresh.append(own)
            elif parameter.grad is not own:
                own.copy_(parameter.grad)
            parameter.grad = own
        if fresh:
            torch._foreach_zero_(fresh)

    def _refuse(self, shape: Shape, reason: str) -> None:
        self.refused.add(shape)
        if not self.graphs:  # else they live on what would be freed
            self.gradients.clear()
            self.recorder.free()
        self._say(reason)

    def _say(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            self.tell({"eager": reason})


def put(tensors: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for source, target in zip(tensors, into, strict=True):
        target.copy_(source)


def distance(some: Sequence[Tensor | None], others: Sequence[Tensor]) -> float:
    """The norm of the difference of two sets of tensors, of which the first may lack some; a sync."""
    parts = [torch.linalg.vector_norm(b if a is None else a - b) for a, b in zip(some, others, strict=True)]
    return float(torch.stack(parts).norm()) if parts else 0.0
