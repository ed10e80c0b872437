"""AMED-Solver and AMED-Plugin (Zhou et al., CVPR 2024, arXiv 2312.00094) in plain PyTorch."""

from .config import PredictorConfig
from .driver import (
    FixedMidpoint,
    NoMidpoint,
    advance,
    analytic_first,
    analytic_first_flow,
    evaluate,
    sample,
    trajectory,
)
from .files import load_predictor, save_predictor
from .fit.per_interval import Trainer
from .fit.protocol import TrainConfig, TrainEvent
from .network import AMEDPredictor
from .schedules import SCHEDULES, discrete, logsnr, polynomial, time_uniform
from .solvers import Amed, Dpm2, DpmSolverPP, Ipndm
from .types import Denoiser, Evaluation, Planner, Solver, Stage, Step, StepPlan
from .version import __version__

__all__ = [
    "SCHEDULES",
    "AMEDPredictor",
    "Amed",
    "Denoiser",
    "Dpm2",
    "DpmSolverPP",
    "Evaluation",
    "FixedMidpoint",
    "Ipndm",
    "NoMidpoint",
    "Planner",
    "PredictorConfig",
    "Solver",
    "Stage",
    "Step",
    "StepPlan",
    "TrainConfig",
    "TrainEvent",
    "Trainer",
    "__version__",
    "advance",
    "analytic_first",
    "analytic_first_flow",
    "discrete",
    "evaluate",
    "load_predictor",
    "logsnr",
    "polynomial",
    "sample",
    "save_predictor",
    "time_uniform",
    "trajectory",
]
