"""The repository root goes last on the path: first, our `nodes` folder would hide ComfyUI's nodes.py."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
torch.set_num_threads(1)
