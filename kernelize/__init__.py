"""kernelize: turn a pretrained Hugging Face decoder into one with linear-time, constant-state attention.

The public API, loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert, load
    from .evaluate import evaluate
    from .hub import push
    from .plan import ConversionPlan
    from .recipe import Recipe, Stage
    from .runtime.spec import KernelSpec
    from .train import finetune

__version__ = "0.1.0"

__all__ = [
    "ConversionPlan",
    "KernelSpec",
    "Recipe",
    "Stage",
    "__version__",
    "convert",
    "evaluate",
    "finetune",
    "load",
    "push",
]

_HOMES = {
    "ConversionPlan": "plan",
    "KernelSpec": "runtime.spec",
    "Recipe": "recipe",
    "Stage": "recipe",
    "convert": "convert",
    "evaluate": "evaluate",
    "finetune": "train",
    "load": "convert",
    "push": "hub",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kernelize' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """`convert` and `evaluate` name a function and its module: the attribute is the function, in any import order."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
