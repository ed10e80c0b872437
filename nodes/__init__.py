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

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


async def comfy_entrypoint() -> AMEDExtension:
    registration.register()
    routes.register()
    return AMEDExtension()
