"""What the two training nodes ask for, and what they hand out."""

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..amed_core.features import LOOKS
from ..amed_core.fit.call_derivative import GRADIENTS
from ..amed_core.fit.efforts import EFFORTS
from ..amed_core.fit.teacher import TEACHERS
from ..amed_core.samplers import NAMES, TYPES
from ..amed_core.schedules import SCHEDULES, SEARCHED
from .saving import AUTOMATIC
from .states import NEVER, WHILE_UNFINISHED
from .values import SCHEDULER, LossMap, PredictorSocket

AUTO = "auto"  # the preset's choice
RECOMMENDED, PAPER = "recommended", "paper"
NETWORK, TABLE = "network", "table"
FINITE = "finite difference"
FROM_NOISE, FROM_IMAGES = "noise", "noise and images"
CONVERGED, RECIPE = "converged", "my recipe"
# What benchmarks/sizes.json says.
OTHER_SIZES = (
    "at other sizes, up to 3 times the height and width or the frames, its error was 1.1 times that of a fit made "
    "there in the median of 21 cases, and 2.0 times in the worst"
)
# Inputs that are folded away, where the browser can.
FITTED = ("batch_size", "held_out", "teacher_calls")
ADVANCED = ("trajectories", "passes", *FITTED, "teacher_sampler", "teacher_scheduler", "teacher_steps", "keep_state")
PAPER_ADVANCED = (
    *FITTED,
    *("scheduler", "rho", "scale_dir", "scale_time", "features", "teacher", "teacher_points"),
    *("learning_rate", "epochs", "gradient", "keep_state"),
)


def defaults(inputs: list[Any]) -> dict[str, Any]:
    """The values of a node's inputs that nobody touched, by name; None for sockets."""
    return {one.id: getattr(one, "default", None) for one in inputs}


def predictor_inputs() -> list[Any]:
    """What "AMED Train Predictor" asks for."""
    return [*_subject(_steps()), *_effort(), *_amount(), *_optional(), *_teacher(), _passes(), *_kept()]


def paper_inputs() -> list[Any]:
    """What "AMED Train Paper Predictor" asks for."""
    return [*_subject(_calls()), *_student(), *_amount(), *_recipe(), *_of_networks(), *_optional(), *_kept()]


def outputs() -> list[Any]:
    """What both nodes hand out."""
    return [
        PredictorSocket.Output(
            display_name="predictor", tooltip='Save it with "AMED Save Predictor", or use it at once.'
        ),
        LossMap.Output(
            display_name="loss",
            tooltip="For Plot Loss Graph: the error of the finished picture per iteration; of a network, the squared "
            "distance to the teacher per batch.",
        ),
        io.String.Output(
            display_name="report",
            tooltip="What was gained, what it cost, and error and plan of every step. For Preview Any.",
        ),
        io.Image.Output(display_name="plot", tooltip="The same as a picture, for Preview Image."),
    ]


def _kept() -> list[Any]:
    """What is written to the disk."""
    return [
        io.String.Input(
            "save_as",
            default=AUTOMATIC,
            optional=True,
            tooltip="What the finished predictor is saved as in models/amed_predictors, where KSampler with the "
            'sampler "amed" finds it by itself. "auto" is a name that says model, steps and cfg; empty saves nothing.',
        ),
        io.Combo.Input(
            "keep_state",
            options=[WHILE_UNFINISHED, NEVER],
            default=WHILE_UNFINISHED,
            optional=True,
            tooltip=f'"{WHILE_UNFINISHED}" keeps in user/amed_training what lets a stopped training go on, until it '
            f'has finished. That holds pictures of your prompts as latents. "{NEVER}" writes nothing but the finished '
            "predictor; a training that was stopped begins anew.",
        ),
    ]


def _steps() -> Any:
    return io.String.Input(
        "steps",
        default="5",
        tooltip="Model calls per picture: a number, as 5, or all of a range, as 3-10, which share one slow sampler and "
        "go into one predictor. Choose any of them in KSampler.",
    )


def _calls() -> Any:
    return io.Int.Input(
        "steps",
        default=5,
        min=2,
        max=100,
        tooltip="Model calls per picture, 2 to 10 being useful. Choose the same number in the sampler.",
    )


def _effort() -> list[Any]:
    """How much it may cost, and for which starts."""
    return [
        io.Combo.Input(
            "effort",
            options=list(EFFORTS),
            default="standard",
            tooltip="Of each number of steps: quick takes at most 250 sample calls, standard 2,500, thorough 40,000. "
            "The node says how long that is on this machine. quick suits large models and first tries.",
        ),
        io.Float.Input(
            "budget",
            default=0.0,
            min=0.0,
            max=100_000.0,
            step=1.0,
            round=0.1,
            tooltip="Minutes after which training stops and hands over the best so far. 0: no limit.",
        ),
        io.Combo.Input(
            "starts",
            options=[FROM_NOISE, FROM_IMAGES],
            default=FROM_NOISE,
            tooltip=f'"{FROM_IMAGES}" adds predictors for image to image, denoise 0.3 to 0.8, at all these steps. It '
            "takes about a third more.",
        ),
    ]


def _teacher() -> list[Any]:
    """Which pictures are the goal."""
    return [
        io.Combo.Input(
            "teacher",
            options=[CONVERGED, RECIPE],
            default=CONVERGED,
            optional=True,
            tooltip='"converged" is what the model itself says, as by very many steps. "my recipe" are the pictures of '
            "the sampler, scheduler and steps below, reproduced in fewer: right for distilled models (turbo, "
            "lightning, klein), and where you like a recipe of yours.",
        ),
        io.Combo.Input(
            "teacher_sampler",
            options=[name for name in comfy.samplers.SAMPLER_NAMES if name not in NAMES],
            default="dpmpp_2m",
            optional=True,
            tooltip='Of "my recipe": any sampler that adds no noise of its own.',
        ),
        io.Combo.Input(
            "teacher_scheduler",
            options=[name for name in comfy.samplers.SCHEDULER_NAMES if name != SCHEDULER],
            default="karras",
            optional=True,
            tooltip='Of "my recipe".',
        ),
        io.Int.Input(
            "teacher_steps", default=20, min=3, max=200, optional=True, tooltip='Of "my recipe": its number of steps.'
        ),
    ]


def _passes() -> Any:
    return io.Int.Input(
        "passes",
        default=0,
        min=0,
        max=200,
        optional=True,
        tooltip="With cfg above 1 a step is two passes of the network: prompt and negative. A number of passes, "
        "as 10, makes the predictor choose: half as many steps that ask both, or more steps of which some ask the "
        "prompt alone, if that is more than 3 % nearer on noise that it never saw. Training takes about twice as long. "
        "0: every step of steps asks both.",
    )


def _subject(steps: Any) -> list[Any]:
    """What is trained on, and for which use."""
    return [
        io.Model.Input("model", tooltip="The model to sample faster, with its LoRAs and shift."),
        io.Conditioning.Input("positive", tooltip="A prompt that is typical of what you will ask for."),
        io.Conditioning.Input("negative", tooltip="The negative prompt that you will use."),
        io.Latent.Input(
            "latent_image",
            tooltip="An empty latent of the size you will sample; its content is not used. A smaller one, or one of "
            f"fewer frames, makes every call cheaper, and the file serves other sizes, too: {OTHER_SIZES}.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Of the training noise and the first weights. The same seed gives the same predictor.",
        ),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="The cfg you will sample with. A predictor is good near the cfg it was trained at.",
        ),
        steps,
    ]


def _student() -> list[Any]:
    """Which of the paper's students."""
    return [
        io.Combo.Input(
            "sampler_name",
            options=list(TYPES),
            default="amed",
            tooltip='The sampler to make. "amed" is AMED-Solver; the others are the paper\'s plugins for other '
            "solvers. Odd numbers of steps suit them all.",
        ),
        io.Combo.Input(
            "predictor_type",
            options=[NETWORK, TABLE],
            default=NETWORK,
            tooltip='"network" is the paper\'s. It plans each picture by what it sees of it. "table" has constants for '
            "every step, fitted to the finished picture: a tenth of the time, and it measured better. Tables alone use "
            "cfg_max; networks alone use features, teacher, teacher_points, learning_rate, epochs and gradient.",
        ),
        io.Combo.Input(
            "preset",
            options=[RECOMMENDED, PAPER],
            default=RECOMMENDED,
            tooltip='"recommended" is what measured best; "paper" is AMED as published. Every option below that is not '
            "at auto changes it.",
        ),
    ]


def _amount() -> list[Any]:
    """How much is learned from."""
    return [
        io.Int.Input(
            "trajectories",
            default=0,
            min=0,
            max=1_000_000,
            tooltip="How many noises to learn from. 0 is auto: as many as usual. More is better and slower.",
        ),
    ]


def _recipe() -> list[Any]:
    """What the preset decides, unless it is set here."""
    return [
        io.Combo.Input(
            "scheduler",
            options=[AUTO, *SCHEDULES, SEARCHED],
            default=AUTO,
            optional=True,
            tooltip='The grid between whose points the predictor plans. "auto" is the preset\'s. "polynomial" with '
            'rho 7 is Karras, "logsnr" is exponential. "discrete" is uniform in timesteps and the choice for flow '
            'models. "searched" is found on this model, by dynamic programming along a slow run.',
        ),
        io.Float.Input(
            "rho",
            default=0.0,
            min=0.0,
            max=20.0,
            step=0.1,
            optional=True,
            tooltip='Bends the grid toward small noise levels. 0 is auto: the usual one of the schedule. "logsnr" and '
            '"searched" have none.',
        ),
        io.Float.Input(
            "scale_dir",
            default=-1.0,
            min=-1.0,
            max=0.5,
            step=0.01,
            optional=True,
            tooltip="How far from 1 a step may be stretched; the paper uses 0.01. 0 turns it off, below 0 is auto.",
        ),
        io.Float.Input(
            "scale_time",
            default=-1.0,
            min=-1.0,
            max=0.5,
            step=0.01,
            optional=True,
            tooltip="How far from 1 the noise level told to the model may be scaled at midpoints. The paper uses 0 or "
            "0.2. 0 turns it off, below 0 is auto.",
        ),
    ]


def _of_networks() -> list[Any]:
    """What the paper's network is trained with; tables have no use for it."""
    return [
        io.Combo.Input(
            "features",
            options=[AUTO, *LOOKS],
            default=AUTO,
            optional=True,
            tooltip='What a network looks at before each step. "bottleneck" is the paper\'s: the middle of a U-Net '
            '(SD1.5, SD2, SDXL). "latent" is the picture so far, and works with every model. "none" gives all pictures '
            'the same plan. "auto" takes the bottleneck where there is one.',
        ),
        io.Combo.Input(
            "teacher",
            options=[AUTO, *TEACHERS],
            default=AUTO,
            optional=True,
            tooltip='The slow sampler that a network imitates. "auto" takes the sampler\'s own family, which is best.',
        ),
        io.Int.Input(
            "teacher_points",
            default=0,
            min=0,
            max=100,
            optional=True,
            tooltip="Grid points that a network's teacher adds in every interval: more is more exact and slower. 0 is "
            "the paper's choice (1 or 2).",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.005,
            min=0.00001,
            max=1.0,
            step=0.00001,
            round=False,
            optional=True,
            tooltip="Of a network's training by Adam; the paper's 0.005 suits most models. Lower it if the loss jumps.",
        ),
        io.Int.Input(
            "epochs",
            default=1,
            min=1,
            max=10_000,
            optional=True,
            tooltip="How often a network sees the same noises; the teacher sees them once.",
        ),
        io.Combo.Input(
            "gradient",
            options=list(GRADIENTS),
            default=FINITE,
            optional=True,
            tooltip='How the model is differentiated for a network. "finite difference" works with every model in the '
            'memory of sampling. "reverse" is autograd: it keeps all activations, several times the memory. It checks '
            "itself against the former, and gives way where it fails.",
        ),
    ]


def _optional() -> list[Any]:
    """What both nodes can do without."""
    return [
        io.Int.Input(
            "batch_size",
            default=0,
            min=0,
            max=4096,
            optional=True,
            tooltip="Noises per model call, at most; 0 is auto. If memory runs out it is halved by itself.",
        ),
        io.Float.Input(
            "cfg_max",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            optional=True,
            tooltip="Above cfg, the predictor is made for the whole range from cfg to this, by a fit at both ends and "
            "one between: three times the work. 0: cfg alone.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="Encodes the prompts below, to train on many. Without it, positive is all.",
        ),
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            optional=True,
            tooltip="More positive prompts, one per line, or a .txt file of the input folder by its name. From 4 "
            "prompts on, every fourth is kept to judge by. Needs clip.",
        ),
        io.Int.Input(
            "held_out",
            default=0,
            min=0,
            max=100_000,
            optional=True,
            tooltip="Noises that are never trained on. They choose the best predictor, and tell what it gains. 0 is "
            "auto.",
        ),
        io.Guider.Input(
            "guider",
            optional=True,
            tooltip='The guider that you will sample with, if it is another than CFGGuider: for two models ("AMED Two '
            'Models Guider", DualModelGuider), or more than two prompts. It takes the place of model, positive, '
            "negative and cfg.",
        ),
        io.Int.Input(
            "teacher_calls",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Model calls of the slow sampler whose finished pictures are the goal, or judge a network. 0 is "
            "auto: as many as usual.",
        ),
    ]
