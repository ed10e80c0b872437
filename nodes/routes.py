"""What the browser asks this pack: what a predictor file is for, before anything runs."""

import sys
from typing import Any

from ..amed_core.contents import PredictorFileError
from .predictor_files import loaded
from .values import briefly, describe

ADDRESS = "/amed/predictor"


def register() -> list[str]:
    """Add our route to ComfyUI's server, if there is one; what is missing then and why, as sentences."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return []
    try:
        _add(server.routes)
    except Exception as error:  # a server of another kind, or none that answers
        return [f"The browser does not show what predictor files are for, since the server takes no route ({error!r})."]
    return []


def _add(routes: Any) -> None:
    """Add it once: aiohttp starts no server that has a route twice, as of a pack that lies in two folders."""
    from aiohttp import web  # noqa: PLC0415 - ComfyUI as a library needs none

    if any(getattr(route, "path", None) == ADDRESS for route in routes):
        return

    @routes.get(ADDRESS)
    async def predictor(request: Any) -> Any:
        return web.json_response(about(request.query.get("name", "")))


def about(name: str) -> dict[str, str]:
    """What a file that "AMED Load Predictor" lists is for, briefly, and in full; or why it cannot be used."""
    try:
        found = loaded(name)
    except (PredictorFileError, ValueError, OSError) as error:
        return {"brief": "cannot be read", "full": str(error)[:300]}
    return {"brief": briefly(found), "full": describe(found)}
