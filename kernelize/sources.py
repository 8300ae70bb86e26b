"""What a source's files must be before Transformers sees them: whole, consistent, and no larger than they say.

Transformers initialises what a checkpoint lacks at random, and believes what headers promise. Here a lie is an
InputError that names file and tensor, before memory is taken for it.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from safetensors import SafetensorError, safe_open

from .errors import InputError
from .runtime.spec import MOST_LAYERS

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
SMALL = 1 << 28  # bytes: the most that a JSON file of a checkpoint may have
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "block_count")  # config fields that count layers
COMMIT = re.compile(r"[0-9a-f]{40}")

Shapes = dict[str, tuple[int, ...]]  # of the tensors in a checkpoint's files


# --- folders ----------------------------------------------------------------------------------------------------------


def check_texts(folder: Path) -> None:
    """InputError for what config and tokenizer of a checkpoint folder must not say."""
    check_config(read_json(folder / "config.json"), str(folder))
    check_template_names(folder)


def check_weights(folder: Path) -> Shapes:
    """The tensors of a checkpoint folder; InputError for files that cannot be read or do not fit together."""
    named = named_by_index(folder)
    shapes: Shapes = {}
    for file in shard_files(folder):
        found = shapes_in(file)
        if twice := next((name for name in found if name in shapes), None):
            raise InputError(f"{file}: tensor {twice!r} is in another file, too")
        if lie := next((n for n, shard in named.items() if shard == file.name and n not in found), None):
            raise InputError(f"{folder / INDEX} says that {lie!r} is in {file.name}, which does not hold it")
        shapes |= found
    check_layers(read_json(folder / "config.json"), len(shapes), str(folder))
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """An object; InputError for what is none, or no JSON, or larger than such a file can be."""
    try:
        if path.stat().st_size > SMALL:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes are no configuration")
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {type(data).__name__}, not an object")
    return data


def named_by_index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index says; empty without one. InputError for a file that is not in this folder."""
    if not (folder / INDEX).is_file():
        return {}
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise InputError(f"{folder / INDEX} is no index of safetensors files")
    for file in dict.fromkeys(named.values()):
        if Path(file).name != file or "\\" in file:
            raise InputError(f"{folder / INDEX} names {file!r}, which is no file of its own folder")
        if not (folder / file).is_file():
            raise InputError(f"{folder / INDEX} names {file!r}, which is not there")
    return named


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from; InputError where there are none."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} has neither {WEIGHTS} nor {INDEX}; pickled weights are not read")
    return [folder / file for file in sorted(set(named_by_index(folder).values()))]


def shapes_in(file: Path) -> Shapes:
    """Of a safetensors file's header, which the library compares with the length of the file."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {str(file)!r}: {error}") from error


def check_config(config: Mapping[str, Any], where: str) -> None:
    """InputError for code from a repository that no revision pins, and for layers without end."""
    for name in LAYERS:
        if isinstance(config.get(name), int) and config[name] > MOST_LAYERS:
            raise InputError(f"{where}: {name}={config[name]} is above {MOST_LAYERS}")
    for entry in _strings(config.get("auto_map")):
        if "--" in entry:
            raise InputError(f"{where}: auto_map takes code from {entry.partition('--')[0]!r}, which nothing pins")


def check_template_names(folder: Path) -> None:
    """Names of chat templates become names of files, also in the output."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    config = read_json(folder / "tokenizer_config.json")
    check_config(config, str(folder / "tokenizer_config.json"))
    templates = config.get("chat_template")
    for entry in templates if isinstance(templates, list) else ():
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"{folder / 'tokenizer_config.json'}: {name!r} cannot be the name of a chat template")


def check_layers(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Every layer has a tensor; so a count of layers that cannot be is known before so many are made."""
    for name in LAYERS:
        count = config.get(name)
        if isinstance(count, int) and count > tensors:
            raise InputError(f"{where}: {name}={count}, but the weights are {tensors} tensors")


def check_shapes(needed: Mapping[str, tuple[int, ...]], held: Shapes, where: str) -> None:
    """InputError if a model of these parameters does not fit the tensors that there are.

    Names of parameters and tensors may differ (GGUF, converted names), so what is required is that there is a value
    for each entry; a tensor of the same name must have the same shape.
    """
    for name, shape in needed.items():
        if name in held and prod(held[name]) != prod(shape):
            raise InputError(f"{where}: tensor {name!r} is {list(held[name])}, the config says {list(shape)}")
    want, have = sum(map(prod, needed.values())), sum(map(prod, held.values()))
    if want > have:
        missing = next((name for name in needed if name not in held), None)
        raise InputError(f"{where}: a model of this config has {want:,} parameters, the files hold {have:,} values"
                         + (f"; one that is missing is {missing!r}" if missing else ""))  # fmt: skip


def check_pinned(source: str, revision: str | None) -> None:
    """Code from the Hub runs only as one commit, which cannot change between two runs."""
    if revision is None or not COMMIT.fullmatch(revision):
        raise InputError(
            f"{source!r}: --trust-remote-code runs its code, so pin it by --revision with a full commit hash, "
            f"not {revision!r}"
        )


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


# --- GGUF -------------------------------------------------------------------------------------------------------------

SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.BOOL: "<B",
    GGUFValueType.UINT16: "<H", GGUFValueType.INT16: "<h", GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.UINT64: "<Q", GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d",
}  # fmt: skip
VERSIONS, DIMENSIONS, ALIGNMENT = (2, 3), 4, "general.alignment"


@dataclass
class _Reader:
    """Walks over a GGUF header; a length that the file does not have is an error before anything is made of it."""

    data: mmap.mmap
    path: Path
    at: int = 0
    fields: dict[str, Any] = field(default_factory=dict)  # scalars only

    def refuse(self, what: str) -> InputError:
        return InputError(f"{self.path}: not a whole GGUF file: {what}")

    def skip(self, size: int, what: str) -> int:
        """Where `size` bytes begin; moves on behind them."""
        if size > len(self.data) - self.at:
            raise self.refuse(f"{what} of {size:,} bytes at byte {self.at:,} ends after the file")
        self.at += size
        return self.at - size

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form), "a number"))[0]

    def text(self) -> str:
        size = self.number("<Q")
        start = self.skip(size, "a text")
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"the text at byte {start:,} is not UTF-8") from error

    def kind(self) -> GGUFValueType:
        number = self.number("<I")
        if number not in set(GGUFValueType):
            raise self.refuse(f"there is no type {number}")
        return GGUFValueType(number)

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(SCALARS[kind])
        inner, count = self.kind(), self.number("<Q")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[inner]), "an array")
        elif inner == GGUFValueType.STRING:
            self.skip_texts(count)
        else:
            raise self.refuse("an array of arrays")
        return None

    def skip_texts(self, count: int) -> None:
        for _ in range(count):
            self.skip(self.number("<Q"), "a text")


def check_gguf(path: Path) -> Shapes:
    """The tensors of a GGUF file; InputError for one that is cut short, or says what cannot be."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _tensors(_Reader(data, path))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise InputError(f"{str(path)!r} is not a GGUF file ({error})") from error


def _tensors(reader: _Reader) -> Shapes:
    if reader.data[reader.skip(4, "the mark") : 4] != b"GGUF":
        raise InputError(f"{str(reader.path)!r} is not a GGUF file")
    if (version := reader.number("<I")) not in VERSIONS:
        raise reader.refuse(f"version {version} is not one of {VERSIONS}")
    tensors, fields = reader.number("<Q"), reader.number("<Q")
    for _ in range(fields):
        key = reader.text()
        if key in reader.fields:
            raise reader.refuse(f"{key!r} stands twice")
        reader.fields[key] = reader.value(reader.kind())
    shapes, ends = Shapes(), 0
    for _ in range(tensors):
        name, shape, end = _tensor(reader)
        if name in shapes:
            raise reader.refuse(f"tensor {name!r} stands twice")
        shapes[name], ends = shape, max(ends, end)
    _check_sizes(reader, shapes, ends)
    return shapes


def _tensor(reader: _Reader) -> tuple[str, tuple[int, ...], int]:
    """(name, shape, where it ends in the data)"""
    name, dimensions = reader.text(), reader.number("<I")
    if not 1 <= dimensions <= DIMENSIONS:
        raise reader.refuse(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(dimensions))
    kind, offset = reader.number("<I"), reader.number("<Q")
    if kind not in set(GGMLQuantizationType):
        raise reader.refuse(f"tensor {name!r} has the unknown type {kind}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[0] % block or not prod(shape):
        raise reader.refuse(f"tensor {name!r} of {list(shape)} values does not consist of blocks of {block}")
    return name, shape[::-1], offset + prod(shape) // block * size


def _check_sizes(reader: _Reader, shapes: Shapes, ends: int) -> None:
    alignment = reader.fields.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.refuse(f"{ALIGNMENT}={alignment} is no power of two")
    if -(-reader.at // alignment) * alignment + ends > len(reader.data):
        raise reader.refuse("its tensors end after the file")
    layers = {key.rpartition(".")[2]: value for key, value in reader.fields.items()}
    check_layers(layers, len(shapes), str(reader.path))
