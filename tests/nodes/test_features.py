"""What the predictor sees: the same, whatever else ComfyUI evaluates in the same model call."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import SPECS, UNETS, Family, make, prompt
from stock import stock
from toys import apply, dual_cfg, guided, inside, k_sample, predictor, seen

from amed_core import evaluate
from amed_core.features import look_at_latent, pool


def basic(family: Family, model: Any = None) -> Any:
    return stock("BasicGuider", model=model or family.model, conditioning=family.positive)[0]


def other_length(family: Family) -> Any:
    """Prompts whose token counts do not fit one batch are evaluated one after the other."""
    return guided(family, negative=prompt("sd15", 2, tokens=7))


def dual(style: str) -> Callable[[Family], Any]:
    def make_guider(family: Family) -> Any:
        return dual_cfg(family, prompt("sd15", 4), style=style)

    return make_guider


def perp_neg(family: Family) -> Any:
    prompts = {"positive": family.positive, "negative": family.negative, "empty_conditioning": prompt("sd15", 4)}
    return stock("PerpNegGuider", model=family.model, **prompts, cfg=3.0)[0]


def perturbed(family: Family) -> Any:
    return guided(family, stock("PerturbedAttentionGuidance", model=family.model, scale=3.0)[0])


def self_attention(family: Family) -> Any:
    return guided(family, stock("SelfAttentionGuidance", model=family.model, scale=0.5, blur_sigma=2.0)[0])


GUIDERS = {
    "cfg": guided,
    "cfg 1": lambda family: guided(family, cfg=1.0),
    "prompts of other lengths": other_length,
    "DualCFG": dual("regular"),
    "DualCFG nested": dual("nested"),
    "PerpNeg": perp_neg,
    "PAG": perturbed,
    "SAG": self_attention,
}


@pytest.fixture(scope="module")
def sd15(pack: Any) -> Family:
    del pack
    return make("sd15")


@pytest.mark.parametrize("guider", GUIDERS)
def test_the_bottleneck_is_that_of_the_positive_prompt_under_every_guider(pack: Any, sd15: Family, guider: str) -> None:
    torch.testing.assert_close(
        seen(pack, GUIDERS[guider](sd15), sd15), seen(pack, basic(sd15), sd15), rtol=1e-4, atol=1e-5
    )


def test_the_negative_prompts_bottleneck_is_another(pack: Any, sd15: Family) -> None:
    """Else the tests above could not fail."""
    swapped = guided(sd15, cfg=1.0, positive=sd15.negative)
    assert not torch.allclose(seen(pack, swapped, sd15), seen(pack, basic(sd15), sd15), rtol=1e-2)


def test_the_bottleneck_does_not_depend_on_how_rows_are_batched(
    pack: Any, sd15: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory ComfyUI asks for one conditioning at a time."""
    import comfy.model_management  # noqa: PLC0415

    together = seen(pack, guided(sd15), sd15)
    calls = []
    original = sd15.model.model.apply_model

    def count(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        calls.append(len(x))
        answer: torch.Tensor = original(x, *rest, **more)
        return answer

    monkeypatch.setattr(sd15.model.model, "apply_model", count)
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda device=None, torch_free_too=False: (1, 1) if torch_free_too else 1,
    )
    apart = seen(pack, guided(sd15), sd15)
    assert calls == [2, 2], "one call per conditioning"
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_two_positive_prompts_are_averaged(pack: Any, sd15: Family) -> None:
    other = prompt("sd15", 4)
    both = seen(pack, guided(sd15, positive=sd15.positive + other), sd15)
    each = [seen(pack, guided(sd15, positive=p), sd15) for p in (sd15.positive, other)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-5)


def test_a_prompt_for_an_area_is_seen_in_its_area(pack: Any, sd15: Family) -> None:
    """The area is cropped out for the model; the negative prompt still covers all."""
    left = stock("ConditioningSetArea", conditioning=sd15.positive, width=64, height=128)[0]
    features = seen(pack, guided(sd15, positive=left), sd15)
    assert features.shape == (2, 8, 8)
    torch.testing.assert_close(features, seen(pack, guided(sd15, cfg=1.0, positive=left), sd15), rtol=1e-4, atol=1e-5)


def test_the_bottleneck_is_what_the_middle_block_gives(pack: Any, sd15: Family) -> None:
    """ComfyUI's own module, watched by a hook."""
    answers = []
    middle = sd15.model.model.diffusion_model.middle_block[-1]
    handle = middle.register_forward_hook(lambda module, inputs, output: answers.append(output.cpu()))
    try:
        features = seen(pack, guided(sd15, cfg=1.0), sd15)
    finally:
        handle.remove()
    torch.testing.assert_close(features, pool(answers[0].mean(1)))


@pytest.mark.parametrize("name", SPECS)
def test_looking_changes_nothing(pack: Any, name: str) -> None:
    family = make(name)
    bridge = pack.nodes.bridge

    def answers(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> list[torch.Tensor]:
        denoisers = [bridge.ComfyDenoiser(model, extra_args, sigmas.tolist(), bottleneck=b) for b in (True, False)]
        direct = model(x, sigmas[:1].expand(len(x)), **extra_args)
        return [direct, *(evaluate(denoiser, x, sigmas[0]).denoised for denoiser in denoisers)]

    direct, watched, unwatched = inside(guided(family), family, answers)
    assert (direct == watched).all()
    assert (direct == unwatched).all()


@pytest.mark.parametrize("name", SPECS)
def test_a_bottleneck_exists_in_u_nets_only(pack: Any, name: str) -> None:
    family = make(name)

    def features(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any) -> Any:
        return evaluate(
            pack.nodes.bridge.ComfyDenoiser(model, extra_args, [0.7], bottleneck=True), x, sigmas[0]
        ).features

    found = inside(guided(family), family, features)
    assert (found is not None) == (name in UNETS)


@pytest.mark.parametrize("name", SPECS)
def test_the_latent_is_seen_in_every_family_alike(pack: Any, name: str) -> None:
    family = make(name)
    features = seen(pack, guided(family), family, "latent")
    assert features.shape == (SPECS[name].batch, 2, 8, 8)
    assert features.isfinite().all()
    assert features[:, 0].std() > 0
    assert features[:, 1].std() > 0


def test_packed_latents_are_seen_in_their_own_shapes(pack: Any) -> None:
    """Newer ComfyUI samples video with audio as one flat (batch, 1, elements), and says in which shapes."""
    video, audio = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 6, 50)
    packed = torch.cat([part.reshape(2, 1, -1) for part in (video, audio)], dim=-1)
    inner = SimpleNamespace(latent_shapes=[video.shape, audio.shape])
    guider = SimpleNamespace(inner_model=inner, conds={"positive": [{"model_conds": {}}]}, model_options={})
    look = pack.nodes.bridge.look(SimpleNamespace(features="latent"), guider)
    start = evaluate(lambda x, sigma: x / 2, packed, torch.tensor(0.5))
    parts = [look_at_latent(replace(start, x=part, denoised=part / 2)) for part in (video, audio)]
    torch.testing.assert_close(look(start), (parts[0] + parts[1]) / 2)


def test_latents_of_one_shape_are_not_unpacked(pack: Any) -> None:
    """Newer ComfyUI names the shape of ordinary latents, too; 0.3.64 names none."""
    x = torch.randn(2, 4, 8, 8)
    start = evaluate(lambda x, sigma: x / 2, x, torch.tensor(0.5))
    for inner in (SimpleNamespace(), SimpleNamespace(latent_shapes=None), SimpleNamespace(latent_shapes=[x.shape])):
        guider = SimpleNamespace(inner_model=inner, conds={"positive": []}, model_options={})
        look = pack.nodes.bridge.look(SimpleNamespace(features="latent"), guider)
        assert (look(start) == look_at_latent(start)).all()


@pytest.mark.parametrize("sign", ["frames", "windows"])
def test_the_frames_of_one_video_share_their_plan(pack: Any, sign: str) -> None:
    """Where the batch is a video (SVD, or windows that slide over the batch), frames must not part in noise level."""
    conds = [{"model_conds": {"num_video_frames": 4} if sign == "frames" else {}}]
    options = {} if sign == "frames" else {"context_handler": SimpleNamespace(dim=0)}
    guider = SimpleNamespace(inner_model=SimpleNamespace(), conds={"positive": conds}, model_options=options)
    start = evaluate(lambda x, sigma: x / 2, torch.randn(4, 4, 8, 8), torch.tensor(0.5))
    features = pack.nodes.bridge.look(SimpleNamespace(features="latent"), guider)(start)
    torch.testing.assert_close(features, look_at_latent(start).mean(0, keepdim=True))


@pytest.mark.trust("threads")
def test_several_threads_may_report_chunks_of_one_call(pack: Any) -> None:
    """As newer ComfyUI does with several GPUs."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    bottleneck = pack.nodes.bridge.Bottleneck({"a", "b"})
    chunks = {name: torch.randn(2, 5, 8, 8) for name in ("a", "b", "c")}

    def report(name: str) -> None:
        bottleneck.patch(chunks[name], chunks[name], {"block": ("output", 0), "uuids": [name]})

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(report, chunks))
    expected = (pool(chunks["a"]) + pool(chunks["b"])) / 2
    torch.testing.assert_close(bottleneck.take(torch.zeros(2, 4, 8, 8)), expected)
    assert bottleneck.take(torch.zeros(2, 4, 8, 8)) is None, "a finished call is forgotten"


@pytest.mark.parametrize(
    ("name", "features"), [("sd15", "bottleneck"), ("sd15", "latent"), ("wan21", "latent"), ("wan21", "none")]
)
def test_a_picture_does_not_depend_on_its_batch_mates(pack: Any, name: str, features: str) -> None:
    both = make(name)
    applied = apply(pack, both, predictor(pack, both, features=features, guidance=3.0))
    together = k_sample(both, applied, 5, 3.0)
    # The other half of the batch is the same as before only for the first sample: noise is drawn one after the other.
    alone = k_sample(both, applied, 5, 3.0, latent=both.latent["samples"][:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
