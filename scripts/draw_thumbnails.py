"""Draw the cards of the example workflows: `example_workflows/*.jpg`, from the bundled text-to-picture model.

    python scripts/draw_thumbnails.py

Each is a square of pictures with a few bold words, to be read at 230 pixels. Those of models that are not here show
drawings of the bundled one beside the model's name.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import sample
from amed_core.fit.teacher import heun_samples
from amed_core.pictures import SHAPE, SIGMA_MAX, SIGMA_MIN, PicturesDenoiser
from amed_core.predictor import load_predictors

PACK = Path(__file__).parents[1]
WORKFLOWS, PREDICTOR = PACK / "example_workflows", PACK / "predictors" / "pictures_amed_multistep.safetensors"
SIDE, CFG, CALLS = 512, 3.0, 80
DARK, LIGHT, BLUE, GREEN = "#171a21", "#ffffff", "#3f789e", "#2f9e5f"
