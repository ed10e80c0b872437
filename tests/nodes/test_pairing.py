"""What a predictor remembers of its model, and what is refused: whatever changes an answer, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, make
from stock import known, stock
from toys import apply, k_sample, predictor, train

CFG = 3.0
MULTISTEP = {"steps": 3, "trajectories": 4}


@pytest.fixture(scope="module")
def sd15(pack: Any) -> Family:
    del pack
    return make("sd15")


def bypass_lora(model: Any, strength: float, seed: int = 9) -> Any:
    """A MODEL with a LoRA beside its weights, as ComfyUI's bypass loader adds it."""
    import comfy.weight_adapter  # noqa: PLC0415
    from comfy.weight_adapter.lora import LoRAAdapter  # noqa: PLC0415

    generator = torch.Generator().manual_seed(seed)
    manager = comfy.weight_adapter.BypassInjectionManager()
    for key, weight in model.model.state_dict().items():
        if key.endswith("weight") and weight.ndim == 2 and "attn" in key:
            up, down = (
                torch.randn(len(weight), 2, generator=generator),
                torch.randn(2, weight.shape[1], generator=generator),
            )
            manager.add_adapter(key, LoRAAdapter(set(), (up, down, 1.0, None, None, None)), strength=strength)
    clone = model.clone()
    clone.set_injections("bypass_lora", manager.create_injections(clone.model))
    assert manager.get_hook_count()
    return clone


def needs_bypass() -> None:
    import comfy.weight_adapter  # noqa: PLC0415

    if not hasattr(comfy.weight_adapter, "BypassInjectionManager"):
        pytest.skip("this ComfyUI has no LoRAs in bypass mode")


def test_loras_in_bypass_mode_are_loras(pack: Any, sd15: Family, caplog: pytest.LogCaptureFixture) -> None:
    needs_bypass()
    pairing = pack.nodes.pairing
    names = [pairing.loras(bypass_lora(sd15.model, *how)) for how in ((1.0, 9), (1.0, 9), (0.8, 9), (1.0, 10))]
    assert names[0] == names[1]
    assert len({*names, pairing.loras(sd15.model)}) == 4, "another strength, other weights and none are others"
    assert pairing.patches(bypass_lora(sd15.model, 1.0)) == "none", "they are said once"
    made = predictor(pack, sd15, guidance=CFG)
    k_sample(sd15, apply(pack, sd15, made, bypass_lora(sd15.model, 1.0)), 5, CFG)
    assert "loras was 'none'" in caplog.text


# What changes an answer is named, and warned of

CHANGES = {
    "FreeU_V2": ("sd15", {}, "output_block_patch FreeU_V2"),
    "HyperTile": ("sd15", {}, "attn1_patch HyperTile"),
    "TomePatchModel": ("sd15", {}, "attn1_patch TomePatchModel"),
    "SelfAttentionGuidance": ("sd15", {}, "attn1 SelfAttentionGuidance"),
    "LazyCache": ("flux", {}, "lazycache_predict_noise_wrapper"),
    "CFGOverride": ("flux", {"cfg": 1.0}, "predict_noise CFGOverride"),
    "NAGuidance": ("flux", {}, "NAGuidance"),
    "SkipLayerGuidanceDiTSimple": ("flux", {}, "none"),  # guidance, in an entry of its own
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_patch_that_changes_answers_is_named(pack: Any, kind: str) -> None:
    name, settings, shown = CHANGES[kind]
    if kind not in known():
        pytest.skip(f"this ComfyUI has no {kind}")
    family = make(name)
    changed = stock(kind, model=family.model, **settings)[0]
    before, after = (pack.nodes.pairing.fingerprint(model) for model in (family.model, changed))
    assert before["patches"] == "none"
    assert shown in after["patches"]
    assert {k for k in before if before[k] != after[k]} <= {"patches", "cfg_functions"}
    assert before != after
    assert pack.nodes.pairing.plain_text(after["patches"]) == after["patches"], "as a file will bring it back"


def test_a_patch_that_was_not_there_in_training_is_warned_of(
    pack: Any, sd15: Family, caplog: pytest.LogCaptureFixture
) -> None:
    made = predictor(pack, sd15, guidance=CFG)
    changed = stock("FreeU_V2", model=sd15.model)[0]
    for model in (apply(pack, sd15, made, changed), stock("FreeU_V2", model=apply(pack, sd15, made))[0]):
        caplog.clear()
        k_sample(sd15, model, 5, CFG)
        assert "patches was 'none' when the predictor was made and is 'output_block_patch FreeU_V2" in caplog.text
    caplog.clear()
    with_it = predictor(pack, Family(changed, sd15.positive, sd15.negative, sd15.latent), guidance=CFG)
    k_sample(sd15, apply(pack, sd15, with_it, changed), 5, CFG)
    assert "AMED" not in caplog.text


def test_another_kernel_changes_nothing(pack: Any, flux: Family) -> None:
    """Attention of another kind (SageAttention sets the same option), and compilation by either of ComfyUI's ways."""
    from comfy.ldm.modules.attention import attention_basic  # noqa: PLC0415
    from comfy_api.torch_helpers import set_torch_compile_wrapper  # noqa: PLC0415

    before = pack.nodes.pairing.fingerprint(flux.model)
    attending = flux.model.clone()
    attending.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: attention_basic(
        *a, **k
    )
    compiled, part = flux.model.clone(), flux.model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    part.add_object_patch("diffusion_model", torch.compile(flux.model.model.diffusion_model, backend="eager"))
    for model in (attending, compiled, part):
        assert pack.nodes.pairing.fingerprint(model) == before


def test_many_patches_are_cut_short_and_still_told_apart(pack: Any) -> None:
    names = [f"wrapper_{n}" for n in range(100)]
    one, other = pack.nodes.pairing.listed(names), pack.nodes.pairing.listed([*names, "another"])
    assert one != other
    assert max(len(one), len(other)) < 200
    assert pack.nodes.pairing.listed(["f.<locals>.g<img src=x>", "f.<locals>.g<img src=x>"]) == "f.locals.gimg srcx"


def test_scales_of_noise_and_of_sound_are_remembered(pack: Any, caplog: pytest.LogCaptureFixture) -> None:
    pairing, family = pack.nodes.pairing, make("flux")
    made = predictor(pack, family, guidance=CFG)
    sampling = family.model.get_model_object("model_sampling")
    assert pairing.fingerprint(family.model)["noise_scale"] == 1.0
    sampling.noise_scale = 4.0
    k_sample(family, apply(pack, family, made), 5, CFG)
    assert "noise_scale was 1 when the predictor was made and is 4 now" in caplog.text
    sampling.audio_shift = 2.0
    assert pairing.fingerprint(family.model)["audio_shift"] == 2.0


# The checkpoint


def test_the_weights_of_a_checkpoint_have_a_digest_that_patches_do_not_change(pack: Any) -> None:
    """Whether LoRAs are in the weights' place at the moment, as while the model is loaded, does not matter."""
    checkpoint, family = pack.nodes.pairing.checkpoint, make("sd15")
    own = checkpoint(family.model)
    assert own == checkpoint(make("sd15").model)
    assert own != checkpoint(make("sd15", seed=1).model)
    patched = family.model.clone()
    weights = {
        k: w for k, w in family.model.model.state_dict().items() if k.startswith("diffusion_model") and w.ndim == 2
    }
    patched.add_patches({key: ("diff", (torch.ones_like(weight),)) for key, weight in weights.items()}, 1.0)
    patched.patch_model()
    assert patched.backup, "the weights are changed by now"
    assert checkpoint(patched) == own
    patched.unpatch_model()


@pytest.mark.parametrize("how", [{"paper": True}, MULTISTEP], ids=["amed", "multistep"])
def test_training_does_not_go_on_from_the_state_of_another_checkpoint(
    pack: Any, user: Path, how: dict[str, Any]
) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    made = []

    def stopping(apply_model: Any, parameters: Any) -> torch.Tensor:
        made.append(1)
        if len(made) == 20:
            mm.interrupt_current_processing()
        answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer

    families = [make("flux", seed=seed) for seed in (0, 1)]
    models = [family.model.clone() for family in families]
    for model in models:
        model.set_model_unet_function_wrapper(stopping)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, families[0], models[0], **how)
    assert len(list(user.glob("*.safetensors"))) == 1
    assert "before it was stopped" not in train(pack, families[1], models[1], **how)[2]
    assert len(list(user.glob("*.safetensors"))) == 1, "the other one is still to be gone on from"
    assert "before it was stopped" in train(pack, families[0], models[0], **how)[2]


# What no predictor suits


def test_models_that_start_from_a_picture_are_refused_by_name(pack: Any) -> None:
    family = make("flux")
    sampling = type(family.model.get_model_object("model_sampling"))

    class IMG_TO_IMG_FLOW(sampling):  # noqa: N801 - as ComfyUI calls it
        pass

    changed = family.model.clone()
    changed.add_object_patch("model_sampling", IMG_TO_IMG_FLOW())
    with pytest.raises(ValueError, match="Flux is of the kind IMG_TO_IMG_FLOW: it starts from a picture and not from"):
        train(pack, family, changed)
    with pytest.raises(ValueError, match="starts from a picture"):
        apply(pack, family, predictor(pack, family), changed)


def test_mean_flow_models_are_refused_by_name(pack: Any) -> None:
    family = make("flux")
    made = predictor(pack, family)
    family.model.model.diffusion_model.time_r_in = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Flux is a MeanFlow model: it is told where a step ends"):
        train(pack, family)
    with pytest.raises(ValueError, match="MeanFlow"):
        apply(pack, family, made)


def test_autograd_on_several_gpus_is_refused(pack: Any, flux: Family) -> None:
    several = flux.model.clone()
    several.set_additional_models("multigpu", [flux.model.clone()])
    with pytest.raises(ValueError, match="MultiGPU CFG Split"):
        train(pack, flux, several, paper=True, gradient="reverse")


# Caches that answer for the model


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
@pytest.mark.parametrize("how", [{"paper": True}, MULTISTEP], ids=["amed", "multistep"])
def test_training_asks_the_model_itself(pack: Any, kind: str, how: dict[str, Any]) -> None:
    """Every call that is reported reaches the model, and sampling with the cache works as before."""
    family, asked = make("flux"), []
    network, forward = family.model.model.diffusion_model, type(family.model.model.diffusion_model).forward

    def counting(x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        asked.append(len(x))
        answer: torch.Tensor = forward(network, x, *more, **named)
        return answer

    network.forward = counting
    cached = stock(kind, model=family.model, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0)[0]
    made, _, report, _ = train(pack, family, cached, **how, cfg=1.0)
    rows = sum(asked)
    plain = train(pack, family, **how, cfg=1.0)[0]
    assert sum(asked) == 2 * rows, "the model was asked as often with the cache as without"
    assert made.config.model["patches"] == "none"
    ours, theirs = made.predictor.state_dict(), plain.predictor.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in ours), "the same as without the cache"
    assert made.notes["training"]["model_calls"] == plain.notes["training"]["model_calls"]
    assert report
    applied = apply(pack, family, made, cached)
    sampler, calls = ("amed", 5) if "paper" in how else ("amed_multistep", 3)
    assert k_sample(family, applied, calls, 1.0, sampler).isfinite().all()
