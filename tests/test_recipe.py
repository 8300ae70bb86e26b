"""Recipes: every shipped one is sound; nothing wrong passes; reading and writing are inverse."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kernelize.errors import InputError
from kernelize.pipeline import override_stages
from kernelize.recipe import DataSource, Recipe, Stage, load_recipe, recipes

SHIPPED = [entry["name"] for entry in recipes()]
STAGE = {"name": "t", "kind": "transfer", "steps": 2, "data": ["sample"]}


def recipe(**fields) -> Recipe:
    return Recipe.from_dict({"name": "r", "description": "d", **fields})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_is_sound(name):
    loaded = load_recipe(name)
    assert loaded.name == name
    assert loaded.specs(3)
    assert Recipe.from_yaml(loaded.to_yaml()) == loaded


def test_the_controls_hold_the_same_positions_as_the_default():
    assert {"default", "window-only", "window-distilled", "lolcats", "demo"} <= set(SHIPPED)
    positions = {name: load_recipe(name).specs(1)[0].positions for name in SHIPPED}
    assert positions["default"] == positions["window-only"] == positions["window-distilled"] == 260


def test_what_is_compared_spends_the_tokens_of_default():
    same = ("default", "window-distilled", "pure-linear", "hybrid-quarter", "learned")
    assert len({sum(stage.tokens for stage in load_recipe(name).stages) for name in same}) == 1
    drops, plain = (load_recipe(name).stages for name in ("dropout", "recall"))
    assert sum(stage.tokens for stage in drops[:3]) == sum(stage.tokens for stage in plain[:1])
    assert [stage.window_dropout for stage in drops] == [0.9, 0.5, 0.0, 0.0]
    assert drops[3] == plain[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage": []}, "did you mean 'stages'"),
        ({"stages": [STAGE | {"learning_rat": 1.0}]}, r"stages\[0\].*did you mean 'learning_rate'"),
        ({"stages": [STAGE | {"kind": "distill"}]}, "'transfer', 'forecast' or 'distil', not 'distill'"),
        ({"stages": [STAGE | {"learning_rate": "fast"}]}, r"stages\[0\].learning_rate.*'fast'"),
        ({"stages": [STAGE | {"steps": None}]}, "exactly one of tokens, steps"),
        ({"stages": [STAGE | {"tokens": 5}]}, "exactly one of tokens, steps"),
        ({"stages": [STAGE | {"batch_tokens": 1500}]}, "batch_tokens=1500"),
        ({"stages": [STAGE | {"trainable": "all"}]}, "'new' only"),
        ({"stages": [STAGE | {"distil": {"kl": 1.0}}]}, "no loss weights under the key 'distil'"),
        ({"stages": [STAGE | {"lora": {"r": 4}}]}, "new\\+lora"),
        ({"stages": [STAGE | {"data": []}]}, r"stages\[0\].data"),
        ({"stages": [STAGE | {"data": [{"path": "a.txt", "dataset": "b"}]}]}, "exactly one of path"),
        ({"stages": [STAGE | {"target": "answers"}]}, "kind='forecast', not 'transfer'"),
        (
            {"stages": [STAGE | {"kind": "forecast", "packing": "joined", "target": "answers"}]},
            "needs data with answers: builtin 'retrieval'",
        ),
        ({"stages": [STAGE, STAGE]}, "share a name"),
        ({"kernel": {"windw": 3}}, "did you mean 'window'"),
        ({"kernel": {"window": 0}}, "window=0"),
        ({"layers": {"2-1": {}}}, "range '2-1' is empty"),
        ({"layers": {"x": {}}}, "layers key 'x'"),
        ({"layers": {"1-3": {}, "2": {}}}, "layer 2 twice"),
        ({"layers": {"2": {"slot": 1}}}, "did you mean 'slots'"),
        ({"keep": [2], "layers": {"2": {}}}, "keep and in layers"),
        ({"keep": [-1]}, "keep"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_what_makes_no_sense_is_named(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        recipe(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_recipe_is_a_mapping(data):
    with pytest.raises(InputError, match="a recipe is a mapping of fields"):
        Recipe.from_dict(data)


def test_layers_override_ranges_and_keep_stays_softmax():
    made = recipe(kernel={"slots": 8}, keep=[0], layers={1: {"slots": 2}, "2-3": {"slots": 4, "window": 32}})
    specs = made.specs(5)
    assert specs[0] is None
    assert [spec.slots for spec in specs[1:]] == [2, 4, 4, 8]
    assert [spec.window for spec in specs[1:]] == [64, 32, 32, 64]
    with pytest.raises(InputError, match="names layer 3"):
        made.specs(3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\ndescription: c\n", "'name' stands twice"),
        ("kernel: {window: 64, window: 32}", "'window' stands twice"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("{[a]: b}", "not valid YAML"),
        ("a: &x [*x]", "key=.a. is not"),
        ("description: 2020-01-01\nname: a", "description: "),
        ("\x00", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_clear_line(text, message):
    with pytest.raises(InputError, match=message):
        Recipe.from_yaml(text)


@pytest.mark.parametrize("number", ["020", "1:30", "0x10", "0b11"])
def test_a_whole_number_is_what_it_looks_like_or_none(number):
    with pytest.raises(InputError, match=f"seed: .*integer, not '{number}'"):
        Recipe.from_yaml(f"name: a\ndescription: b\nseed: {number}")
    assert Recipe.from_yaml("name: a\ndescription: b\nseed: 1_000").seed == 1000


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "clip"])
def test_numbers_are_finite(field):
    with pytest.raises(InputError, match=f"{field}: .*finite"):
        recipe(stages=[STAGE | {field: float("inf")}])


def test_what_stages_share_may_be_written_once():
    shared = "&s {kind: transfer, steps: 2, data: [sample]}"
    read = Recipe.from_yaml(
        f"name: a\ndescription: b\nstages: [{{name: x, <<: {shared}}}, {{<<: *s, name: y, steps: 3}}]"
    )
    assert [(stage.name, stage.steps) for stage in read.stages] == [("x", 2), ("y", 3)]


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\ndescription: d\nstages: [{name: t, kind: distil, steps: 1, learning_rate: 1e-3, data: [self]}]"
    )
    assert load_recipe(path).stages[0].learning_rate == 1e-3


def test_unknown_recipes_and_files(tmp_path):
    with pytest.raises(InputError, match="did you mean 'default'"):
        load_recipe("defualt")
    with pytest.raises(InputError, match=r"nothing\.yaml: cannot be read: No such file or directory$"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("name", "origin"),
    [("self", "builtin"), ("sample", "builtin"), ("a/b.txt.xz", "path"), ("c.jsonl", "path"), ("me/text", "dataset")],
)
def test_a_bare_name_says_where_data_comes_from(name, origin):
    source = DataSource.model_validate(name)
    assert getattr(source, origin) == source.name == name


def test_recipes_are_frozen_and_budgets_round_up():
    budget = {"tokens": 2001, "batch_tokens": 1000, "sequence_length": 500}
    stage = Stage(name="t", kind="distil", data=["self"], **budget)
    assert (stage.total_steps, stage.rows) == (3, 2)
    with pytest.raises(ValueError, match="frozen"):
        stage.name = "u"


def test_listing_recipes_does_not_import_torch():
    code = "import sys, kernelize.recipe as r; r.recipes(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", [name for name in SHIPPED if load_recipe(name).stages])
def test_own_text_keeps_the_share_of_retrieval(name):
    """A recipe that asks for facts hides them in the text that is given; where retrieval is named, names are all."""

    def share(sources) -> float:
        tasks = sum(source.weight for source in sources if source.builtin == "retrieval")
        return tasks / sum(source.weight for source in sources)

    recipe = load_recipe(name)
    changed = override_stages(recipe, data=["a.jsonl", "b.parquet", "me/dataset"])
    for before, after in zip(recipe.stages, changed.stages, strict=True):
        assert share(after.data) == pytest.approx(share(before.data))
        assert {source.path for source in after.data if source.builtin == "retrieval"} <= {"a.jsonl", "b.parquet"}
        assert all(source.path or source.dataset for source in after.data)
    asked = override_stages(recipe, data=["a.jsonl", "retrieval"])
    assert {share(stage.data) for stage in asked.stages} == {0.5}
