"""What the browser asks this pack: what a predictor file is for, before anything runs."""

import sys
from typing import Any

from ..amed_core.files import PredictorFileError
from .predictor_files import loaded
from .values import briefly, describe


def register() -> None:
    """Add our route to ComfyUI's server, if there is one."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web  # noqa: PLC0415 - ComfyUI as a library needs none

    @server.routes.get("/amed/predictor")
    async def predictor(request: Any) -> Any:
        return web.json_response(about(request.query.get("name", "")))


def about(name: str) -> dict[str, str]:
    """What a file that "AMED Load Predictor" lists is for, briefly, and in full; or why it cannot be used."""
    try:
        found = loaded(name)
    except (PredictorFileError, ValueError, OSError) as error:
        return {"brief": "cannot be read", "full": str(error)[:300]}
    return {"brief": briefly(found), "full": describe(found)}
