"""Which predictor a config stands for."""

import torch

from .config import PredictorConfig
from .midpoints import TablePredictor
from .multistep import MultistepTable
from .network import AMEDPredictor

AnyPredictor = AMEDPredictor | TablePredictor | MultistepTable


def build(config: PredictorConfig, generator: torch.Generator | None = None) -> AnyPredictor:
    """The predictor of these settings, not trained; the generator draws a network's weights."""
    if config.kind == "multistep":
        return MultistepTable(config)
    return TablePredictor(config) if config.kind == "table" else AMEDPredictor(config, generator)
