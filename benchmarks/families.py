"""The table of docs/families.md: what `kernelize check` finds on a tiny random model of every family.

    python benchmarks/families.py [--write]

The models are those of tests/families.py, with the oddities of their families switched on. Every law but the clean
process is asked for; exits with 1 if one fails. `--write` puts the table into docs/families.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import tiny_student, tiny_teacher  # noqa: E402

from kernelize.check import BOUNDS, EXACT, LAWS, CheckRow, check  # noqa: E402
from kernelize.runtime.modeling import FAMILIES, supported  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
HEAD = "| model type | attention | what is odd | float64 | teacher, float32 | refused |"
TABLE = re.compile(r"\| model type .*?\n\n", re.DOTALL)


def row(name: str, found: list[CheckRow]) -> str:
    family = FAMILIES[name]
    exact = max(r.difference for r in found if r.difference is not None and BOUNDS.get(r.name) == EXACT)
    teacher = next(r.difference for r in found if r.name == "identity with the teacher")
    refused = ", ".join(r.name for r in found if r.note.startswith("refused"))
    where = f"`{family.layers}.*.{family.attention}`"
    return f"| `{name}` | {where} | {family.note} | {exact:.1e} | {teacher:.1e} | {refused} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    write, failed = parser.parse_args().write, []
    torch.set_num_threads(1)
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for name in supported():
        found = check(
            tiny_student(name), against=tiny_teacher(name), only=[law for law in LAWS if law != "clean process"]
        )
        failed += [f"{name}: {r.name}: {r.difference} {r.note}" for r in found if r.failed]
        lines.append(row(name, found))
        print(lines[-1], flush=True)
    if failed:
        sys.exit("\n".join(failed))
    if write:
        PAGE.write_text(TABLE.sub(lambda _: "\n".join(lines) + "\n\n", PAGE.read_text("utf-8"), count=1), "utf-8")


if __name__ == "__main__":
    main()
