"""The nodes. ComfyUI asks `comfy_entrypoint` for them."""

from comfy_api.latest import ComfyExtension, io

from . import registration, routes
from .compare import AMEDCompare
from .demo_model import AMEDDemoModel
from .learning import AMEDLearn
from .pictures_model import AMEDDemoCheckpoint
from .predictor_files import AMEDLoadPredictor, AMEDMergePredictors, AMEDSavePredictor
from .sampler import AMEDApplyPredictor, AMEDSampler, AMEDScheduler
from .training import AMEDTrainPaperPredictor, AMEDTrainPredictor
from .two_models import AMEDTwoModelsGuider
from .values import warn

NODES: tuple[type[io.ComfyNode], ...] = (
    AMEDDemoCheckpoint,
    AMEDDemoModel,
    AMEDTrainPredictor,
    AMEDTrainPaperPredictor,
    AMEDSavePredictor,
    AMEDLoadPredictor,
    AMEDMergePredictors,
    AMEDLearn,
    AMEDCompare,
    AMEDApplyPredictor,
    AMEDSampler,
    AMEDScheduler,
    AMEDTwoModelsGuider,
)


class AMEDExtension(ComfyExtension):
    """Names the nodes to ComfyUI."""

    def __init__(self, nodes: list[type[io.ComfyNode]]) -> None:
        self.nodes = nodes

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return self.nodes


async def comfy_entrypoint() -> AMEDExtension:
    """Make ourselves known. What joins ComfyUI's lists comes last, after all that can fail.

    What cannot be there is left out, and the log says why.
    """
    missing = [*registration.add_folder(), *routes.register()]
    usable = []
    for node in NODES:
        try:
            node.GET_SCHEMA()
        except Exception as error:  # of what a schema asks, as which files there are
            missing.append(f"The node {node.__name__} is missing ({error!r}).")
        else:
            usable.append(node)
    warn([*missing, *registration.add_names()])
    return AMEDExtension(usable)
