"""`transformers serve`, the OpenAI-compatible server of Transformers, for a converted checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from .convert import load_config
from .errors import InputError
from .runtime.modeling import PREFIX, model_class


def serve(
    source: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Serves the converted `source` until it is interrupted.

    Continuous batching stays off: it pages keys and values, and a kernelized layer has none. InputError for a model
    that is not converted.
    """
    config = load_config(source)
    if not config.model_type.startswith(PREFIX):
        raise InputError(f"{source!r} is no kernelized checkpoint; `transformers serve` serves a {config.model_type}")
    announce(config.model_type)
    where = str(Path(source).resolve()) if Path(source).is_dir() else source
    Serve(where, continuous_batching=False, device=device or "auto", dtype=dtype or "auto", host=host, port=port)


def announce(model_type: str) -> None:
    """Shows the server the class of a converted model.

    It looks an architecture up by its name among the attributes of `transformers`, where no remote code is; and the
    module that it holds need not be the one that an import gives now, since Transformers imports itself twice.
    """
    kind = model_class(model_type.removeprefix(PREFIX))
    setattr(model_manager.transformers, kind.__name__, kind)
