"""Folder to folder: the steps of the main job as the command line and the demo run them, with their records kept."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import CARD_NAME, ENVIRONMENT_NAME, RECIPE_NAME, environment, model_card, read_facts, read_source, record
from .errors import InputError
from .files import check_apart, check_output, write_file
from .runtime.spec import KernelSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from .audit import Audit
    from .bench import Bench, Contender
    from .budget import Budget
    from .card import CardFacts
    from .evaluate import Row
    from .plan import ConversionPlan, PlanReport
    from .predict import Prediction
    from .quantize import Quantised
    from .recipe import DataSource, Recipe
    from .train import TrainResult

CONVERSION = ("keep", "keep_costs", "layers", "reach", "context", "budget")  # what of a recipe a conversion has used up
CALIBRATION_TOKENS, CALIBRATION_TEXTS = 1024, 2
BUDGET_TOKENS, BUDGET_TEXTS = 2048, (1, 2)  # the texts by which the slots are shared out


def load_for_use(source: str, *, device: str | None = None, dtype: str | None = None, **options: Any) -> tuple:
    """(model, tokenizer) as `convert.load`, by default on a GPU if there is one."""
    from .convert import load, usable_device

    return load(source, device=usable_device(device), dtype=dtype or "auto", **options)


def plan_source(
    source: str,
    make_recipe: Callable[[int], Recipe],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> tuple[Recipe, PlanReport]:
    """What a recipe would do to a model, from its config alone. `make_recipe` gets the number of layers.

    A recipe that chooses the layers it keeps needs the weights, and minutes: `device` and `on_progress` are for that.
    `options` go to `describe`: lengths, dtype. Raises InputError or SpecError for what cannot be converted.
    """
    from .convert import load_config
    from .plan import describe
    from .runtime.modeling import PREFIX, family_of

    config = load_config(source, revision=revision, trust_remote_code=trust_remote_code)
    if config.model_type.startswith(PREFIX):
        raise InputError(f"{source!r} is already kernelized; `kernelize info` shows its plan")
    family_of(config.model_type)
    recipe = make_recipe(config.num_hidden_layers)
    if recipe.keep_auto:
        loading = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": options.get("dtype")}
        recipe = keep_chosen(source, recipe, device=device, on_progress=on_progress, **loading)
    return recipe, describe(plan_for(recipe, config), config, **options)


def check_machine(name: str) -> None:
    """SpecError for a machine that is not known."""
    from .predict import machine_named

    machine_named(name)


def predict_stages(
    source: str, recipe: Recipe, machine: str, *, processes: int = 1, engine: str = "ddp", **loading: Any
) -> list[Prediction]:
    """What each stage of a recipe takes on so many of a known machine; SpecError for one that is not known."""
    from .convert import load_config
    from .predict import machine_named, predict

    chosen, config = machine_named(machine), load_config(source, **loading)
    plan, sharded = plan_for(recipe, config), engine != "ddp"
    return [predict(config, plan, stage, chosen, processes=processes, sharded=sharded) for stage in recipe.stages]


def keep_chosen(
    source: str, recipe: Recipe, *, on_progress: Callable[[int, int, str], None] | None = None, **loading: Any
) -> Recipe:
    """The recipe with the layers that its `keep_auto` asks for, measured on the model, and their costs."""
    from .convert import convert
    from .evaluate import sample_text
    from .keep import LENGTH, choose_layers, retrieval_texts

    count = recipe.keep_auto or 0
    free = recipe.model_copy(update={"keep_auto": None})
    model, tokenizer = load_for_use(source, **loading)
    length = min(LENGTH, model.config.max_position_embeddings)
    texts = retrieval_texts(tokenizer, sample_text("train"), length)
    plan = plan_for(free, model.config)
    if count >= len(plan.converted):
        raise InputError(f"keep=auto:{count} is not below the {len(plan.converted)} layers that can be converted")
    model = convert(model, plan, calibration=calibration(tokenizer, model))
    kept = choose_layers(model, texts, count, on_progress=on_progress)
    return free.keeping(kept.layers, kept.costs)


def plan_for(recipe: Recipe, config: PretrainedConfig) -> ConversionPlan:
    """The recipe's plan for a model; layers with a window of their own stay as they are, unless the recipe names them.

    Raises InputError or SpecError for what cannot be converted, and for positions that cannot be stretched.
    """
    from .convert import stretched_config
    from .plan import ConversionPlan
    from .runtime.modeling import native_windows, refuse, rotary_context

    if recipe.context:
        stretched_config(config, recipe.context)
    context = recipe.context or rotary_context(config)
    plan = ConversionPlan.from_recipe(recipe, config.num_hidden_layers, native_windows(config), context)
    refuse(config, list(plan.layers))
    return plan


def convert_source(
    source: str,
    make_recipe: Callable[[int], Recipe],
    output: str | Path,
    *,
    overwrite: bool = False,
    stream: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, label: None,
    **loading: Any,
) -> PlanReport:
    """Loads `source`, converts it by the recipe for its number of layers, and saves it with recipe and card.

    The kernels are initialised from the sample text that ships with kernelize. With `stream` the weights stay in their
    files and are read a module at a time: the same initialisation in the memory of a layer, slower. `loading`:
    revision, trust_remote_code. What cannot be used is refused before a weight is loaded; nothing is half written.
    """
    check_output(output, overwrite)
    check_apart(output, source)
    make = partial(streamable, make_recipe) if stream else make_recipe
    if stream and dtype:
        raise InputError(f"dtype={dtype!r}: a streamed conversion keeps the tensors as they are")
    recipe, _ = plan_source(source, make, dtype=dtype, device=device, **loading)
    run = _convert_streamed if stream else _convert_in_memory
    model, save_to = run(source, recipe, output, overwrite, dtype, device, on_progress, loading)
    recipe, report = as_converted(recipe, model), describe_converted(model, dtype)
    command = _command("convert", source, output, dtype=dtype, stream=stream, **loading)
    origin = read_source(source, loading.get("revision"))
    save_to(document=partial(document, name=_name(output), recipe=recipe, source=origin, tokens=0, commands=[command]))
    return report


def streamable(make_recipe: Callable[[int], Recipe], layers: int) -> Recipe:
    """The recipe for so many layers; InputError for one that a streamed conversion cannot follow."""
    recipe = make_recipe(layers)
    if recipe.keep_auto:
        raise InputError(
            f"keep=auto:{recipe.keep_auto} reads the model many times, which would be from its files: let "
            "`kernelize plan --output` measure it where the model fits, and give that recipe"
        )
    return recipe


def _convert_in_memory(
    source: str, recipe: Recipe, output: str | Path, overwrite: bool, dtype: str | None, device: str | None,
    on_progress: Callable[[int, int, str], None], loading: dict[str, Any],
) -> tuple[Any, Callable[..., Path]]:  # fmt: skip
    """(the converted model, what saves it), as the next one."""
    from .convert import convert, save, stretch

    model, tokenizer = load_for_use(source, dtype=dtype, device=device, **loading)
    plan = plan_for(recipe, model.config)
    if recipe.context:
        model = stretch(model, recipe.context)
    texts, priced = calibration(tokenizer, model), budget(tokenizer, model, recipe)
    model = convert(model, plan, calibration=texts, budget=priced, on_progress=on_progress)
    return model, partial(save, model, tokenizer, output, overwrite=overwrite)


def _convert_streamed(
    source: str, recipe: Recipe, output: str | Path, overwrite: bool, dtype: str | None, device: str | None,
    on_progress: Callable[[int, int, str], None], loading: dict[str, Any],
) -> tuple[Any, Callable[..., Path]]:  # fmt: skip
    from .convert import initialise, load_config, load_tokenizer, usable_device
    from .stream import local_folder, recomputing, save_streamed, streamed_model

    folder = local_folder(source, loading.get("revision"))
    plan, tokenizer = plan_for(recipe, load_config(source, **loading)), load_tokenizer(source, **loading)
    on = usable_device(device)
    model, shards = streamed_model(source, folder, plan, context=recipe.context, device=on, **loading)
    texts, priced = calibration(tokenizer, model), budget(tokenizer, model, recipe)
    with recomputing(model):
        initialise(model, texts, priced, on_progress)
    return model, partial(save_streamed, model, tokenizer, shards, output, overwrite=overwrite)


def calibration(tokenizer, model) -> list[Tensor]:
    """Pieces of the sample text that ships with kernelize, as input ids [1, T]."""
    import torch

    from .evaluate import sample_text

    length = min(CALIBRATION_TOKENS, model.config.max_position_embeddings)
    text = sample_text("train")
    pieces = [text[i * len(text) // CALIBRATION_TEXTS :][: 8 * length] for i in range(CALIBRATION_TEXTS)]
    return [torch.tensor([tokenizer(piece)["input_ids"][:length]]) for piece in pieces]


def budget(
    tokenizer, model, recipe: Recipe, *, length: int = BUDGET_TOKENS, texts: tuple[int, int] = BUDGET_TEXTS
) -> Budget | None:
    """By what the slots are shared out, if the recipe wants that: so many ordinary texts, so many to recall."""
    from .budget import Budget, budget_texts
    from .evaluate import sample_text

    if recipe.budget == "uniform":
        return None
    length = min(length, model.config.max_position_embeddings)
    return Budget(budget_texts(tokenizer, sample_text("train"), length, *texts), recipe.budget == "heads")


def as_converted(recipe: Recipe, model) -> Recipe:
    """The recipe with every field of its kernels and the slots that the layers of `model` were given, so that it says
    what was done, whatever the defaults will be."""
    base = KernelSpec.from_dict(recipe.kernel).to_dict()
    if recipe.reach:
        base.pop("reach")
    recipe = recipe.model_copy(update={"kernel": base})
    if recipe.budget == "uniform":
        return recipe
    specs = {i: spec for i, spec in enumerate(model.config.kernelize["layers"]) if spec}
    given = {str(i): {f: spec[f] for f, v in base.items() if spec[f] != v} for i, spec in specs.items()}
    return recipe.model_copy(update={"budget": "uniform", "layers": {i: f for i, f in given.items() if f}})


def describe_converted(model, dtype: str | None = None) -> PlanReport:
    """What the plan that a converted model holds costs."""
    from .plan import ConversionPlan, describe
    from .runtime.modeling import plan_of

    return describe(ConversionPlan(tuple(plan_of(model.config))), model.config, dtype=dtype)


def document(output: str | Path, *, recipe: Recipe | None = None, name: str | None = None, **facts: Any) -> None:
    """Keeps facts (source, tokens, rows, commands) and the recipe beside the weights, and writes the card anew.

    A fact replaces what was known of it. `name` is the folder's, where it does not have it yet.
    """
    folder = Path(output)
    if recipe is not None:
        write_file(folder / RECIPE_NAME, recipe.to_yaml())
    record(folder, **facts)
    if "commands" in facts:  # something was made, not only measured
        write_file(folder / ENVIRONMENT_NAME, environment())
    write_file(folder / CARD_NAME, model_card(folder, name))


def _name(output: str | Path) -> str:
    """What `read_facts` will call the checkpoint."""
    return Path(output).resolve().name


def evaluate_sources(
    sources: Sequence[str],
    suites: Sequence[str],
    *,
    teacher: str | None = None,
    lengths: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    quick: bool = False,
    settings: Mapping[str, Any] | None = None,
    card: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> list[Row]:
    """Evaluates sources beside a teacher; with `card`, the first one's model card takes up the numbers.

    `options` go to `evaluate`: cache, on_progress. What cannot be asked is refused before a weight is loaded.
    """
    from .evaluate import choose_suites, evaluate

    chosen = choose_suites(suites, lengths=lengths, quick=quick, settings=settings)
    if card:
        read_facts(sources[0])
    named = {**({"teacher": teacher} if teacher else {}), **dict(zip(short_names(sources), sources, strict=True))}
    loaded = {name: load_for_use(source, device=device, dtype=dtype) for name, source in named.items()}
    rows = evaluate(loaded, chosen, **options)
    if card:
        document(sources[0], rows=_with_other_suites(sources[0], as_rows(rows)))
    return rows


def quantize_source(
    source: str, bits: int, output: str | Path, *, device: str | None = None, dtype: str | None = None, **options: Any
) -> Quantised:
    """`quantize.quantize`, by default on a GPU if there is one; InputError where torchao is not installed."""
    import importlib.util

    if importlib.util.find_spec("torchao") is None:
        raise InputError("quantisation needs torchao; run: pip install 'kernelize[quantize]'")
    from .convert import usable_device
    from .quantize import quantize

    return quantize(source, bits, output, device=usable_device(device), dtype=dtype or "auto", **options)


def serve_source(source: str, **options: Any) -> None:
    """`serve.serve`; InputError where what it needs is not installed."""
    from transformers.utils.import_utils import is_fastapi_available, is_uvicorn_available

    if not (is_fastapi_available() and is_uvicorn_available()):
        raise InputError("serving needs fastapi, uvicorn and openai; run: pip install 'kernelize[serve]'")
    from .serve import serve

    serve(source, **options)


def check_address(host: str, port: int) -> None:
    """InputError for an address at which nothing can listen: another server does, or it is none of this machine."""
    import socket

    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return
    except OSError as error:
        raise InputError(f"cannot listen at {host}, port {port}: {error.strerror}") from error


def audit_source(
    source: str,
    teacher: str,
    *,
    card: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Audit:
    """Audits a converted checkpoint beside the original; with `card`, its model card takes up what was found.

    `options` go to `audit.audit`: length, pieces, trials, text, on_progress.
    """
    from .audit import audit

    if card:
        read_facts(source)
    model, tokenizer = load_for_use(source, device=device, dtype=dtype)
    original, _ = load_for_use(teacher, device=device, dtype=dtype)
    found = audit(model, original, tokenizer, name=short_names([source])[0], **options)
    if card:
        document(source, audit=found.to_dict())
    return found


def _with_other_suites(folder: str, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows after those that the card has of suites that were not measured anew."""
    suites = {row["suite"] for row in rows}
    return [*(row for row in read_facts(folder).rows if row["suite"] not in suites), *rows]


def short_names(sources: Sequence[str]) -> list[str]:
    """A name for each source: the last part of its path, and as many parts before it as tell it from the others.

    Raises InputError for a source given twice.
    """
    parts = [_parts(source) for source in sources]
    for i, mine in enumerate(parts):
        if mine in parts[:i]:
            raise InputError(f"source {sources[i]!r} is given twice; each can be measured once")
    depth, deepest = 1, max(map(len, parts))
    while depth < deepest and len({mine[-depth:] for mine in parts} | {("teacher",)}) <= len(parts):
        depth += 1
    return ["/".join(mine[-depth:]) for mine in parts]


def _parts(source: str) -> tuple[str, ...]:
    """Of a Hub id as it is, of a file or folder from the root on, without .gguf."""
    path = Path(source)
    whole = path.resolve() if path.exists() else path
    return whole.with_name(whole.name.removesuffix(".gguf")).parts


def read_instead(own: Sequence[DataSource], names: Sequence[str]) -> list[DataSource]:
    """Text from `names` in place of a stage's own: its tasks of retrieval are hidden in the files among it, and keep
    their share. Where `names` have `retrieval`, they are all that is read, in equal shares.
    """
    from .recipe import DataSource

    named = [DataSource.model_validate(name) for name in names]
    tasks = sum(source.weight for source in own if source.builtin == "retrieval")
    if not tasks or any(source.builtin == "retrieval" for source in named):
        return named
    text = sum(source.weight for source in own) - tasks
    hidden = [DataSource(path=source.path, builtin="retrieval") for source in named if source.path]
    hidden = hidden or [DataSource(builtin="retrieval")]
    weighed = [(named, text)] * (text > 0) + [(hidden, tasks)]
    return [x.model_copy(update={"weight": weight / len(xs)}) for xs, weight in weighed for x in xs]


def override_stages(recipe: Recipe, *, seed: int | None = None, **changes: Any) -> Recipe:
    """The recipe with fields of all its stages changed; None leaves a field as it is. `tokens` replaces `steps`, and
    `data`, a list of names, what the stages read (`read_instead`). A `sequence_length` alone leaves batches as large as
    whole sequences allow.
    """
    from .recipe import Recipe

    given = {name: value for name, value in changes.items() if value is not None}
    data = recipe.to_dict()
    for old, stage in zip(recipe.stages, data.get("stages", ()), strict=True):
        if "tokens" in given:
            stage.pop("steps", None)
        stage.update(given)
        length = given.get("sequence_length", 0)
        if length > 0 and "batch_tokens" not in given:
            stage["batch_tokens"] = max(1, old.batch_tokens // length) * length
        if "data" in given:
            stage["data"] = [source.model_dump() for source in read_instead(old.data, given["data"])]
    return Recipe.from_dict(data if seed is None else {**data, "seed": seed}, f"recipe {recipe.name!r} with options")


def finetune_source(
    source: str,
    recipe: Recipe,
    output: str | Path,
    *,
    teacher: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dtype: str | None = None,
    on_event: Callable[[dict], None] | None = None,
) -> TrainResult:
    """Trains the converted checkpoint `source` by the recipe's stages into `output`, with recipe and card.

    teacher: source of the original model, by default the recipe's. Raises as `train.finetune`.
    """
    from .convert import load
    from .train import finetune

    if not resume:
        check_output(output, overwrite)
    check_apart(output, source, teacher)
    before = read_facts(source) if Path(source).is_dir() else None
    model, tokenizer = load(source, dtype=dtype or "auto")
    recipe = _with_kernels(recipe, before, teacher, model)
    _check_original(recipe, teacher)
    if "quantization_config" in model.config.to_dict():
        raise InputError(
            f"{source!r} is quantised, and integers cannot be trained; finetune the checkpoint it came from"
        )
    documented = partial(document, name=_name(output), **_training_facts(source, before, recipe, output, dtype))
    return finetune(
        model, tokenizer, recipe, output, resume=resume, overwrite=overwrite, on_event=on_event, document=documented
    )


def _check_original(recipe: Recipe, teacher: str | None) -> None:
    """InputError for a teacher that is converted itself: a stage holds a layer against the softmax that it replaced."""
    from .convert import load_config
    from .runtime.modeling import PREFIX
    from .train import needs_teacher

    if recipe.source and (teacher or any(map(needs_teacher, recipe.stages))):
        kind = load_config(recipe.source).model_type
        if kind.startswith(PREFIX):
            raise InputError(f"teacher {recipe.source!r} is kernelized itself ({kind}); give the original model")


def _with_kernels(recipe: Recipe, before: CardFacts | None, teacher: str | None, model: PreTrainedModel) -> Recipe:
    """The stages of `recipe` for the kernels that the checkpoint has: by its own recipe or, without one, by its plan.

    Of an earlier release the checkpoint's recipe may leave out what was then the default: 128 features.
    """
    from .plan import ConversionPlan
    from .recipe import Recipe
    from .runtime.modeling import kernelized_layers, plan_of

    features = [layer.kernelize.spec.feature_dim for layer in kernelized_layers(model).values()]
    if not features:
        return recipe.model_copy(update={"source": teacher} if teacher else {})
    if before and before.recipe:
        made = Recipe.from_yaml(before.recipe, RECIPE_NAME)
    else:
        made = ConversionPlan(tuple(plan_of(model.config))).to_recipe(recipe.name, recipe.description)
    kept: dict[str, Any] = {field: getattr(made, field) for field in CONVERSION}
    kept |= {"kernel": {"feature_dim": features[0]} | made.kernel, "keep_auto": None}
    return recipe.model_copy(update=kept | ({"source": teacher} if teacher else {}))


def _training_facts(
    source: str, before: CardFacts | None, recipe: Recipe, output: str | Path, dtype: str | None
) -> dict[str, Any]:
    """What `document` keeps of a training; what is not known of the time before it stays unknown."""
    trained = sum(stage.total_steps * stage.batch_tokens for stage in recipe.stages)
    earlier = None if before is None else before.tokens
    return {
        "recipe": recipe,
        "source": read_source(source),
        "tokens": None if earlier is None else earlier + trained,
        "commands": [*(before.commands if before else ()), _command("finetune", source, output, dtype=dtype)],
    }


def _command(name: str, source: str, output: str | Path, **options: str | bool | None) -> str:
    """The command as it is recorded: of what lies on this machine only the name; the recipe stands beside the card.

    `options`: what else the result follows from, by its name in Python; what is None or False was not given.
    """
    named = Path(source).name if Path(source).exists() else source
    given = {f"--{option.replace('_', '-')}": value for option, value in options.items() if value}
    more = [part for option, value in given.items() for part in ([option] if value is True else [option, str(value)])]
    return shlex.join(["kernelize", name, named, "--config", RECIPE_NAME, "--output", _name(output), *more])


def as_rows(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """Evaluation rows as the card and JSON take them."""
    import dataclasses

    return [dataclasses.asdict(row) for row in rows]


def check_card(folder: str | None) -> None:
    """InputError unless `folder` is a checkpoint, whose model card can take up numbers."""
    if folder is None:
        raise InputError("--card needs a SOURCE, whose model card takes up the numbers")
    read_facts(folder)


def keep_speed(folder: str, found: Bench) -> None:
    """Puts what `bench` measured into a checkpoint's model card."""
    document(folder, speed={"rows": as_rows(found.rows), "ran": found.ran, "machine": found.machine})


def contenders_for(
    source: str | None,
    against: str | None,
    shape: str | None,
    make_recipe: Callable[[int], Recipe],
    *,
    alone: bool = False,
    **options: Any,
) -> list[Contender]:
    """Whom `bench` measures: a source and, last, its teacher; or a named shape, converted and (unless `alone`) not.

    `options` as in `load_for_use`. InputError unless there is exactly one of `source` and `shape`.
    """
    from .bench import Contender

    if (source is None) == (shape is None):
        raise InputError(f"source={source!r}, shape={shape!r}: give a SOURCE, or --shape for random weights")
    if shape is not None:
        if against is not None:
            raise InputError(f"against={against!r} goes with a SOURCE; --shape brings its own teacher")
        mine = Contender(f"{shape} kernelized", lambda: _shaped(shape, make_recipe, **options))
        return [mine] if alone else [mine, Contender("teacher", lambda: _shaped(shape, None, **options))]

    def loaded(name: str, what: str) -> Contender:
        return Contender(name, lambda: load_for_use(what, **options)[0])

    mine = loaded(Path(str(source)).name, str(source))
    return [mine] if against is None else [mine, loaded("teacher", against)]


def _shaped(
    shape: str,
    make_recipe: Callable[[int], Recipe] | None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    **_: Any,
) -> Any:
    """A random model of a named shape; with a recipe, converted (slots alike in all layers, nothing calibrated)."""
    from .convert import named_dtype, usable_device
    from .runtime.modeling import kernelize_model
    from .shapes import random_model

    device = usable_device(device)
    chosen = named_dtype(dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    model = random_model(shape, device=device, dtype=chosen)
    if make_recipe is None:
        return model
    plan = plan_for(make_recipe(model.config.num_hidden_layers), model.config)
    return kernelize_model(model, list(plan.layers)).eval()
