"""What the tests do with toy models: predictors with random weights, sampling, and a look inside a model call."""

from types import SimpleNamespace
from typing import Any

import pytest
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
    config = pack.amed_core.student_config(name, calls, pack.nodes.pairing.model_facts(model), **changes)
    return pack.nodes.values.NotedPredictor(AMEDPredictor(config, torch.Generator().manual_seed(seed)))


def apply(pack: Any, family: Family, made: Any, model: Any = None) -> Any:
    """The MODEL with its predictor."""
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(model or family.model, made).args
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


def train(pack: Any, family: Any, model: Any = None, *, paper: bool = False, **changes: Any) -> Any:
    """A training node's outputs, with its inputs as ComfyUI's executor hands them on; `positives` are several.

    It is "AMED Train Paper Predictor" or "AMED Train Predictor". What is not given is as in an untouched node.
    """
    few = {"trajectories": 2, "batch_size": min(2, family.latent["samples"].shape[0]), "held_out": 2}
    usual: dict[str, Any] = few | {"cfg": 3.0, "teacher_calls": 4, "positives": [family.positive], "save_as": ""}
    settings = usual | changes
    positives = settings.pop("positives")
    shared = {"model": model or family.model, "negative": family.negative, "latent_image": family.latent}
    listed = {name: [value] for name, value in (shared | settings).items()}
    node = pack.nodes.AMEDTrainPaperPredictor if paper else pack.nodes.AMEDTrainPredictor
    with torch.inference_mode():  # as ComfyUI's executor runs nodes
        return node.execute(positive=positives, **listed).args


def stopped_at(family: Family, call: int) -> Any:
    """The MODEL, but the user presses Cancel during its `call`-th call; and a list that grows with every call."""
    import comfy.model_management as mm  # noqa: PLC0415

    made: list[int] = []

    def hear(parameters: Any) -> None:
        made.append(1)
        if len(made) == call:
            mm.interrupt_current_processing()

    return heard(family.model, hear), made


def heard(model: Any, hear: Any) -> Any:
    """A clone of a MODEL that tells `hear` what it is asked, before it answers."""
    clone = model.clone()

    def wrapper(apply_model: Any, parameters: Any) -> torch.Tensor:
        hear(parameters)
        answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def everything_of(model: Any) -> Any:
    """All of a MODEL that training could leave changed."""
    modules = list(model.model.modules())
    slots = [(name, t) for m in modules for name, t in (m._parameters | m._buffers).items() if t is not None]
    tensors = [(name, id(t), t.requires_grad) for name, t in slots]
    state = model.model.state_dict().items()
    weights = {name: bytes(value.cpu().flatten().clone().view(torch.uint8).numpy()) for name, value in state}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]
    return weights, tensors, hooks, str(model.model_options), dict(model.object_patches), dict(model.attachments)


def in_inference_mode(family: Family) -> Family:
    """The same, with its weights loaded in inference mode, as ComfyUI's loaders do."""
    with torch.inference_mode():
        for module in family.model.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
    return family


def goes_on(pack: Any, family: Family, user: Any, call: int, **how: Any) -> None:
    """Assert that a training that is cancelled at a call goes on from there, and ends as if it never had been."""
    import comfy.model_management as mm  # noqa: PLC0415

    whole, losses, *_ = train(pack, family, **how)
    assert not list(user.glob("*")), "a finished fit leaves nothing"
    model, made = stopped_at(family, call)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, family, model, **how)
    assert len(made) == call, "it stopped within one call"
    assert len(list(user.glob("*.safetensors"))) == 1
    resumed, again, report, _ = train(pack, family, model, **how)
    assert "before it was stopped" in report
    ours, theirs = whole.predictor.state_dict(), resumed.predictor.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert again["loss"] == losses["loss"]
    assert not list(user.glob("*"))


def survives_little_memory(pack: Any, family: Family, **how: Any) -> None:
    """Assert that training halves its batch on a device with room for 4 rows, which is 2 samples with guidance."""
    made: list[int] = []

    def hear(parameters: Any) -> None:
        made.append(len(parameters["input"]))
        if made[-1] > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    how = {"trajectories": 4, "batch_size": 4, "held_out": 2} | how
    small, large = (train(pack, family, model, **how)[0] for model in (heard(family.model, hear), None))
    first = made.index(8)
    assert made[first : first + 3] == [8, 4, 4]
    assert max(made[first + 1 :]) == 4, "nor does the report try again"
    ours, theirs = small.predictor.state_dict(), large.predictor.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-2)
