"""Every way people sample, with predictors on real ComfyUI models of toy size."""

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import DISCRETE, SPECS, UNETS, Family, control_net, here, make, prompt
from matrix import cell, half
from stock import stock
from toys import apply, dual_cfg, flat, guided, image, inside, k_sample, predictor, seen, streams, train

CFG = 3.0


def custom(
    pack: Any, family: Family, made: Any, guider: Any, sigmas: Any = None, latent: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What SamplerCustomAdvanced gives for seed 3: the sample, and the last denoised one."""
    (sampler,) = pack.nodes.AMEDSampler.execute(made).args
    if sigmas is None:
        (sigmas,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    return advanced(stock("RandomNoise", noise_seed=3)[0], guider, sampler, sigmas, latent or family.latent)


def advanced(noise: Any, guider: Any, sampler: Any, sigmas: Any, latent: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """SamplerCustomAdvanced."""
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    with torch.inference_mode():
        drawn, denoised = stock("SamplerCustomAdvanced", **inputs).args
    return drawn["samples"], denoised["samples"]


@pytest.fixture(scope="module")
def sd15(pack: Any) -> Family:
    del pack
    return make("sd15")


# Sampling nodes


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("student", ["amed", "amed_ipndm", "amed_dpmpp_3m"])
def test_a_run_is_finite_and_repeats_bit_by_bit(pack: Any, name: str, student: str) -> None:
    family = make(name)
    applied = apply(pack, family, predictor(pack, family, student, guidance=CFG))
    drawn = [k_sample(family, applied, 5, CFG, student) for _ in range(2)]
    assert drawn[0].isfinite().all()
    assert drawn[0].shape == flat(family.latent["samples"]).shape
    assert drawn[0].std() > 0
    assert (drawn[0] == drawn[1]).all()


@pytest.mark.parametrize("name", SPECS)
def test_the_model_is_asked_as_often_as_steps_says_and_never_outside_its_levels(pack: Any, name: str) -> None:
    family = make(name)
    made = predictor(pack, family, guidance=CFG, scale_time=0.2)
    sampling = family.model.get_model_object("model_sampling")
    asked: list[torch.Tensor] = []

    def wrapper(apply_model: Callable[..., Any], parameters: Any) -> Any:
        asked.append(parameters["timestep"])
        return apply_model(parameters["input"], parameters["timestep"], **parameters["c"])

    applied = apply(pack, family, made)
    applied.set_model_unet_function_wrapper(wrapper)
    k_sample(family, applied, 5, CFG)
    at_once = 2 if SPECS[name].batch == 1 else 1  # such a model is asked for one prompt after the other
    assert len(asked) == 5 * at_once
    assert min(float(a.min()) for a in asked) >= float(sampling.sigma_min)
    assert max(float(a.max()) for a in asked) <= float(sampling.sigma_max)
    assert all(later.max() < earlier.min() for earlier, later in pairwise(asked[::at_once])), "downward"


@pytest.mark.parametrize("name", ["sd15", "flux", "wan21", "stable_audio", "cogvideox", "ltxav"])
@pytest.mark.parametrize("split", [2, 4])
def test_two_halves_of_k_sampler_advanced_equal_one_go(pack: Any, name: str, split: int) -> None:
    family = make(name)
    settings: dict[str, Any] = {"model": apply(pack, family, predictor(pack, family, guidance=CFG)), "noise_seed": 3}
    settings |= {"steps": 5, "cfg": CFG, "sampler_name": "amed", "scheduler": "amed"}
    settings |= {"positive": family.positive, "negative": family.negative}

    def part(latent: Any, begin: int, end: int, noise: str, leftover: str) -> Any:
        steps = {"start_at_step": begin, "end_at_step": end, "return_with_leftover_noise": leftover}
        return stock("KSamplerAdvanced", **settings, **steps, add_noise=noise, latent_image=latent)[0]

    with torch.inference_mode():
        whole = part(family.latent, 0, 10000, "enable", "disable")["samples"]
        half = part(family.latent, 0, split, "enable", "enable")
        rest = part(half, split, 10000, "disable", "disable")["samples"]
    for one, other in zip(streams(rest), streams(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_sampler_custom_and_the_advanced_one_equal_k_sampler(pack: Any, sd15: Family) -> None:
    made = predictor(pack, sd15, guidance=CFG)
    applied = apply(pack, sd15, made)
    expected = k_sample(sd15, applied, 5, CFG)
    (sampler,) = pack.nodes.AMEDSampler.execute(made).args
    (sigmas,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    with torch.inference_mode():
        given = {"positive": sd15.positive, "negative": sd15.negative, "latent_image": sd15.latent}
        how = {"noise_seed": 3, "cfg": CFG, "sampler": sampler, "sigmas": sigmas}
        plain = stock("SamplerCustom", model=applied, **how, **given)[0]["samples"]
    drawn, denoised = custom(pack, sd15, made, guided(sd15, applied))
    assert (plain == expected).all()
    assert (drawn == expected).all()
    torch.testing.assert_close(denoised, expected), "the plain last call's answer is the sample"


def test_split_sigmas_equal_the_whole(pack: Any, flux: Family) -> None:
    made = predictor(pack, flux, guidance=CFG)
    (sigmas,) = pack.nodes.AMEDScheduler.execute(made, 1.0).args
    high, low = stock("SplitSigmas", sigmas=sigmas, step=2).args
    whole, _ = custom(pack, flux, made, guided(flux), sigmas)
    half, _ = custom(pack, flux, made, guided(flux), high)
    (sampler,) = pack.nodes.AMEDSampler.execute(made).args
    rest, _ = advanced(stock("DisableNoise")[0], guided(flux), sampler, low, {"samples": half})
    torch.testing.assert_close(rest, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("kind", ["Basic", "DualCFG", "PerpNeg"])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_other_guiders(pack: Any, name: str, kind: str) -> None:
    family, other = make(name), prompt(name, 4)
    prompts = {"positive": family.positive, "negative": family.negative, "empty_conditioning": other}
    guider = {
        "Basic": lambda: stock("BasicGuider", model=family.model, conditioning=family.positive)[0],
        "DualCFG": lambda: dual_cfg(family, other, cfg_conds=2.0, cfg_cond2_negative=1.5),
        "PerpNeg": lambda: stock("PerpNegGuider", model=family.model, **prompts, cfg=2.0)[0],
    }[kind]()
    drawn, _ = custom(pack, family, predictor(pack, family), guider)
    assert drawn.isfinite().all()
    again, _ = custom(pack, family, predictor(pack, family), guider)
    assert (drawn == again).all()


def test_at_cfg_1_the_negative_prompt_does_not_matter(pack: Any, sd15: Family) -> None:
    applied = apply(pack, sd15, predictor(pack, sd15))
    one, other = (k_sample(sd15, applied, 5, 1.0, negative=n) for n in (sd15.negative, sd15.positive))
    assert (one == other).all()


# Images as input


@pytest.mark.parametrize("name", ["sd15", "flux", "wan21", "cogvideox", "ltxav"])
def test_denoise_below_1_keeps_the_more_of_the_image_the_lower_it_is(pack: Any, name: str) -> None:
    family = make(name)
    applied = apply(pack, family, predictor(pack, family, guidance=1.0))
    given = image(family)
    drawn = [k_sample(family, applied, 5, 1.0, denoise=d, latent=given) for d in (0.05, 0.4, 0.9)]
    distances = [float((one - flat(given)).abs().mean()) for one in drawn]
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("name", ["sd15", "flux", "wan21", "qwen_image"])
def test_an_inpainting_mask_leaves_the_rest_as_it_was(pack: Any, name: str) -> None:
    family = make(name)
    applied = apply(pack, family, predictor(pack, family, guidance=CFG))
    given, (mask, kept) = image(family), half(family)
    drawn = k_sample(family, applied, 5, CFG, latent=given, noise_mask=mask)
    torch.testing.assert_close(drawn[kept], given[kept], rtol=1e-4, atol=1e-5)
    assert (drawn[~kept] - given[~kept]).abs().mean() > 0.1


def test_differential_diffusion(pack: Any, sd15: Family) -> None:
    """It looks timesteps up, for a mask that changes from call to call."""
    applied = stock("DifferentialDiffusion", model=apply(pack, sd15, predictor(pack, sd15, guidance=CFG)))[0]
    given = image(sd15)
    mask = torch.linspace(0, 1, 16).expand(1, 1, 16, 16).contiguous()
    drawn = k_sample(sd15, applied, 5, CFG, latent=given, noise_mask=mask)
    change = (drawn - given).abs().mean((0, 1, 2))
    assert change[0] < 1e-4
    assert change[:4].mean() < change[-4:].mean()


# What else steers a model


def test_control_net(pack: Any, sd15: Family) -> None:
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(8))
    applied = apply(pack, sd15, predictor(pack, sd15, guidance=CFG))
    prompts = {"positive": sd15.positive, "negative": sd15.negative}
    positive, negative = stock("ControlNetApplyAdvanced", **prompts, control_net=control_net(), image=picture).args
    with_control = k_sample(sd15, applied, 5, CFG, positive=positive, negative=negative)
    assert with_control.isfinite().all()
    assert not torch.allclose(with_control, k_sample(sd15, applied, 5, CFG), rtol=1e-2)
    features = seen(pack, guided(sd15, positive=positive, negative=negative), sd15)
    assert not torch.allclose(features, seen(pack, guided(sd15), sd15), rtol=1e-2), "its residuals belong to them"


def lora(model: Any, strength: float, seed: int = 9) -> Any:
    """The MODEL with a LoRA of rank 2 on one of its weights."""
    from comfy.weight_adapter import LoRAAdapter  # noqa: PLC0415

    weights = model.model.state_dict()
    key = next(k for k in weights if k.startswith("diffusion_model.") and k.endswith("weight") and weights[k].ndim == 2)
    high, low = weights[key].shape
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(high, 2, generator=generator), torch.randn(2, low, generator=generator)
    patched = model.clone()
    patched.add_patches({key: LoRAAdapter({key}, (up, down, 2.0, None, None, None))}, strength)
    return patched


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_lora_changes_the_picture_and_is_warned_of(pack: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    family = make(name)
    made = predictor(pack, family, guidance=CFG)
    plain = k_sample(family, apply(pack, family, made), 5, CFG)
    assert "AMED" not in caplog.text
    patched = k_sample(family, apply(pack, family, made, lora(family.model, 1.0)), 5, CFG)
    assert not torch.allclose(patched, plain, rtol=1e-2)
    assert "loras was 'none'" in caplog.text
    assert "Use the same LoRAs" in caplog.text


def test_a_predictor_made_with_a_lora_knows_it_again(pack: Any, sd15: Family) -> None:
    pairing = pack.nodes.pairing
    names = [pairing.loras(lora(sd15.model, *settings)) for settings in ((1.0, 9), (1.0, 9), (0.8, 9), (1.0, 10))]
    assert names[0] == names[1]
    assert len(set(names)) == 3, "another strength and other weights are others"
    assert pairing.loras(sd15.model) == "none"


def test_regional_and_scheduled_prompts(pack: Any, sd15: Family) -> None:
    applied = apply(pack, sd15, predictor(pack, sd15, guidance=CFG))
    other = prompt("sd15", 4)
    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1
    ways = {
        "area": stock("ConditioningSetArea", conditioning=other, width=64, height=128, x=64)[0],
        "mask": stock("ConditioningSetMask", conditioning=other, mask=mask)[0],
        "bounds": stock("ConditioningSetMask", conditioning=other, mask=mask, set_cond_area="mask bounds")[0],
        "early": stock("ConditioningSetTimestepRange", conditioning=other, end=0.4)[0],
        "late": stock("ConditioningSetTimestepRange", conditioning=other, start=0.6)[0],
    }
    drawn = {way: k_sample(sd15, applied, 5, CFG, positive=sd15.positive + extra) for way, extra in ways.items()}
    drawn["none"] = k_sample(sd15, applied, 5, CFG)
    assert all(d.isfinite().all() for d in drawn.values())
    for way, one in drawn.items():
        assert sum(bool(torch.allclose(one, other, rtol=1e-3)) for other in drawn.values()) == 1, way


def test_a_prompt_that_starts_late_is_not_asked_before(pack: Any, sd15: Family) -> None:
    """Where no positive prompt is active at all, ComfyUI answers 0, and we take that as it is."""
    late = stock("ConditioningSetTimestepRange", conditioning=sd15.positive, start=0.5)[0]
    applied = apply(pack, sd15, predictor(pack, sd15, guidance=CFG))
    assert k_sample(sd15, applied, 5, CFG, positive=late).isfinite().all()


@pytest.mark.parametrize("way", ["hooks", "default"])
def test_scheduled_loras_of_prompts(pack: Any, sd15: Family, way: str) -> None:
    """Hooks: a prompt's own LoRA, evaluated in calls of its own."""
    import comfy.hooks  # noqa: PLC0415

    hooks = comfy.hooks.HookGroup()
    patched = lora(sd15.model, 1.0)
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights = {key: patch[0][1] for key, patch in patched.patches.items()}
    hook.need_weight_init = False
    hooks.add(hook)
    positive = [[tokens, {**extra, "hooks": hooks}] for tokens, extra in sd15.positive]
    if way == "default":
        positive += [[tokens, {**extra, "default": True}] for tokens, extra in prompt("sd15", 4)]
    applied = apply(pack, sd15, predictor(pack, sd15, guidance=CFG))
    drawn = k_sample(sd15, applied, 5, CFG, positive=positive)
    assert drawn.isfinite().all()
    assert not torch.allclose(drawn, k_sample(sd15, applied, 5, CFG), rtol=1e-2)


def windowed(family: Family, schedule: str) -> Any:
    """The MODEL asked in windows of 5 of its frames, which overlap by 2."""
    size = {"context_length": 5, "context_overlap": 2, "dim": 2}
    return stock("ContextWindowsManual", model=family.model, **size, context_schedule=schedule)[0]


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "looped_uniform"])
def test_context_windows_follow_the_predictors_midpoints(pack: Any, schedule: str) -> None:
    """They look the asked level up in the run's levels, where midpoints were never written."""
    family = make("wan21", batch=1, shape=(16, 9, 8, 8))
    applied = apply(pack, family, predictor(pack, family, guidance=CFG), windowed(family, schedule))
    drawn = k_sample(family, applied, 5, CFG)
    assert drawn.isfinite().all()
    assert drawn.shape == family.latent["samples"].shape


def test_training_in_context_windows(pack: Any) -> None:
    """The teacher asks between the grid's levels, too."""
    family = make("wan21", batch=1, shape=(16, 9, 8, 8))
    made = trained(pack, family, windowed(family, "standard_static"), trajectories=2, batch_size=1)
    assert made.config.features == "latent"


# Model sampling nodes


SAMPLING_NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "ModelSamplingSD3": ("ModelSamplingSD3", {"shift": 6.0}),
    "ModelSamplingFlux": ("ModelSamplingFlux", {"max_shift": 1.3, "base_shift": 0.6, "width": 128, "height": 128}),
    "v-prediction": ("ModelSamplingDiscrete", {"sampling": "v_prediction"}),
    "zero SNR": ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
    "ContinuousEDM": ("ModelSamplingContinuousEDM", {"sampling": "eps", "sigma_max": 80.0, "sigma_min": 0.02}),
    "RescaleCFG": ("RescaleCFG", {"multiplier": 0.7}),
}


def changed_by(name: str, model: Any) -> Any:
    """The MODEL after one of these nodes."""
    kind, settings = SAMPLING_NODES[name]
    return stock(kind, model=model, **settings)[0]


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("sd3", "ModelSamplingSD3"),
        ("flux", "ModelSamplingFlux"),
        ("sd15", "v-prediction"),
        ("sd15", "zero SNR"),
        ("sdxl", "ContinuousEDM"),
        ("sd15", "RescaleCFG"),
    ],
)
def test_model_sampling_nodes_before_training(pack: Any, name: str, node: str) -> None:
    """A predictor is made for the model as the nodes before it have left it."""
    family = make(name)
    changed = Family(changed_by(node, family.model), family.positive, family.negative, family.latent)
    made = predictor(pack, changed, guidance=CFG)
    sampling = changed.model.get_model_object("model_sampling")
    assert made.config.sigmas[0] == pytest.approx(float(sampling.sigma_max), rel=1e-3)
    assert k_sample(changed, apply(pack, changed, made), 5, CFG).isfinite().all()


@pytest.mark.parametrize(
    ("name", "node", "words"),
    [
        ("sd3", "ModelSamplingSD3", "shift was 3 when the predictor was made and is 6 now"),
        ("flux", "ModelSamplingFlux", "shift was 1.15"),
        ("sdxl", "ContinuousEDM", "sigma_max was 14.61 when the predictor was made and is 80 now"),
        ("sd15", "RescaleCFG", "cfg_functions was 'none'"),
    ],
)
def test_model_sampling_nodes_after_training_are_warned_of(
    pack: Any, name: str, node: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    family = make(name)
    made = predictor(pack, family, guidance=CFG)
    changed = changed_by(node, family.model)
    assert k_sample(family, apply(pack, family, made, changed), 5, CFG).isfinite().all()
    assert words in caplog.text
    assert "AMED Train Predictor" in caplog.text


def test_another_prediction_type_is_refused(pack: Any) -> None:
    family = make("sd15")
    with pytest.raises(ValueError, match="prediction 'EPS', but the loaded model has 'V_PREDICTION'"):
        apply(pack, family, predictor(pack, family), changed_by("v-prediction", family.model))


def test_every_other_family_is_refused(pack: Any) -> None:
    made = {name: (make(name), predictor(pack, make(name))) for name in here()}
    for owner, (_, mine) in made.items():
        for name, (family, _) in made.items():
            if name == owner:
                apply(pack, family, mine)
                continue
            with pytest.raises(ValueError, match="made for another model: family") as error:
                apply(pack, family, mine)
            assert "AMED Load Predictor" in str(error.value)
            with pytest.raises(ValueError, match="made for another model"):
                custom(pack, family, mine, guided(family))


def test_another_guidance_is_warned_of(pack: Any, sd15: Family, caplog: pytest.LogCaptureFixture) -> None:
    made = predictor(pack, sd15, guidance=CFG)
    k_sample(sd15, apply(pack, sd15, made), 5, 7.5)
    assert "guidance was cfg 3 when the predictor was made and is cfg 7.5 now" in caplog.text
    caplog.clear()
    custom(pack, sd15, made, dual_cfg(sd15, prompt("sd15", 4), apply(pack, sd15, made)))
    assert "is cfg1 3, cfg2 2 now" in caplog.text


# Timesteps


def test_timesteps_are_interpolated_on_a_clone(pack: Any, sd15: Family) -> None:
    original = sd15.model.get_model_object("model_sampling")
    smooth = apply(pack, sd15, predictor(pack, sd15)).get_model_object("model_sampling")
    assert sd15.model.get_model_object("model_sampling") is original
    assert isinstance(smooth, type(original))
    torch.testing.assert_close(smooth.timestep(original.sigmas.cpu()), torch.arange(1000.0), rtol=0, atol=2e-3)
    between = torch.tensor([0.25, 3.5, 500.75, 998.5])
    torch.testing.assert_close(smooth.timestep(original.sigma(between)), between, rtol=0, atol=2e-3)
    assert (original.timestep(original.sigma(between)) % 1 == 0).all()
    outside = torch.tensor([1e-3, 100.0])
    assert smooth.timestep(outside).tolist() == [0.0, 999.0]
    per_sample = torch.full((3, 1), 2.0)
    assert smooth.timestep(per_sample).shape == (3, 1)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in DISCRETE])
def test_models_with_continuous_timesteps_keep_their_own(pack: Any, name: str) -> None:
    model = make(name).model
    assert pack.nodes.timesteps.with_interpolated_timesteps(model) is model


@pytest.mark.parametrize("name", ["sd15", "sd2_v", "sdxl"])
def test_interpolated_a_model_is_smooth_in_sigma_where_it_was_a_staircase(pack: Any, name: str) -> None:
    """Small differences of sigma then give the derivative that large ones give."""
    family = make(name)

    def jumps(model: Any) -> float:
        def work(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> torch.Tensor:
            # 3 levels within one timestep, centred where rounding changes it.
            steps = [model(x, s.expand(len(x)), **extra_args) for s in sigmas[:-1]]
            return torch.stack(steps)

        table = family.model.get_model_object("model_sampling").log_sigmas
        edge = (table[400] + table[401]) / 2
        levels = [float((edge + d).exp()) for d in (3e-4, 1e-4, -1e-4)]
        answers = inside(guided(family, model), family, work, (*levels, 0.0))
        differences = answers.diff(dim=0).abs().mean(dim=tuple(range(1, answers.ndim)))
        return float(differences.max() / differences.min())

    smooth = pack.nodes.timesteps.with_interpolated_timesteps(family.model)
    assert jumps(family.model) > 3, "one of two equal differences crosses a step"
    assert jumps(smooth) < 1.5


# Compiled models


SMALL_UNET = {
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [0, 0],
    "transformer_depth_middle": -1,
}


@pytest.mark.parametrize(("name", "changes"), [("sd15", SMALL_UNET), ("flux", {})])
def test_a_compiled_model_is_compiled_once(
    pack: Any, name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it in the first call: not again for a midpoint, for per-sample levels, or in the next run."""
    import comfy.model_management as mm  # noqa: PLC0415
    from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: PLC0415

    # ComfyUI's own attention on the CPU would be compiled again when the free memory that it reads has changed.
    free = 10**10
    monkeypatch.setattr(
        mm, "get_free_memory", lambda device=None, torch_free_too=False: (free, free) if torch_free_too else free
    )
    family = make(name, **changes)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: Any) -> Callable[..., Any]:
        compiled.append(len(inputs))
        return graph.forward

    model = family.model.clone()
    set_torch_compile_wrapper(model=model, backend=backend)
    made = predictor(pack, family, guidance=CFG)
    applied = apply(pack, family, made, model)
    torch._dynamo.reset()
    after_call: list[int] = []
    runs = [
        k_sample(family, applied, 5, CFG, callback=lambda *heard: after_call.append(len(compiled))) for _ in range(2)
    ]
    assert after_call[0] > 0
    assert after_call == after_call[:1] * 10
    assert (runs[0] == runs[1]).all()
    plain = k_sample(family, apply(pack, family, made), 5, CFG)
    torch.testing.assert_close(runs[0], plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


# Progress, preview, cancel


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("student", ["amed", "amed_ipndm"])
def test_progress_and_preview_come_once_per_call(pack: Any, name: str, student: str) -> None:
    family = make(name)
    applied = apply(pack, family, predictor(pack, family, student, guidance=CFG))
    heard: list[tuple[int, int]] = []

    def callback(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        assert denoised.shape == x.shape == family.latent["samples"].shape
        assert denoised.isfinite().all()
        heard.append((step, total))

    k_sample(family, applied, 5, CFG, student, callback=callback)
    assert heard == [(i, 5) for i in range(5)]


@pytest.mark.trust("sampling")
def test_cancel_stops_before_the_next_model_call(pack: Any, sd15: Family) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    applied = apply(pack, sd15, predictor(pack, sd15, guidance=CFG))
    calls = []

    def wrapper(apply_model: Callable[..., Any], parameters: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            mm.interrupt_current_processing()
        return apply_model(parameters["input"], parameters["timestep"], **parameters["c"])

    applied.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(mm.InterruptProcessingException):
        k_sample(sd15, applied, 5, CFG)
    assert len(calls) == 2
    calls.append(1)
    assert k_sample(sd15, applied, 5, CFG).isfinite().all(), "nothing is left of the cancelled run"


# Training


def trained(pack: Any, family: Family, model: Any = None, **changes: Any) -> Any:
    return train(pack, family, model, paper=True, **changes)[0]


@pytest.mark.parametrize("name", SPECS)
def test_every_family_trains_and_its_predictor_samples_in_every_way(pack: Any, name: str) -> None:
    features = "bottleneck" if name in UNETS else "latent"
    assert cell(pack, name, "auto") == f"pass ({features})"


@pytest.mark.parametrize("name", SPECS)
def test_a_predictor_knows_what_its_model_predicts(pack: Any, name: str) -> None:
    config = predictor(pack, make(name)).config
    assert config.flow == SPECS[name].flow
    assert config.model["timesteps"] == ("interpolated" if name in DISCRETE else "continuous")


@pytest.mark.usefixtures("pack")
def test_warnings_are_silent_where_all_is_as_it_was(pack: Any, flux: Family, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    made = predictor(pack, flux, guidance=CFG)
    k_sample(flux, apply(pack, flux, made), 5, CFG)
    custom(pack, flux, made, guided(flux))
    assert "AMED" not in caplog.text
