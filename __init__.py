"""ComfyUI-AMED: sampling in about 5 model calls with a predictor distilled from the loaded model."""

try:
    import comfy_api.latest  # noqa: F401
except ImportError:  # imported outside ComfyUI, for amed_core
    pass
else:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"  # its script and its help pages

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
