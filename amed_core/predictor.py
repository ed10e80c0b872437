"""Which predictor a config stands for, and one of several guidance scales."""

from collections.abc import Sequence

import torch

from .config import PredictorConfig
from .midpoints import MidpointTable
from .multistep import MultistepTable
from .network import AMEDPredictor

Predictor = AMEDPredictor | MidpointTable | MultistepTable


def build(config: PredictorConfig, generator: torch.Generator | None = None) -> Predictor:
    """The predictor of these settings, not trained; the generator draws a network's weights."""
    if config.kind == "multistep":
        return MultistepTable(config)
    return MidpointTable(config) if config.kind == "table" else AMEDPredictor(config, generator)


@torch.no_grad()
def stacked(config: PredictorConfig, tables: Sequence[Predictor]) -> Predictor:
    """One table for all of `config.guidances` from a table for each, on the same grid."""
    made = build(config)
    parts = [dict(table.named_parameters()) for table in tables]
    for name, values in made.named_parameters():
        values.copy_(torch.stack([part[name] for part in parts]))
    return made
