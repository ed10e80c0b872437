"""Where predictor files lie."""

from pathlib import Path

FOLDER = "amed_predictors"  # of the models folder
UNFINISHED = "unfinished"  # its folder of what a stopped fit leaves
SHIPPED = Path(__file__).parents[1] / "predictors"
