"""What the stages of a training minimise, as modules of model and loss; and the adapters that they may train."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import sharding
from .data import Row, longest_sequence
from .errors import InputError, KernelizeError
from .losses import ForecastProbe, ForecastTerms, TransferProbe, TransferTerms, distillation
from .recipe import DistilWeights, Lora, TransferWeights
from .runtime.cache import CACHE
from .runtime.modeling import family_of, kernelized_layers

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

NEW = ".kernelize."  # in the name of every parameter that the conversion added

# config fields by which a model changes the logits after its LM head
LOGIT_RULES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class Losses(NamedTuple):
    """Sums over what `Objective.counts` counts, but the loss is divided by what was; all else is detached."""

    loss: Tensor  # scalar
    terms: Tensor  # one for each name in `Objective.terms`
    layers: Tensor  # [converted layers], or [0] where the loss is not a sum over layers
    carried: Tensor | None = None  # scalar that is not divided: what later chunks ask of the state after this one


class Objective(nn.Module):
    """Model and loss as one module, so that data-parallel wrappers see all that the loss depends on."""

    terms: dict[str, int]  # name -> index of the count that it is divided by
    probed: ClassVar[bool] = False  # whether its losses are taken inside the layers

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self._no_split_modules = sharding.units_of(model, self.probed)  # where accelerate looks for those of FSDP2

    def counts(self, rows: Row) -> tuple[int, ...]:
        """How many items of a micro-batch [b, T] each part of the loss sums over. `forward` takes those of the global
        batch, [counts] float32, by which it divides the parts; without, by 1."""
        raise NotImplementedError

    @property
    def measured(self) -> tuple[int, ...]:
        """The layers that `Losses.layers` are those of."""
        return ()

    def begin(self, step: int) -> None:
        """Is told that a step's first micro-batch comes now."""

    def pieces(self, rows: Row) -> int:
        """Into how many pieces `parts` cuts a micro-batch [b, T]."""
        return 1

    def parts(self, rows: Row) -> Iterator[Row]:
        """What is read and differentiated by itself, one after the other."""
        yield rows

    def close(self) -> None:
        """Leaves the model as it was before."""


class RowObjective(Objective):
    """A loss that is a sum over rows."""

    def counts(self, rows: Row) -> tuple[int, ...]:
        return (len(rows.input_ids),)


class Transfer(RowObjective):
    """Per-layer errors of the attention against softmax on the same q, k, v, averaged over layers; summed over rows."""

    probed = True
    terms = {"output": 0, "far": 0, "mass": 0}

    def __init__(self, model: PreTrainedModel, weights: TransferWeights):
        super().__init__(model)
        self._watch(weights, tuple(kernelized_layers(model)))

    def _watch(self, weights: TransferWeights, layers: tuple[int, ...]) -> None:
        self.weights = weights
        self.probes = {index: TransferProbe() for index in layers}
        for index, probe in self.probes.items():
            kernelized_layers(self.model)[index].kernelize.probe = probe

    @property
    def measured(self) -> tuple[int, ...]:
        return tuple(self.probes)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, answers: Tensor, counts: Tensor | None = None
    ) -> Losses:
        self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=1)
        measured = [probe.terms for probe in self.probes.values()]
        terms = torch.stack([torch.stack(layer) for layer in measured if layer is not None])  # [L, 3]
        layers = TransferTerms(*terms.unbind(-1)).weighted(self.weights)
        return Losses(divided(layers.mean(), counts), terms.detach().mean(0), layers.detach())

    def close(self) -> None:
        for layer in kernelized_layers(self.model).values():
            layer.kernelize.probe = None


class Forecast(RowObjective):
    """Each layer's forecast of what its tokens will receive, averaged over layers; summed over rows.

    Of all queries, or with `answers` of those that write the tokens of an answer.
    """

    probed = True
    terms = dict.fromkeys(ForecastTerms._fields, 0)

    def __init__(self, model: PreTrainedModel, answers: bool = False):
        super().__init__(model)
        self.answers = answers
        self.probes = {i: ForecastProbe() for i in forecasting_layers(model)}
        for index, probe in self.probes.items():
            layer = kernelized_layers(model)[index].kernelize
            layer.probe, layer.watch = probe, probe.watch

    @property
    def measured(self) -> tuple[int, ...]:
        return tuple(self.probes)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, answers: Tensor, counts: Tensor | None = None
    ) -> Losses:
        if self.answers:
            asked = F.pad(answers[:, 1:], (0, 1))  # where the answer's token comes next
            for probe in self.probes.values():
                probe.asked = asked
        for probe in self.probes.values():
            probe.leaving = []  # a pass that broke off may have left some
        self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=1)
        measured = [probe.terms for probe in self.probes.values()]
        terms = torch.stack([torch.stack(layer) for layer in measured if layer is not None])  # [L, 2]
        return Losses(divided(terms[:, 0].mean(), counts), terms.detach().mean(0), terms[:, 0].detach())

    def close(self) -> None:
        for layer in kernelized_layers(self.model).values():
            layer.kernelize.probe = layer.kernelize.watch = None


def divided(loss: Tensor, counts: Tensor | None) -> Tensor:
    return loss if counts is None else loss / counts[0]


def forecasting_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The converted layers whose slots go by a forecast."""
    layers = kernelized_layers(model)
    return {i: layer for i, layer in layers.items() if layer.kernelize.spec.scores_by("forecast")}


class Distil(Objective):
    """Divergence from the teacher's next-token distribution, summed over the tokens that have a label; and the
    cross-entropy of those that belong to answers."""

    terms = {"kl": 0, "ce": 0, "answer": 1}

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, weights: DistilWeights):
        super().__init__(model)
        self.weights = weights
        self.narrowed: list[RemovableHandle] = []
        self.student_features = Features(model)
        self.teacher_features = Features(teacher)
        self.reach = longest_sequence(teacher.config)

    def counts(self, rows: Row) -> tuple[int, ...]:
        return int((rows.labels[:, 1:] >= 0).sum()), int(rows.answers[:, 1:].sum())

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, answers: Tensor, counts: Tensor | None = None
    ) -> Losses:
        student, student_head = self.read_student(input_ids, position_ids)
        teacher, teacher_head = self.read_teacher(input_ids, position_ids) or (None, None)
        vocabulary = self.model.config.get_text_config().vocab_size
        labels, asked = labels[:, 1:], answers[:, 1:]  # of the next token, which a chunk's last may have too
        known = labels.shape[1]
        student = student[:, :known].flatten(0, 1)
        teacher = None if teacher is None else teacher[:, :known].flatten(0, 1)
        beyond = position_ids[:, :known].flatten() >= (self.reach or sys.maxsize)
        heads = student_head, teacher_head
        result = distillation(
            student, teacher, labels.flatten(), asked.flatten(), beyond, *heads, self.weights, vocabulary, counts
        )
        return Losses(result.loss, torch.stack(result[1:]), result.loss.new_zeros(0))

    def close(self) -> None:
        while self.narrowed:
            self.narrowed.pop().remove()

    def read_student(self, input_ids: Tensor, position_ids: Tensor) -> Read:
        if not self.narrowed:  # until `close`: gradient checkpointing reads layers once more in the backward pass
            layers = sharding.layers_of(self.model)
            self.narrowed = [x.register_forward_pre_hook(as_autocast, with_kwargs=True) for x in layers]
        return self.student_features(input_ids, position_ids)

    @torch.no_grad()
    def read_teacher(self, input_ids: Tensor, position_ids: Tensor) -> Read | None:
        """None where the teacher has nothing to say to any of these tokens."""
        return self.teacher_features(input_ids, position_ids)


def as_autocast(layer: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook: the hidden states that enter a layer, in autocast's dtype where that is on.

    Float32 embeddings, biases or experts make the residual stream float32, twice the bytes of every norm and sum; the
    teacher's is 16-bit, as that of the trained model will be where it runs in 16 bits.
    """
    hidden = given[0] if given else named["hidden_states"]
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return given, named
    hidden = hidden.to(torch.get_autocast_dtype(device))
    return ((hidden, *given[1:]), named) if given else (given, named | {"hidden_states": hidden})


Read = tuple[Tensor, Callable[[Tensor], Tensor]]  # features [B, T, d], and the head that makes logits of them


class Features:
    """What a model's logits are made of: (features [B, T, d], head), so that they can be made a chunk at a time.

    For most models the last hidden states and the LM head. Where the config names a further rule (soft capping,
    scaling) the features are the model's own logits, whole, and the head passes them on.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        config = model.config.get_text_config().to_dict()
        self.own_logits = any(config.get(rule) is not None for rule in LOGIT_RULES)

    def __call__(self, input_ids: Tensor, position_ids: Tensor, cache: Cache | None = None) -> Read:
        """`cache` holds what came before, and takes up what is read."""
        given = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": cache is not None}
        if cache is not None:
            given[CACHE] = cache
        if self.own_logits:
            return self.model(**given).logits, self.head
        states: list[Tensor] = []
        inner = family_of(self.model.config.model_type).layers.rpartition(".")[0]  # `base_model` is not always called
        decoder = self.model.get_submodule(inner)
        keep = decoder.register_forward_hook(lambda _, __, out: states.append(out.last_hidden_state))
        try:
            self.model(**given, logits_to_keep=1)
        finally:
            keep.remove()
        return states[-1], self.head

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        return nn.Identity() if self.own_logits else self.model.get_output_embeddings()


# --- adapters ---------------------------------------------------------------------------------------------------------


def attach_lora(model: PreTrainedModel, lora: Lora) -> tuple[peft.LoraModel, list[str]]:
    """Adapters inside `model` itself: (the PEFT wrapper, names of the adapted layers). InputError for no target."""
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and NEW not in f"{name}."
    }
    endings = lora.targets or tuple(linear)
    chosen = [name for name in linear if f".{name}".endswith(tuple(f".{ending}" for ending in endings))]
    if missing := [e for e in endings if not any(f".{name}".endswith(f".{e}") for name in linear)]:
        raise InputError(
            f"lora target {missing[0]!r} ends no linear layer's name; one of them is {next(iter(linear))!r}"
        )
    transposed = any(isinstance(linear[name], Conv1D) for name in chosen)
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=chosen, fan_in_fan_out=transposed)
    wrapper = peft.LoraModel(model, config, "default")
    adapted = {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    if adapted != set(chosen):
        raise KernelizeError(
            f"LoRA reached {len(adapted)} of {len(chosen)} layers; missed {sorted(set(chosen) - adapted)}"
        )
    return wrapper, chosen
