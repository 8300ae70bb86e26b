"""Evaluates any causal language model, made by kernelize or not, and writes a report.

    python examples/evaluate_any_model.py SOURCE [OUTPUT]

SOURCE: a Hub id, a folder or a .gguf file. OUTPUT: a folder, by default ./report.
"""

import sys

from rich.console import Console

from kernelize.evaluate import evaluate
from kernelize.report import rows_table, write_report


def main(source: str, output: str = "report") -> None:
    models = {"model": source}  # add more, name: source; one named "teacher" is what the others are compared with
    rows = evaluate(models, ["ppl", "passkey", "generation"], quick=True, cache=f"{output}/cache.jsonl")
    Console().print(rows_table(rows))
    print("report:", write_report(rows, output))


if __name__ == "__main__":
    main(*sys.argv[1:])
