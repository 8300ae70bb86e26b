"""serve: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Device, DType, Json
from .output import say, write_json


def serve(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A kernelized checkpoint: Hub id or folder.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    device: Device = None,
    dtype: DType = None,
    json: Json = None,
) -> None:
    """Serve a converted model as OpenAI's API does, until Ctrl-C.

    It is `transformers serve`, for one model. Needs: pip install kernelize[serve]
    """
    from kernelize.pipeline import check_address, serve_source

    check_address(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    write_json(json, {"url": url, "model": source})
    say(f"loading {source}, to be served at {url}")
    serve_source(source, host=host, port=port, device=device, dtype=dtype)
