"""What the browser asks this pack: what a predictor file is for, before anything runs."""

import sys
from typing import Any

from ..amed_core.files import PredictorFileError
from .predictor_files import loaded
from .values import describe


def register() -> None:
    """Add our route to ComfyUI's server, if there is one."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web  # noqa: PLC0415 - ComfyUI as a library needs none

    @server.routes.get("/amed/predictor")
    async def predictor(request: Any) -> Any:
        return web.json_response({"text": about(request.query.get("name", ""))})


def about(name: str) -> str:
    """How to use a file that "AMED Load Predictor" lists, in a few words; or why it cannot be used."""
    try:
        return describe(loaded(name))
    except (PredictorFileError, ValueError, OSError) as error:
        return str(error)[:300]
