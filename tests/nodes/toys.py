"""What the tests do with toy models: predictors with random weights, sampling, and a look inside a model call."""

from types import SimpleNamespace
from typing import Any

import torch
from families import SPECS, UNETS, Family, joined
from stock import stock

from amed_core import AMEDPredictor, evaluate


def predictor(pack: Any, family: Family, name: str = "amed", calls: int = 5, seed: int = 1, **changes: Any) -> Any:
    """An untrained predictor with the settings that training would have given it."""
    kind = type(family.model.model.model_config).__name__
    unet = kind in {SPECS[unet].kind for unet in UNETS}
    model = pack.nodes.timesteps.with_interpolated_timesteps(family.model)
    changes.setdefault("features", "bottleneck" if unet else "latent")
    config = pack.nodes.training.student_config(model, name, calls, **changes)
    return pack.nodes.values.Predictor(AMEDPredictor(config, torch.Generator().manual_seed(seed)))


def apply(pack: Any, family: Family, made: Any, model: Any = None) -> Any:
    """The MODEL with its predictor."""
    (applied,) = pack.nodes.AMEDApplyPredictor.execute(model or family.model, made).args
    return applied


def streams(latent: Any) -> list[torch.Tensor]:
    """Those that a latent consists of, which is one but for video with audio and its like."""
    return latent.unbind() if latent.is_nested else [latent]


def flat(latent: Any) -> torch.Tensor:
    """A latent as ComfyUI's samplers see it: several streams are packed into one."""
    parts = streams(latent)
    return parts[0] if len(parts) == 1 else torch.cat([part.reshape(len(part), 1, -1) for part in parts], dim=-1)


def image(family: Family, seed: int = 7) -> Any:
    """Something to start from that is not empty."""
    generator = torch.Generator().manual_seed(seed)
    return joined([torch.randn(part.shape, generator=generator) for part in streams(family.latent["samples"])])


def k_sample(
    family: Family, model: Any, steps: int, cfg: float, sampler: str = "amed", scheduler: str = "amed", **more: Any
) -> torch.Tensor:
    """What KSampler does with seed 3."""
    import comfy.sample  # noqa: PLC0415

    latent = more.pop("latent", family.latent["samples"])
    positive, negative = more.pop("positive", family.positive), more.pop("negative", family.negative)
    noise = comfy.sample.prepare_noise(latent, 3)
    with torch.inference_mode():
        drawn = comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            latent,
            seed=3,
            disable_pbar=True,
            **more,
        )
    return flat(drawn)


def guided(family: Family, model: Any = None, cfg: float = 3.0, positive: Any = None, negative: Any = None) -> Any:
    """An ordinary guider."""
    import comfy.samplers  # noqa: PLC0415

    guider = comfy.samplers.CFGGuider(model or family.model)
    guider.set_conds(positive or family.positive, negative or family.negative)
    guider.set_cfg(cfg)
    return guider


def dual_cfg(family: Family, other: Any, model: Any = None, **changes: Any) -> Any:
    """The guider of two positive prompts, with scales of its own for each."""
    prompts = {"cond1": family.positive, "cond2": other, "negative": family.negative}
    settings = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0} | changes
    return stock("DualCFGGuider", model=model or family.model, **prompts, **settings)[0]


def inside(guider: Any, family: Family, work: Any, sigmas: tuple[float, ...] = (0.7, 0.0), **more: Any) -> Any:
    """The result of `work(model, x, sigmas, extra_args)`, run where ComfyUI runs a sampler; x is noise of seed 3.

    Tensors among it come back from the GPU, if that is where it ran.
    """
    import comfy.sample  # noqa: PLC0415
    import comfy.samplers  # noqa: PLC0415

    result = []

    class Work(comfy.samplers.Sampler):
        def sample(self, model: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, *_: Any) -> Any:
            result.append(work(model, noise, sigmas, extra_args))
            return noise

    latent = family.latent["samples"]
    noise = comfy.sample.prepare_noise(latent, 3)
    with torch.inference_mode():
        guider.sample(noise, latent, Work(), torch.tensor(sigmas), disable_pbar=True, seed=3, **more)
    return on_host(result[0])


def on_host(result: Any) -> Any:
    """The same, with tensors in it on the CPU."""
    if isinstance(result, torch.Tensor):
        return result.cpu()
    return type(result)(on_host(part) for part in result) if type(result) in (tuple, list) else result


def seen(pack: Any, guider: Any, family: Family, kind: str = "bottleneck") -> torch.Tensor:
    """The features that a predictor sees in one call through this guider."""
    bridge = pack.nodes.bridge

    def look(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> torch.Tensor:
        denoiser = bridge.ComfyDenoiser(model, extra_args, sigmas.tolist(), bottleneck=kind == "bottleneck")
        start = evaluate(denoiser, x * sigmas[0], sigmas[0])
        features: torch.Tensor = bridge.look(SimpleNamespace(features=kind), model)(start)
        return features

    features: torch.Tensor = inside(guider, family, look)
    return features


def train(pack: Any, family: Any, model: Any = None, **changes: Any) -> Any:
    """The training node's outputs, with its inputs as ComfyUI's executor hands them on; `positives` are several."""
    settings: dict[str, Any] = {"seed": 0, "cfg": 3.0, "steps": 5, "sampler_name": "amed", "preset": "recommended"}
    settings |= {
        "trajectories": 2,
        "batch_size": min(2, family.latent["samples"].shape[0]),
        "learning_rate": 0.005,
        "scheduler": "auto",
        "rho": 0.0,
    }
    settings |= {"scale_dir": -1.0, "scale_time": -1.0, "teacher": "auto", "teacher_points": 0}
    settings |= {"held_out": 2, "teacher_calls": 4, "positives": [family.positive]} | changes
    positives = settings.pop("positives")
    shared = {"model": model or family.model, "negative": family.negative, "latent_image": family.latent}
    listed = {name: [value] for name, value in (shared | settings).items()}
    with torch.inference_mode():  # as ComfyUI's executor runs nodes
        return pack.nodes.AMEDTrainPredictor.execute(positive=positives, **listed).args
