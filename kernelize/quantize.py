"""int8 and int4 weights of a converted checkpoint, by torchao; the loss is measured on what was saved.

Only the weights of the linear layers become integers. What kernelize added (`.kernelize.`), embeddings, norms, the
output layer and the state keep their precision. The files are safetensors: torchao's integers, scales and zero points
are plain tensors there, beside a description in the header, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup, PerRow
from torchao.quantization.quant_primitives import MappingType
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from .card import CardFacts, read_config, read_facts
from .convert import load
from .errors import InputError
from .evaluate import evaluate, make_suite
from .files import check_apart, check_output, new_folder
from .pipeline import as_rows, document
from .rows import Row

GROUP = 32  # weights that share a scale and a zero point, in int4
LEVELS = 15  # steps between the least and the largest weight of a group
KEPT = ("kernelize", "lm_head", "embed_out")  # parts of names; embeddings are no linear layers
INT4: torch.dtype = vars(torch)["int4"]  # torch's stubs do not name it
UNQUANTISED = "unquantised"
METRICS = ("ppl", "ppl_ratio", "kl")
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Scheme:
    """How weights become integers."""

    title: str
    quantise: Callable[[Tensor], Tensor]  # [O, I] -> a torchao tensor of the same shape
    config: Callable[[], Any]  # what config.json says of it


@dataclass(frozen=True)
class Quantised:
    """What was made, and what it lost: `rows` are evaluate's, beside the model before."""

    bits: int
    weights: int  # that are integers now
    parameters: int  # of the model
    bytes_before: int  # of the weights' files
    bytes_after: int
    rows: tuple[Row, ...]

    @property
    def share(self) -> float:
        return self.weights / self.parameters

    def value(self, metric: str) -> float:
        """Of the quantised model, over whole pieces."""
        return next(r.value for r in self.rows if r.metric == metric and r.model != UNQUANTISED)

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "scheme": SCHEMES[self.bits].title}


# --- integers ---------------------------------------------------------------------------------------------------


def to_int8(weight: Tensor) -> Tensor:
    """Symmetric, a scale for each row."""
    return Int8Tensor.from_hp(weight, PerRow())


def to_int4(weight: Tensor) -> Tensor:
    """Sixteen levels from the least to the largest weight of each group of 32.

    The zero point is a fraction, so that weights which were on such a grid already (GGUF's Q4_1) stay as they are;
    torchao's own rounds it to a whole number, which costs half a step.
    """
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)  # [O, G, 32]
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / LEVELS).clamp(min=torch.finfo(weight.dtype).tiny)
    integers = ((groups - low) / scale).round().clamp(0, LEVELS) - 8  # −8 … 7
    zero = -8 - low / scale
    return IntxUnpackedToInt8Tensor(
        integers.to(torch.int8).view_as(weight), scale[..., 0], zero[..., 0], INT4, [1, GROUP], weight.dtype, None
    )


SCHEMES = {
    8: Scheme("int8, a scale a row", to_int8, Int8WeightOnlyConfig),
    4: Scheme(
        f"int4, scale and zero point for {GROUP} weights, a byte each",
        to_int4,
        lambda: IntxWeightOnlyConfig(INT4, PerGroup(GROUP), MappingType.ASYMMETRIC),
    ),
}


def quantize_model(model: PreTrainedModel, bits: int) -> int:
    """Makes integers of the linear weights of a converted model, in place; how many. InputError for what cannot be."""
    if bits not in SCHEMES:
        raise InputError(f"bits={bits} is not one of {', '.join(map(str, SCHEMES))}")
    linear = linear_layers(model, bits)
    scheme, count = SCHEMES[bits], 0
    for module in linear.values():
        count += module.weight.numel()
        module.weight = nn.Parameter(scheme.quantise(module.weight.data), requires_grad=False)
    settings = TorchAoConfig(scheme.config(), modules_to_not_convert=list(KEPT))
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    model.config.quantization_config = settings
    return count


def linear_layers(model: PreTrainedModel, bits: int) -> dict[str, nn.Linear]:
    """Name -> layer, of all whose weights become integers; InputError for what cannot be."""
    kind = model.config.model_type
    if model.config.to_dict().get("quantization_config"):
        raise InputError("the model is quantised already; start from the checkpoint with full weights")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not set(KEPT).intersection(name.split("."))
    }
    if not found:
        raise InputError(f"{kind!r} keeps its weights in no linear layer of torch: torchao has nothing to quantise")
    for name, module in found.items():
        if bits == 4 and module.in_features % GROUP:
            raise InputError(f"bits=4: {name} has {module.in_features} inputs, no multiple of {GROUP}; use bits=8")
    return found


# --- folder to folder -------------------------------------------------------------------------------------------


def quantize(
    source: str | Path,
    bits: int,
    output: str | Path,
    *,
    overwrite: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Quantised:
    """Quantises the converted checkpoint in the folder `source` into `output`; its card says what that cost.

    `dtype` is that of all that stays. `settings` (text, pieces, lengths) are those of the perplexity suite. Raises
    InputError for a folder that is no converted checkpoint, one that is quantised already, and weights that torchao
    cannot make integers of.
    """
    facts, before = read_facts(source), _weight_bytes(source)
    check_output(output, overwrite)
    check_apart(output, source)
    if read_config(source).get("quantization_config"):
        raise InputError(f"{source}: is quantised already; start from the checkpoint with full weights")
    model, tokenizer = load(source, dtype=dtype, device=device)
    parameters = sum(p.numel() for p in model.parameters())
    weights = quantize_model(model, bits)
    with new_folder(output, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        rows = _loss(source, folder, bits, dtype, device, settings or {}, on_progress)
        made = Quantised(bits, weights, parameters, before, _weight_bytes(folder), tuple(rows))
        _document(folder, Path(output).resolve().name, facts, made)
    return made


def _loss(source, output, bits, dtype, device, settings, on_progress) -> list[Row]:
    """Perplexity, its ratio and KL divergence, of what was saved beside what it was made of."""
    models = {
        UNQUANTISED: load(source, dtype=dtype, device=device),
        f"int{bits}": load(output, dtype=dtype, device=device),
    }
    suite = make_suite("ppl", quick=True, **settings)
    rows = evaluate(models, [suite], teacher=UNQUANTISED, on_progress=on_progress)
    return [row for row in rows if row.metric in METRICS]


def _document(folder: Path, name: str, before: CardFacts, made: Quantised) -> None:
    from .recipe import Recipe

    recipe = Recipe.from_yaml(before.recipe, "recipe.yaml") if before.recipe else None
    facts = {"source": before.source, "tokens": before.tokens, "rows": list(before.rows), "audit": before.audit}
    command = f"kernelize quantize {before.name} --bits {made.bits} --output {name}"
    quantised = made.to_dict() | {"rows": as_rows(made.rows)}
    document(folder, name=name, recipe=recipe, commands=[*before.commands, command], quantisation=quantised, **facts)


def _weight_bytes(folder: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
