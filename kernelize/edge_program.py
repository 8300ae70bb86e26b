"""Runs what `kernelize export --to executorch` wrote, by ExecuTorch's Python runtime; that one needs torch.

    model = ProgramModel("exported")

is an `EdgeModel` in all but its runtime and its rows, of which a program has one. On a device the program runs under
ExecuTorch's C++, Java or Swift runtime, by the rule of docs/edge.md.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from .edge import METADATA, PROGRAM_FORMAT, EdgeModel, State
from .errors import InputError, first_line

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool  # it has no other name in 1.5
    from executorch.runtime import Runtime


class ProgramModel(EdgeModel):
    """An exported folder with a .pte, ready to run. InputError as EdgeModel has it.

    `threads` are those of all programs of this process; 0 leaves them as they are.
    """

    FORMAT = PROGRAM_FORMAT

    def _load(self, threads: int) -> None:
        if threads:
            _unsafe_reset_threadpool(threads)
        path = self.folder / self.facts["program"]
        try:
            program = Runtime.get().load_program(path)
            self.methods = {name: program.load_method(name) for name in self.facts["graphs"]}
        except (RuntimeError, KeyError) as error:
            raise InputError(f"{str(path)!r} is no program that ExecuTorch loads: {first_line(error)}") from error
        for name, graph in self.facts["graphs"].items():
            meta = self.methods[name].metadata
            if (meta.num_inputs(), meta.num_outputs()) != (len(graph["inputs"]), len(graph["outputs"])):
                raise InputError(f"{str(path)!r} is not the program that {METADATA} describes: {name} differs")

    def blank(self, rows: int) -> dict[str, np.ndarray]:
        if rows != 1:
            raise InputError(f"rows={rows}: an ExecuTorch program has one row")
        return super().blank(rows)

    def _advance(self, state: State, chunk: np.ndarray, count: np.ndarray) -> None:
        if self._block_begins(state.seen):
            self._run(state, "leave", {})
        name = "step" if chunk.shape[1] == 1 else "chunk"
        ids = np.zeros((1, 1 if name == "step" else self.facts["max_tokens"]), np.int64)
        ids[:, : chunk.shape[1]] = chunk
        self._run(state, name, {"ids": ids, "count": count})

    def _run(self, state: State, name: str, given: dict[str, Any]) -> None:
        """Runs a method on the state, and takes over what it gives."""
        graph, arrays = self.facts["graphs"][name], state.arrays | given
        results = self.methods[name].execute([torch.from_numpy(arrays[entry]) for entry in graph["inputs"]])
        for entry, result in zip(graph["outputs"], results, strict=True):
            target = state.logits if entry == "logits" else state.arrays[entry.removeprefix("new.")]
            target[:] = result.numpy()
