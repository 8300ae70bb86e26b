"""Options that several commands share, each defined once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kernelize.errors import InputError

if TYPE_CHECKING:
    from kernelize.recipe import Recipe

SOURCE_HELP = "Hub id, folder, or .gguf file."


def in_a_folder(path: Path | None) -> Path | None:
    """Refuses a file that could not be written before the work begins, not after it."""
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):  # a pipe or a device
        return path
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path} cannot be written: not a file in an existing folder")
    try:
        with TemporaryFile(dir=path.absolute().parent):  # permissions alone do not tell
            return path
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: its folder takes no file ({error.strerror})") from error


def only_with(needed: str, given: Mapping[str, object]) -> None:
    """Refuses those of the options `given` that were given, though without `needed` they have no effect."""
    for option, value in given.items():
        if value is not None and value != []:
            raise typer.BadParameter(f"{option} does nothing without {needed}; leave it out")


Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=in_a_folder, help="Write what the tables show to FILE."),
]
Written = Annotated[
    Path | None, typer.Option("--output", "-o", callback=in_a_folder, help="Write the plan as a recipe (YAML).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default a GPU if there is one.")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default the source's.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that the checkpoint brings; from the Hub, one --revision."
    ),
]


@dataclass(frozen=True)
class KernelFlags:
    """What becomes of the layers: a recipe, and flags that override its `kernel` and `keep`."""

    config: Annotated[str | None, typer.Option(help="Recipe: a .yaml file or a name from `kernelize list`.")] = None
    window: Annotated[int | None, typer.Option(help="Last tokens that are seen exactly.")] = None
    sinks: Annotated[int | None, typer.Option(help="First tokens that are seen exactly.")] = None
    slots: Annotated[int | None, typer.Option(help="Further tokens that are kept exactly.")] = None
    block: Annotated[int | None, typer.Option(help="Tokens that leave the window at a time.")] = None
    feature_map: Annotated[str | None, typer.Option(help="Map of the memory, or none.")] = None
    feature_dim: Annotated[int | None, typer.Option(help="Features a head.")] = None
    policy: Annotated[str | None, typer.Option(help="Who gets a slot; see `kernelize list`.")] = None
    decay: Annotated[str | None, typer.Option(help="none, fixed or gated.")] = None
    rule: Annotated[str | None, typer.Option(help="additive, delta or gated_delta.")] = None
    share: Annotated[float | None, typer.Option(help="Part of the slots for the policy's first score.")] = None
    aging: Annotated[
        int | None, typer.Option(help="Tokens after which attention received counts 1/e; 0: for ever.")
    ] = None
    reach: Annotated[
        int | None, typer.Option(help="Sinks and slots further back are seen as if just so far; 0: true distances.")
    ] = None
    sink_logits: Annotated[
        bool | None, typer.Option("--sink-logits/--no-sink-logits", help="A learned logit a head in the normaliser.")
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            help="Slots of the layers: uniform; auto: where they save most, as many in all; heads: the same by KV head."
        ),
    ] = None
    keep: Annotated[str | None, typer.Option(help="Layers that keep softmax, e.g. 0,7,12-14; auto:N: measured.")] = None
    pattern: Annotated[str | None, typer.Option(help="K kernelized, S softmax, repeated: KKKS.")] = None

    def fields(self) -> dict[str, Any]:
        """The fields of KernelSpec that were given."""
        others = ("config", "budget", "keep", "pattern")
        return {name: value for name, value in vars(self).items() if name not in others and value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """What was given, by the names on the command line."""
        return {f"--{name.replace('_', '-')}": value for name, value in vars(self).items() if value is not None}

    def recipe(self, layers: int, default: str = "default") -> Recipe:
        """The recipe for a model of so many layers, with the flags over it; InputError as `Recipe.from_dict`."""
        from kernelize.plan import kept_by_pattern, parse_auto, parse_layers
        from kernelize.recipe import Recipe, load_recipe

        before = load_recipe(self.config or default).to_dict()
        data = dict(before)
        data["kernel"] = {**data.get("kernel", {}), **self.fields()}
        if self.reach is not None:
            data.pop("reach", None)
        if self.budget is not None:
            data["budget"] = self.budget
        if self.keep is not None and self.pattern is not None:
            raise InputError("give --keep or --pattern, not both")
        if self.keep is not None or self.pattern is not None:
            data = {name: value for name, value in data.items() if name not in ("keep_auto", "keep_costs")}
        if self.keep is not None and self.keep.startswith("auto"):
            data |= {"keep": (), "keep_auto": parse_auto(self.keep)}
        elif self.keep is not None:
            data["keep"] = parse_layers(self.keep)
        if self.pattern is not None:
            data["keep"] = kept_by_pattern(self.pattern, layers)
        if data != before:
            data["description"] = self._described(before)
        return Recipe.from_dict(data, self.config or "options")

    def _described(self, before: Mapping[str, Any]) -> str:
        """What the recipe `before` is under these flags: the sizes in its own description need not hold any more."""
        name, said = before["name"], before["description"]
        changed = said if said.startswith(f"{name}, changed by ") else f"{name}, changed by"
        flags = {flag: value for flag, value in self.options.items() if flag != "--config"}
        if (own := flags.pop("--sink-logits", None)) is not None:
            flags |= {"--sink-logits" if own else "--no-sink-logits": ""}
        return " ".join([changed, *(f"{flag} {value}".rstrip() for flag, value in flags.items())])


def with_kernel_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, which takes one `kernel: KernelFlags`, an option for each of its fields."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        flags = {field.name: given.pop(field.name) for field in dataclasses.fields(KernelFlags)}
        command(**given, kernel=KernelFlags(**flags))

    own = inspect.signature(command, eval_str=True).parameters.values()
    fields = inspect.signature(KernelFlags, eval_str=True).parameters.values()
    merged = [p for p in own if p.name != "kernel"] + list(fields)
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        sorted((p.replace(kind=p.KEYWORD_ONLY) for p in merged), key=lambda p: p.default is not p.empty)
    )
    run.__annotations__ = {p.name: p.annotation for p in merged}
    return run
