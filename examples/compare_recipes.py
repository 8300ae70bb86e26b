"""Converts one model by several recipes and measures what each keeps of it, beside the original.

    python examples/compare_recipes.py SOURCE [OUTPUT [RECIPE...]]

SOURCE: a Hub id, a folder or a .gguf file. OUTPUT: a folder, by default ./comparison. RECIPE: names from
`kernelize list` or .yaml files. Nothing is trained here: `kernelize finetune` does that to the one you choose.
"""

import copy
import sys
from pathlib import Path

from rich.console import Console

from kernelize.convert import convert, load
from kernelize.evaluate import Passkey, Perplexity, evaluate
from kernelize.pipeline import budget, calibration, plan_for
from kernelize.recipe import load_recipe
from kernelize.report import rows_table, write_report

RECIPES = ("window-only", "lolcats", "default")


def by_recipe(model, tokenizer, recipe):
    """A copy of the model, converted as the recipe says."""
    texts, priced = calibration(tokenizer, model), budget(tokenizer, model, recipe)
    return convert(copy.deepcopy(model), plan_for(recipe, model.config), calibration=texts, budget=priced)


def main(source: str, output: str = "comparison", *recipes: str) -> None:
    teacher, tokenizer = load(source)
    models = {"teacher": (teacher, tokenizer)}
    for recipe in map(load_recipe, recipes or RECIPES):
        print(f"converting by {recipe.name} …", flush=True)
        models[recipe.name] = by_recipe(teacher, tokenizer, recipe), tokenizer
    suites = [Perplexity(lengths=(1024,), pieces=2), Passkey(lengths=(512,), depths=(0.5,), trials=4)]
    rows = evaluate(models, suites, cache=Path(output, "cache.jsonl"))
    Console().print(rows_table(rows))
    print("report:", write_report(rows, output))


if __name__ == "__main__":
    main(*sys.argv[1:])
