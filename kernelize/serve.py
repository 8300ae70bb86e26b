"""`transformers serve`, the OpenAI-compatible server of Transformers, for a converted checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, server, utils
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

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
    listen_closely()
    where = str(Path(source).resolve()) if Path(source).is_dir() else source
    Serve(where, continuous_batching=False, device=device or "auto", dtype=dtype or "auto", host=host, port=port)


def announce(model_type: str) -> None:
    """Shows the server the class of a converted model.

    It looks an architecture up by its name among the attributes of `transformers`, where no remote code is; and the
    module that it holds need not be the one that an import gives now, since Transformers imports itself twice.
    """
    kind = model_class(model_type.removeprefix(PREFIX))
    setattr(model_manager.transformers, kind.__name__, kind)


# --- what the server would leave out --------------------------------------------------------------------------------

NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that the server reads over, and the values that ask for nothing
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "presence_penalty": (0,),
    "response_format": ({"type": "text"},), "tool_choice": ("auto", "none"), "functions": ([],),
}  # fmt: skip
RANGES = {"temperature": (0, 2), "top_p": (0, 1)}
NEEDED = {ChatCompletionHandler: "messages", CompletionHandler: "prompt"}
COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def listen_closely() -> None:
    """Makes the server refuse what it would ignore or fail at, and sample where a request gives a temperature.

    It takes a temperature, but sets nothing that makes it count: a model whose own settings are greedy stays greedy.
    """
    base: Any = utils.BaseHandler
    if base._validate_request is not _validate:
        base._validate_request, base._build_generation_config = _validate, _settings
        server.build_server = _server


_usual_check: Callable[..., None] = utils.BaseHandler._validate_request
_usual_settings: Callable[..., Any] = utils.BaseHandler._build_generation_config
_usual_server: Callable[..., Any] = server.build_server


def _server(*args: Any, **options: Any) -> Any:
    """The usual server, whose refusals have OpenAI's form, too: the official client shows no other's reason."""
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def refuse(_: Any, error: Any) -> Any:
        said = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"detail": error.detail, "error": said}, status_code=error.status_code)

    app = _usual_server(*args, **options)
    app.add_exception_handler(HTTPException, refuse)
    return app


def _validate(handler: Any, body: dict[str, Any]) -> None:
    from fastapi import HTTPException

    _usual_check(handler, body)
    if said := problem(body, NEEDED.get(type(handler))):
        raise HTTPException(status_code=400, detail=said)


def _settings(handler: Any, body: dict[str, Any], *args: Any, **options: Any) -> Any:
    settings = _usual_settings(handler, body, *args, **options)
    if body.get("temperature"):
        settings.do_sample = True
    return settings


def problem(body: dict[str, Any], needed: str | None = None) -> str | None:
    """What is wrong with a request, or what of it would be left out; None if it can be answered as it is. `needed`
    is the field that holds what is to be answered."""
    given = {name: value for name, value in body.items() if value is not None}
    if needed and not given.get(needed):
        return f"{needed} is empty"
    if needed == "messages" and not _are_messages(given[needed]):
        return f"messages={given[needed]!r} is not a list of objects with a role"
    for name in COUNTS:
        if name in given and (not _is_number(given[name], int) or given[name] < 1):
            return f"{name}={given[name]!r} is not a whole number of at least 1"
    for name, (low, high) in RANGES.items():
        if name in given and not (_is_number(given[name], int, float) and low <= given[name] <= high):
            return f"{name}={given[name]!r} is not a number from {low} to {high}"
    ignored = (name for name, neutral in NEUTRAL.items() if name in given and given[name] not in neutral)
    return next((f"{name}={given[name]!r} is not supported here; leave it out" for name in ignored), None)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) and "role" in part for part in value)


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
