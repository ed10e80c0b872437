"""The text-to-picture model in ComfyUI: a checkpoint like any other to stock nodes and to ours."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import k_sample, train

from amed_core import AMEDPredictor, load_predictor, sample
from amed_core.features import pool
from amed_core.pictures import CHANNELS, FINGERPRINT, PIXELS, SHAPE, PicturesDenoiser

CFG = 3.0
SHIPPED = Path(__file__).parents[2] / "predictors"


@pytest.fixture(scope="module")
def parts(pack: Any) -> Any:
    """The outputs of AMED Demo Checkpoint, with prompts and an empty latent from stock nodes."""
    schema = pack.nodes.AMEDDemoCheckpoint.define_schema()
    names = [output.display_name for output in schema.outputs]
    loaded = dict(zip(names, pack.nodes.AMEDDemoCheckpoint.execute().args, strict=True))
    found = SimpleNamespace(model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"])
    found.positive, found.negative = encoded(found.clip, "strawberry"), encoded(found.clip, "")
    found.latent = empty(128, 128)
    return found


def stock(name: str) -> Any:
    """A node of ComfyUI's own."""
    return sys.modules["nodes"].NODE_CLASS_MAPPINGS[name]()


def encoded(clip: Any, text: str) -> Any:
    return stock("CLIPTextEncode").encode(clip, text)[0]


def empty(width: int, height: int, batch: int = 1) -> dict[str, Any]:
    return dict(stock("EmptyLatentImage").generate(width, height, batch)[0])


def drawn(parts: Any, steps: int = 3, sampler: str = "euler", **changes: Any) -> torch.Tensor:
    """The latents that the KSampler node makes, with seed 3."""
    settings: dict[str, Any] = {"model": parts.model, "seed": 3, "cfg": CFG, "scheduler": "simple", "denoise": 1.0}
    settings |= {"positive": parts.positive, "negative": parts.negative, "latent_image": parts.latent} | changes
    with torch.inference_mode():
        found: torch.Tensor = stock("KSampler").sample(steps=steps, sampler_name=sampler, **settings)[0]["samples"]
    return found


def test_its_outputs_are_called_as_load_checkpoints(pack: Any) -> None:
    ours = [output.display_name for output in pack.nodes.AMEDDemoCheckpoint.define_schema().outputs]
    loader = sys.modules["nodes"].NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]
    assert ours == list(getattr(loader, "RETURN_NAMES", loader.RETURN_TYPES))


def test_unknown_words_weights_and_articles_are_read_as_they_should(parts: Any) -> None:
    (cond, more), *_ = encoded(parts.clip, "A strawberry, masterpiece!")
    torch.testing.assert_close(cond, parts.positive[0][0])
    assert more["pooled_output"].shape == (1, cond.shape[-1])
    heavy = encoded(parts.clip, "(strawberry:1.5)")[0][0]
    torch.testing.assert_close(heavy, 1.5 * parts.positive[0][0])
    assert (encoded(parts.clip, "masterpiece, 8k")[0][0] == parts.negative[0][0]).all()


def test_stock_nodes_mix_its_prompts(parts: Any) -> None:
    other = encoded(parts.clip, "penguin")
    (average,) = stock("ConditioningAverage").addWeighted(parts.positive, other, 0.5)
    torch.testing.assert_close(average[0][0], (parts.positive[0][0] + other[0][0]) / 2)
    (both,) = stock("ConditioningConcat").concat(parts.positive, other)
    (combined,) = stock("ConditioningCombine").combine(parts.positive, other)
    pictures = [drawn(parts, positive=prompt) for prompt in (parts.positive, other, average, both, combined)]
    assert all(picture.isfinite().all() for picture in pictures)
    assert all(not torch.allclose(pictures[0], picture) for picture in pictures[1:])
    skipped = stock("CLIPSetLastLayer").set_last_layer(parts.clip, -2)[0]
    assert (encoded(skipped, "strawberry")[0][0] == parts.positive[0][0]).all()


@pytest.mark.parametrize("size", [(128, 128), (192, 128), (104, 136), (64, 64)])
def test_latents_and_pictures_have_the_asked_size(parts: Any, size: tuple[int, int]) -> None:
    samples = drawn(parts, steps=2, latent_image=empty(*size, batch=2))
    assert samples.shape == (2, CHANNELS, size[1] // PIXELS, size[0] // PIXELS)
    (images,) = stock("VAEDecode").decode(parts.vae, {"samples": samples})
    assert images.shape == (2, size[1], size[0], 3)
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_drawing_survives_the_vae(parts: Any) -> None:
    (image,) = stock("VAEDecode").decode(parts.vae, {"samples": drawn(parts, steps=12, sampler="dpmpp_2m")})
    (latent,) = stock("VAEEncode").encode(parts.vae, image)
    again = parts.vae.decode(latent["samples"])
    assert -10 * (again - image).square().mean().log10() > 24
    with_alpha = torch.cat([image, torch.ones_like(image[..., :1])], -1)
    odd, cut = with_alpha[:, :-3, :-5], image[:, 2:122, 1:121]
    torch.testing.assert_close(parts.vae.encode(odd), parts.vae.encode(cut))
    (tiled,) = stock("VAEDecodeTiled").decode(parts.vae, latent, tile_size=512)
    assert (tiled == again).all()


def test_the_preview_looks_like_the_picture(parts: Any) -> None:
    import latent_preview  # noqa: PLC0415

    about = parts.model.model.latent_format
    latent = drawn(parts, steps=12, sampler="dpmpp_2m")
    preview = latent_preview.Latent2RGBPreviewer(about.latent_rgb_factors, about.latent_rgb_factors_bias)
    small = torch.tensor(list(preview.decode_latent_to_preview(latent).convert("RGB").tobytes())).reshape(16, 16, 3)
    image = torch.nn.functional.avg_pool2d(parts.vae.decode(latent).movedim(-1, 1), PIXELS)[0].movedim(0, -1)
    assert (small / 255 - image).square().mean().sqrt() < 0.12


def test_image_to_image_stays_near_its_input(parts: Any) -> None:
    begin = {"samples": drawn(parts, steps=12, sampler="dpmpp_2m")}
    changed = drawn(parts, steps=4, denoise=0.4, latent_image=begin, seed=5)
    other = drawn(parts, steps=12, sampler="dpmpp_2m", seed=5)
    near, far = ((x - begin["samples"]).square().mean() for x in (changed, other))
    assert 0 < near < 0.5 * far


@pytest.mark.parametrize("way", ["SetLatentNoiseMask", "VAEEncodeForInpaint", "InpaintModelConditioning"])
def test_inpainting_changes_what_the_mask_says(parts: Any, way: str) -> None:
    image = parts.vae.decode(drawn(parts, steps=8))
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    prompts = {"positive": encoded(parts.clip, "penguin")}
    if way == "SetLatentNoiseMask":
        (latent,) = stock(way).set_mask({"samples": parts.vae.encode(image)}, mask)
    elif way == "VAEEncodeForInpaint":
        (latent,) = stock(way).encode(parts.vae, image, mask, grow_mask_by=0)
    else:
        positive, negative, latent = stock(way).encode(
            prompts["positive"], parts.negative, image, parts.vae, mask, noise_mask=True
        )
        prompts = {"positive": positive, "negative": negative}
    samples = drawn(parts, steps=4, latent_image=latent, **prompts)
    left, right = (samples - latent["samples"]).square().mean((0, 1, 2)).chunk(2)
    assert left.max() < 1e-6
    assert right.min() > 1e-2


def low_rank(model: Any, key: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA file for one weight, under its generic name."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = model.model.state_dict()[key + ".weight"].shape
    up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
    return {f"{key}.lora_up.weight": 0.1 * up, f"{key}.lora_down.weight": 0.1 * down}


def test_a_lora_changes_the_picture_and_is_noticed(pack: Any, parts: Any) -> None:
    import comfy.sd  # noqa: PLC0415

    lora = low_rank(parts.model, "diffusion_model.blocks.1.qkv")
    rank = torch.ones(parts.clip.cond_stage_model.words.vectors.weight.shape[0], 1)
    lora["text_encoders.words.vectors.lora_up.weight"] = rank
    lora["text_encoders.words.vectors.lora_down.weight"] = 0.1 * torch.ones(1, parts.positive[0][0].shape[-1])
    plain = drawn(parts)
    model, clip = comfy.sd.load_lora_for_models(parts.model, parts.clip, lora, 1.0, 1.0)
    assert not torch.allclose(drawn(parts, model=model), plain)
    torch.testing.assert_close(encoded(clip, "strawberry")[0][0], parts.positive[0][0] + 0.1)
    torch.testing.assert_close(encoded(parts.clip, "strawberry")[0][0], parts.positive[0][0])
    torch.testing.assert_close(drawn(parts), plain)
    assert pack.nodes.pairing.loras(model) != pack.nodes.pairing.loras(parts.model) == "none"


def test_attention_can_be_replaced(parts: Any) -> None:
    seen = []

    def override(function: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(arguments[0].shape)
        return function(*arguments, **options)

    model = parts.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    torch.testing.assert_close(drawn(parts, steps=1, model=model), drawn(parts, steps=1), rtol=0, atol=1e-4)
    assert len(seen) == len(parts.model.model.diffusion_model.blocks)


@pytest.mark.parametrize("name", ["amed", "amed_ipndm"])
def test_k_sampler_equals_the_core(pack: Any, parts: Any, name: str) -> None:
    """Also the features, which a predictor reads, and the noise levels."""
    config = pack.amed_core.student_config(
        name, 5, pack.nodes.pairing.model_facts(parts.model, bottleneck=True), guidance=CFG
    )
    made = pack.nodes.values.NotedPredictor(AMEDPredictor(config, torch.Generator().manual_seed(1)))
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(parts.model, made).args
    theirs = k_sample(parts, applied, 5, CFG, name, "amed", latent=torch.zeros(1, *SHAPE))
    ours = sample(
        PicturesDenoiser(CFG).for_prompts(["strawberry"]),
        torch.randn(1, *SHAPE, generator=torch.manual_seed(3)),
        made.predictor.method(),
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3)


def test_what_a_predictor_sees_is_the_middle_of_the_positive_rows(pack: Any, parts: Any) -> None:
    import comfy.samplers  # noqa: PLC0415

    seen = []

    class Look(comfy.samplers.Sampler):
        def sample(self, guider: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, *_: Any) -> Any:
            denoiser = pack.nodes.bridge.ComfyDenoiser(guider, extra_args, sigmas.tolist(), bottleneck=True)
            seen.append(denoiser(noise, sigmas[0])[1])
            return noise

    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    guider = comfy.samplers.CFGGuider(parts.model)
    guider.set_conds(parts.positive, parts.negative)
    guider.set_cfg(CFG)
    with torch.inference_mode():
        guider.sample(x, torch.zeros_like(x), Look(), torch.tensor([0.7, 0.0]), disable_pbar=True, seed=0)
        expected = PicturesDenoiser().for_prompts(["strawberry"] * 2)(x, torch.tensor(0.7))[1]
    torch.testing.assert_close(seen[0], pool(expected), rtol=1e-3, atol=1e-3)


def test_its_fingerprint_is_the_cores(pack: Any, parts: Any) -> None:
    found = pack.nodes.pairing.fingerprint(parts.model)
    assert {key: found[key] for key in FINGERPRINT} == pytest.approx(FINGERPRINT)


@pytest.mark.parametrize("gradient", ["finite difference", "reverse"])
def test_the_training_node_trains_on_it(pack: Any, parts: Any, gradient: str) -> None:
    made, *_ = train(pack, parts, paper=True, cfg=CFG, trajectories=4, gradient=gradient)
    assert made.config.features == "bottleneck"
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(parts.model, made).args
    assert drawn(parts, steps=5, sampler="amed", model=applied, scheduler="amed").isfinite().all()


def test_the_default_student_trains_on_several_prompts(pack: Any, parts: Any) -> None:
    made, *_ = train(
        pack,
        parts,
        cfg=CFG,
        steps=3,
        trajectories=4,
        teacher_calls=8,
        prompts="strawberry\npenguin\nrocket\ntulip",
        clip=parts.clip,
    )
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(parts.model, made).args
    samples = drawn(parts, sampler="amed_multistep", model=applied, scheduler="amed")
    assert samples.shape == (1, *SHAPE)
    assert samples.isfinite().all()


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("pictures_*.safetensors")), ids=lambda file: file.stem)
def test_shipped_predictors_load_apply_and_beat_euler(pack: Any, parts: Any, file: Path) -> None:
    made = pack.nodes.values.NotedPredictor(load_predictor(file))
    config = made.config
    applied, *_ = pack.nodes.AMEDApplyPredictor.execute(parts.model, made).args
    settings = {"latent_image": empty(128, 128, batch=4), "cfg": config.guidance}
    slow = drawn(parts, steps=60, sampler="heun", **settings)
    name = pack.amed_core.samplers.sampler_name(made.config)
    ours = drawn(parts, config.calls, name, model=applied, scheduler="amed", **settings)
    stock = drawn(parts, config.calls, "euler", **settings)
    assert (ours - slow).square().mean() < (stock - slow).square().mean()
