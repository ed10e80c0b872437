"""Draw what the bundled text-to-picture model knows: 24 prompts, two seeds each, for `docs/pictures.md`.

    python scripts/draw_pictures.py --output docs/pictures.png

Heun's method in 40 steps at guidance 3. The prompts were fixed before the model was trained.
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.fit.teacher import heun_samples
from amed_core.pictures import SHAPE, SIGMA_MAX, SIGMA_MIN, PicturesDenoiser
from amed_core.tools.plots import sheet
from scripts.train_pictures import PROMPTS

SEEDS, COLUMNS, CALLS = (0, 1), 12, 80


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("pictures.png"))
    parser.add_argument("--cfg", type=float, default=3.0)
    arguments = parser.parse_args()
    model, parts = PicturesDenoiser(arguments.cfg), []
    for begin in range(0, len(PROMPTS), COLUMNS):
        prompts, rows = PROMPTS[begin : begin + COLUMNS], []
        asked = model.for_prompts(prompts)
        for seed in SEEDS:
            x = torch.randn(len(prompts), *SHAPE, generator=torch.Generator().manual_seed(seed))
            drawn = heun_samples(asked, x, SIGMA_MIN, SIGMA_MAX, CALLS, flow=True)
            rows.append((f"seed {seed}", model.images(drawn)))
        parts.append(sheet(prompts, rows))
    whole = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), "white")
    for n, part in enumerate(parts):
        whole.paste(part, (0, sum(above.height for above in parts[:n])))
    whole.save(arguments.output)


if __name__ == "__main__":
    main()
