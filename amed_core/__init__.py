"""AMED-Solver and AMED-Plugin (Zhou et al., CVPR 2024, arXiv 2312.00094) in plain PyTorch.

What is imported here is the public interface.
"""

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
from .fit.make import facts_of, fit_predictor, make_fit, usual_settings
from .fit.protocol import Fit, FitConfig, FitEvent, FitSummary, TrainConfig
from .midpoints import MidpointTable
from .multistep import MultistepTable
from .network import AMEDPredictor
from .predictor import Predictor, build
from .samplers import ModelFacts, student_config
from .schedules import SCHEDULES, discrete, logsnr, polynomial, time_uniform
from .solvers import Amed, Dpm2, DpmSolverPP, Ipndm, Multistep
from .types import Denoiser, Evaluation, Method, Model, Planner, Solver, Stage, Step, StepPlan
from .version import __version__
