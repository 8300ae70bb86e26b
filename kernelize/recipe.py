"""Recipes: a whole run (source, kernels, stages, evaluation) as frozen data, checked before a weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, field_validator, model_validator

from .errors import InputError, first_problem
from .runtime.spec import MOST_LAYERS, KernelSpec, SpecError, choose

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

DATA_SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".parquet")
MERGE, INTEGER = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:int"
BUILTIN_DATA = ("self", "sample", "retrieval")

Item = TypeVar("Item")
Sequence = Annotated[tuple[Item, ...], Strict(False)]  # YAML has lists only


class _Strict(BaseModel):
    """Frozen; no type is coerced; numbers are finite; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                choose("key", key, tuple(cls.model_fields))
        return data


class DataSource(_Strict):
    """Where documents come from: a local file, a Hub dataset, or a builtin.

    `self` is text that the teacher writes, `sample` the public-domain text shipped with the package; `retrieval` makes
    tasks in which something has to be found again, in the text of `path` or, without one, in the sample. `weight` is
    the share of documents drawn from here. `text_field` names the column of text; rows without it may have
    the columns prompt and response instead. `split` serves datasets.
    """

    path: str | None = None
    dataset: str | None = None
    builtin: Literal["self", "sample", "retrieval"] | None = None
    weight: float = Field(default=1.0, gt=0)
    split: str = "train"
    text_field: str = "text"

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return cls.fields_of(data) if isinstance(data, str) else data

    @staticmethod
    def fields_of(name: str) -> dict[str, str]:
        """`self` and `sample` are builtins, what ends like a data file or is a file is a path, else a Hub dataset."""
        if name in BUILTIN_DATA:
            return {"builtin": name}
        return {"path": name} if name.endswith(DATA_SUFFIXES) or Path(name).is_file() else {"dataset": name}

    @model_validator(mode="after")
    def _one_origin(self) -> DataSource:
        given = [origin for origin in (self.path, self.dataset, self.builtin) if origin is not None]
        if len(given) != 1 and given != [self.path, "retrieval"]:
            raise ValueError("give exactly one of path, dataset, builtin; builtin 'retrieval' may have a path besides")
        return self

    @property
    def name(self) -> str:
        return " in ".join(str(part) for part in (self.builtin, self.path or self.dataset) if part)


class Lora(_Strict):
    """Low-rank updates (arXiv 2106.09685), merged into the weights when the stage ends.

    `targets` are endings of module names; None is every linear layer but the LM head.
    """

    r: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    targets: Sequence[str] | None = None


class TransferWeights(_Strict):
    """Weights of a layer's errors: attention output, the out-of-window part alone, and that part's mass."""

    output: float = Field(default=1.0, ge=0)
    far: float = Field(default=1.0, ge=0)
    mass: float = Field(default=0.1, ge=0)


class DistilWeights(_Strict):
    """Weights of the divergence from the teacher's distribution, of the next token's cross-entropy, and of that of the
    answers in data `retrieval`: the first two are means over all tokens, the last over the answers' tokens.

    With `beyond`, sequences may be longer than the teacher's context, if its positions are rotary: past it a token has
    no divergence but the cross-entropy, with this weight.
    """

    kl: float = Field(default=1.0, ge=0)
    ce: float = Field(default=0.0, ge=0)
    answer: float = Field(default=0.0, ge=0)
    beyond: float | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, gt=0)


class Stage(_Strict):
    """One part of the training: what trains, on what, for how long.

    Lengths and batches count tokens; `micro_batch` counts sequences that one process holds at once and never
    changes the result. Exactly one of `tokens` (a budget, rounded up to whole steps) and `steps` is given.
    Packing `documents` starts every document from an empty state; `joined` reads a row as one sequence, as pretraining
    does: the teacher sees the same, a row is one launch on a GPU, and the memory meets more than one document.
    With `chunk_tokens` a sequence is read and differentiated so many tokens at a time, with the states carried over, in
    memory that does not depend on its length; gradients end at a chunk's start (`across: truncate`, the default), or
    follow through all chunks, which are then read twice (`recompute`).
    A step whose loss or gradient is no finite number stops the run or, with `on_nonfinite: skip`, is left out.
    A forecast learns, by its `target`, how much `attention` a token draws once it has left the window (the default), or
    how much of that comes from where the `answers` in data `retrieval` are written: what will be asked for.
    With `compiled`, a GPU runs what stands around the attention through torch.compile, which takes half a minute once:
    of joined rows, without gradient_checkpointing, chunk_tokens or layers_at_a_time.
    A transfer with `layers_at_a_time` trains so many layers after the other, and holds no more of the model than those:
    each group sees all of the stage's batches, as hidden states that are stored in the output folder meanwhile.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    kind: Literal["transfer", "forecast", "distil"]
    tokens: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    sequence_length: int = Field(default=1024, ge=2)
    packing: Literal["documents", "joined"] = "documents"
    batch_tokens: int = Field(default=65536, ge=2)
    micro_batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: Annotated[tuple[float, float], Strict(False)] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0)
    trainable: Literal["new", "new+lora", "all"] = "new"
    target: Literal["attention", "answers"] | None = None
    lora: Lora | None = None
    transfer: TransferWeights | None = None
    distil: DistilWeights | None = None
    window_dropout: float = Field(default=0.0, ge=0, lt=1)
    gradient_checkpointing: bool = False
    chunk_tokens: int | None = Field(default=None, ge=2)
    across: Literal["truncate", "recompute"] | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    layers_at_a_time: int | None = Field(default=None, ge=1)
    compiled: bool = True
    data: Sequence[DataSource] = Field(min_length=1)

    @property
    def is_compilable(self) -> bool:
        """Whether one code serves all batches: documents of a row are as many shapes as there are rows."""
        others = self.gradient_checkpointing or self.chunk_tokens or self.layers_at_a_time
        return self.compiled and self.packing == "joined" and not others

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{betas} is not within [0, 1)")
        return betas

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give exactly one of tokens, steps")
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is no multiple of sequence_length={self.sequence_length}"
            )
        if self.lora and self.trainable != "new+lora":
            raise ValueError(f"lora needs trainable='new+lora', not {self.trainable!r}")
        if self.kind != "distil" and self.trainable != "new":
            raise ValueError(f"a {self.kind} stage trains 'new' only, not {self.trainable!r}")
        if self.kind == "forecast" and self.packing != "joined":
            raise ValueError(
                f"a forecast stage looks ahead over whole rows: packing must be 'joined', not {self.packing!r}"
            )
        if self.target and self.kind != "forecast":
            raise ValueError(f"target={self.target!r} is what a forecast learns: kind='forecast', not {self.kind!r}")
        if self.target == "answers" and all(source.builtin != "retrieval" for source in self.data):
            raise ValueError("target='answers' needs data with answers: builtin 'retrieval'")
        self._check_chunks()
        if self.layers_at_a_time and self.kind != "transfer":
            raise ValueError(f"layers_at_a_time needs kind='transfer', whose layers are independent, not {self.kind!r}")
        for key in ("transfer", "distil"):
            if key != self.kind and getattr(self, key):
                raise ValueError(f"a {self.kind} stage has no loss weights under the key {key!r}")
        return self

    def _check_chunks(self) -> None:
        if self.chunk_tokens is None:
            if self.across:
                raise ValueError(f"across={self.across!r} says what gradients do between chunks: give chunk_tokens")
            return
        if self.sequence_length % self.chunk_tokens:
            raise ValueError(
                f"sequence_length={self.sequence_length} is no multiple of chunk_tokens={self.chunk_tokens}"
            )
        needed = {"kind": "distil", "packing": "joined", "gradient_checkpointing": False}
        for field, value in needed.items():
            if getattr(self, field) != value:
                raise ValueError(f"chunk_tokens needs {field}={value!r}, not {getattr(self, field)!r}")

    @property
    def rows(self) -> int:
        """Sequences in a global batch."""
        return self.batch_tokens // self.sequence_length

    @property
    def total_steps(self) -> int:
        return self.steps or -(-(self.tokens or 0) // self.batch_tokens)


class Evaluation(_Strict):
    """What the evaluation beside the teacher uses: the longest text in tokens, texts, and passkey trials a length."""

    length: int = Field(default=8192, ge=2)
    texts: int = Field(default=6, ge=1)
    passkey_lengths: Sequence[int] = (512, 1024, 2048, 4096)
    trials: int = Field(default=40, ge=1)


class Recipe(_Strict):
    """A whole run.

    `kernel` holds fields of KernelSpec for every converted layer; `layers` overrides some of them for a layer ("3")
    or an inclusive range ("3-7"). `context` stretches rotary positions to so many tokens; with `reach: half` sinks and
    slots are never seen further back than half of the positions that the model then has, with `reach: context` than
    all of them: but a model has hardly ever looked so far back as that. The layers in `keep` stay
    softmax; `keep_auto` is how many do, chosen at the conversion by what their replacement costs in retrieval: `keep`
    and `keep_costs` (nats a token of the answers, by layer) then say what was found. With `budget: auto` the slots of
    all layers go where they save most, as many in all; with `heads` every KV head has a number of its own.
    """

    name: str = Field(min_length=1)
    description: str
    source: str | None = None
    kernel: dict[str, Any] = {}
    keep: Sequence[Annotated[int, Field(ge=0)]] = ()
    keep_auto: int | None = Field(default=None, ge=1)
    context: int | None = Field(default=None, ge=2)
    reach: Literal["half", "context"] | None = None
    keep_costs: dict[str, float] = {}
    layers: dict[str, dict[str, Any]] = {}
    budget: Literal["uniform", "auto", "heads"] = "uniform"
    stages: Sequence[Stage] = ()
    seed: int = Field(default=0, ge=0)
    checkpoint_steps: int = Field(default=200, ge=1)
    evaluation: Evaluation = Evaluation()

    @field_validator("layers", "keep_costs", mode="before")
    @classmethod
    def _text_keys(cls, layers: Any) -> Any:
        return {str(key): fields for key, fields in layers.items()} if isinstance(layers, dict) else layers

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages share a name: {', '.join(names)}")
        if self.keep and self.keep_auto:
            raise ValueError("give keep or keep_auto, not both")
        KernelSpec.from_dict(self.kernel)
        if self.reach and any("reach" in fields for fields in (self.kernel, *self.layers.values())):
            raise ValueError("give reach to the recipe or to its kernel, not both")
        for fields in self.layers.values():
            KernelSpec.from_dict(self.kernel | fields)
        if twice := set(self._overrides) & set(self.keep):
            raise ValueError(f"layers {sorted(twice)} stand in keep and in layers")
        return self

    @cached_property
    def _overrides(self) -> dict[int, dict[str, Any]]:
        overrides: dict[int, dict[str, Any]] = {}
        for key, fields in self.layers.items():
            for index in _layer_range(key):
                if index in overrides:
                    raise ValueError(f"layers names layer {index} twice")
                overrides[index] = fields
        return overrides

    @property
    def named(self) -> set[int]:
        """The layers that the recipe speaks of one by one."""
        return set(self._overrides)

    def specs(self, layer_count: int) -> tuple[KernelSpec | None, ...]:
        """The choice for each of a model's layers; None keeps softmax. InputError for a layer that is not there.

        What `keep_auto` will keep is not known here.
        """
        for index in (*self.keep, *self._overrides):
            if index >= layer_count:
                raise InputError(f"recipe {self.name!r} names layer {index}; the model has 0 to {layer_count - 1}")
        return tuple(self._spec(index) for index in range(layer_count))

    def _spec(self, index: int) -> KernelSpec | None:
        if index in self.keep:
            return None
        return KernelSpec.from_dict(self.kernel | self._overrides.get(index, {}))

    def keeping(self, layers: tuple[int, ...], costs: Mapping[int, float]) -> Recipe:
        """The recipe after its `keep_auto` was found to be `layers`, with what each layer's replacement costs."""
        overrides = {str(i): fields for i, fields in self._overrides.items() if i not in layers}
        found = {str(layer): round(cost, 4) for layer, cost in costs.items()}
        return self.model_copy(update={"keep_auto": None, "keep": layers, "keep_costs": found, "layers": overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain data without what equals its default."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def from_dict(cls, data: object, where: str = "recipe") -> Recipe:
        """InputError with the first thing that is wrong; `where` says in which file or option."""
        if not isinstance(data, dict):
            held = "nothing" if data is None else f"a {type(data).__name__}"
            raise InputError(f"{where}: holds {held}; a recipe is a mapping of fields, name and description among them")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{where}: {first_problem(error)}") from error

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        return cls.from_dict(_parse(text, where), where)


def _layer_range(key: str) -> range:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", key)
    if match is None:
        raise ValueError(f"layers key {key!r} is neither a layer ('3') nor a range ('3-7')")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"layers range {key!r} is empty")
    if last >= MOST_LAYERS:
        raise ValueError(f"layers range {key!r} goes beyond {MOST_LAYERS} layers")
    return range(first, last + 1)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a duplicate key is an error, 1e-3 is a number, and whole numbers are decimal."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        own = [key for key, _ in node.value if key.tag != MERGE]  # what `<<` brings, they may say anew
        keys = [str(self.construct_object(key, deep=True)) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


# To YAML 1.1, which PyYAML reads, 020 is sixteen and 1:30 ninety; here they are text, which is no number.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != INTEGER]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(INTEGER, re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
# It wants a dot in a float: without this 1e-3 is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, where: str) -> object:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _shipped() -> dict[str, Traversable]:
    folder = resources.files("kernelize.configs")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in files}


def recipes() -> list[dict[str, str]]:
    """Name and description of every shipped recipe."""
    parsed = (_parse(file.read_text("utf-8"), file.name) for file in _shipped().values())
    return [{"name": data["name"], "description": data["description"]} for data in parsed if isinstance(data, dict)]


def load_recipe(path_or_name: str | Path) -> Recipe:
    """Reads a YAML file, or the shipped recipe of that name. InputError for anything that is wrong with it."""
    name = str(path_or_name)
    if name.endswith((".yaml", ".yml")):
        return Recipe.from_yaml(_read(Path(name)), name)
    shipped = _shipped()
    try:
        choose("recipe", name, tuple(shipped))
    except SpecError as error:
        raise InputError(f"{error} (a file must end in .yaml)") from error
    return Recipe.from_yaml(shipped[name].read_text("utf-8"), name)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
