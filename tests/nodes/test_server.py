"""The whole job in a real ComfyUI, through its HTTP API, as a user's browser drives it."""

import json
import time
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from graphs import LATENT, MODEL, NEGATIVE, POSITIVE, VAE, Graph, node
from PIL import Image
from safetensors.torch import load_file

TYPES = ["amed", "amed_euler", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m", "amed_dpmpp_3m"]
SCHEDULER = "amed"
STOCK = {  # the same solver without a predictor, at 5 model calls
    "amed": ("dpm_2", 3),  # two calls per step, one in the step that ends at 0
    "amed_euler": ("euler", 5),
    "amed_dpm_2": ("dpm_2", 3),
    "amed_ipndm": ("ipndm", 5),
    "amed_dpmpp_2m": ("dpmpp_2m", 5),
    "amed_dpmpp_3m": ("dpmpp_2m", 5),  # ComfyUI has no deterministic dpmpp_3m
}


def latents(server: Any, outputs: dict[str, Any], name: str) -> torch.Tensor:
    saved = outputs[name]["latents"][0]
    return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


def sampled(server: Any, graph: Graph, sampler: dict[str, Any]) -> torch.Tensor:
    """The latent that `sampler`, added to `graph`, gives."""
    graph = graph | {"sample": sampler, "save": graphs.save_latent(["sample", 0], "test")}
    return latents(server, server.run(graph), "save")


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.fixture(scope="module")
def converged(server: Any) -> torch.Tensor:
    """The same noise through Heun's method in 400 steps."""
    return sampled(server, graphs.demo(), graphs.k_sampler(MODEL, "heun", "karras", 400))


def test_apply_sets_the_widgets_of_k_sampler_and_custom_sampling(server: Any) -> None:
    """Nothing is to be copied by hand: its outputs fit KSampler's widgets, in ComfyUI's own validation, too."""
    shipped = next(iter(graphs.PREDICTORS.glob("digits_amed_5*"))).name
    applied = graphs.demo() | {
        "load": node("AMEDLoadPredictor", predictor_name=shipped),
        "apply": graphs.apply(["load", 0]),
    }
    by_hand = sampled(server, applied, graphs.k_sampler(["apply", 0], "amed", "amed", 5))
    linked = {"sampler": ["apply", 3], "scheduler": ["apply", 4], "steps": ["apply", 5], "cfg": ["apply", 6]}
    assert torch.equal(sampled(server, applied, graphs.k_sampler(["apply", 0], **linked)), by_hand)
    custom = node(
        "SamplerCustom", model=["apply", 0], add_noise=True, noise_seed=7, cfg=["apply", 6], positive=POSITIVE,
        negative=NEGATIVE, sampler=["apply", 1], sigmas=["apply", 2], latent_image=LATENT,
    )  # fmt: skip
    assert torch.equal(sampled(server, applied, custom), by_hand)


@pytest.mark.parametrize("sampler", TYPES)
def test_train_save_apply_sample_decode(server: Any, converged: torch.Tensor, sampler: str) -> None:
    graph = graphs.demo() | {
        "train": graphs.train_paper(sampler),
        "file": node("AMEDSavePredictor", predictor=["train", 0], filename_prefix=f"test/{sampler}"),
        "apply": graphs.apply(["train", 0]),
        "sample": graphs.k_sampler(["apply", 0], sampler, "amed", 5),
        "latent": graphs.save_latent(["sample", 0], sampler),
        **graphs.save_image(["sample", 0], sampler),
    }
    outputs = server.run(graph)
    picture = outputs["image"]["images"]
    assert len(picture) == 10
    with Image.open(server.base / "output" / picture[0]["subfolder"] / picture[0]["filename"]) as image:
        assert image.size == (128, 128)

    # The saved file, loaded in a graph of its own, is the same sampler.
    name = outputs["file"]["text"][0]
    assert (server.base / "models" / "amed_predictors" / name).exists()
    loaded = graphs.demo() | {
        "load": node("AMEDLoadPredictor", predictor_name=name),
        "apply": graphs.apply(["load", 0]),
    }
    again = sampled(server, loaded, graphs.k_sampler(["apply", 0], sampler, "amed", 5))
    ours = latents(server, outputs, "latent")
    torch.testing.assert_close(again, ours, rtol=0, atol=0)

    name, steps = STOCK[sampler]
    stock = sampled(server, graphs.demo(), graphs.k_sampler(MODEL, name, "karras", steps))
    print(f"{sampler}: error {rmse(ours, converged):.4f}, stock {name} {rmse(stock, converged):.4f} at 5 model calls")
    if sampler == "amed":
        assert rmse(ours, converged) < rmse(stock, converged)


def test_sampler_custom_advanced_equals_k_sampler(server: Any) -> None:
    base = graphs.demo() | {"load": node("AMEDLoadPredictor", predictor_name="digits_amed_5.safetensors")}
    custom = base | {
        "guider": node("CFGGuider", model=MODEL, positive=POSITIVE, negative=NEGATIVE, cfg=1.0),
        "noise": node("RandomNoise", noise_seed=7),
        "sampler": node("AMEDSampler", predictor=["load", 0]),
        "sigmas": node("AMEDScheduler", predictor=["load", 0], denoise=1.0),
    }
    advanced = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["sampler", 0],
        sigmas=["sigmas", 0],
        latent_image=LATENT,
    )
    applied = base | {"apply": graphs.apply(["load", 0])}
    torch.testing.assert_close(
        sampled(server, custom, advanced),
        sampled(server, applied, graphs.k_sampler(["apply", 0], "amed", "amed", 5)),
        rtol=0,
        atol=0,
    )


def test_errors_name_the_node_or_the_entry(server: Any) -> None:
    shipped = {"load": node("AMEDLoadPredictor", predictor_name="digits_amed_5.safetensors")}
    applied = graphs.demo() | shipped | {"apply": graphs.apply(["load", 0])}
    output = {"save": graphs.save_latent(["sample", 0], "test")}

    def message(model: Any, sampler: str, scheduler: str, steps: int) -> str:
        graph = applied | output | {"sample": graphs.k_sampler(model, sampler, scheduler, steps)}
        return server.fail(graph)

    assert "AMED Apply Predictor" in message(MODEL, "amed_ipndm", "karras", 5)
    assert 'Choose "amed" as sampler_name' in message(["apply", 0], "amed_ipndm", "amed", 5)
    assert "Set steps to 5" in message(["apply", 0], "amed", "amed", 8)


@pytest.mark.parametrize("applied", [False, True], ids=["no predictor", "predictor"])
def test_another_sampler_with_our_scheduler_draws_soundly_and_says_what_it_lacks(
    server: Any, converged: torch.Tensor, applied: bool
) -> None:
    load = {"load": node("AMEDLoadPredictor", predictor_name="digits_amed_5.safetensors")}
    graph = graphs.demo() | (load | {"apply": graphs.apply(["load", 0])} if applied else {})
    model = ["apply", 0] if applied else MODEL
    stock = rmse(sampled(server, graph, graphs.k_sampler(model, "euler", "simple", 10)), converged)
    before = server.log().count('Set sampler_name "amed".')
    drawn = sampled(server, graph, graphs.k_sampler(model, "euler", SCHEDULER, 10))
    assert rmse(drawn, converged) < stock
    said = "euler leaves the predictor unused" if applied else "euler learns nothing"
    assert server.log().count('Set sampler_name "amed".') == before + 1
    assert said in server.log()
    sampled(server, graph, graphs.k_sampler(model, "amed", SCHEDULER, 5))
    linked = {"name": node("KSamplerSelect", sampler_name="euler")}
    custom = {
        "sigmas": node("BasicScheduler", model=model, scheduler=SCHEDULER, steps=5, denoise=1.0),
        "guider": node("CFGGuider", model=model, positive=POSITIVE, negative=NEGATIVE, cfg=1.0),
        "noise": node("RandomNoise", noise_seed=7),
    }
    sockets = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["name", 0], "sigmas": ["sigmas", 0]}
    sampled(server, graph | linked | custom, node("SamplerCustomAdvanced", **sockets, latent_image=LATENT))
    assert server.log().count('Set sampler_name "amed".') == before + 1, "of our own, and of what nobody sees"


def test_k_sampler_alone_learns_and_the_learned_set_is_listed(server: Any, converged: torch.Tensor) -> None:
    """The first run draws slowly; the next one, of another seed, is nearer to the truth than stock is."""
    for folder in ("models/amed_predictors", "user/amed_learned"):
        for file in (server.base / folder).rglob("*.safetensors"):
            file.unlink()  # of other tests: KSampler alone would take one that fits
    sampler = graphs.k_sampler(MODEL, "amed", "amed", 5)
    first = sampled(server, graphs.demo(), sampler)
    again = sampled(server, graphs.demo(), sampler | {"inputs": sampler["inputs"] | {"seed": 8}})
    assert not torch.equal(first, again)
    assert rmse(first, converged) < 0.1
    assert list((server.base / "user" / "amed_learned").glob("*.safetensors"))
    options = json.dumps(server.get("/object_info/AMEDLoadPredictor"))
    assert "learned/" in options
    (name,) = {text for text in options.split('"') if text.startswith("learned/") and "5 calls" in text}
    loaded = graphs.demo() | {
        "load": node("AMEDLoadPredictor", predictor_name=name),
        "apply": graphs.apply(["load", 0]),
    }
    fast = sampled(server, loaded, graphs.k_sampler(["apply", 0], "amed_multistep", "amed", 5))
    stock = sampled(server, graphs.demo(), graphs.k_sampler(MODEL, "ipndm", "karras", 5))
    assert rmse(fast, converged) < rmse(stock, converged)


def test_denoise_below_one_keeps_the_number_of_calls(server: Any) -> None:
    graph = graphs.demo() | {
        "load": node("AMEDLoadPredictor", predictor_name="digits_amed_5.safetensors"),
        "apply": graphs.apply(["load", 0]),
        "first": graphs.k_sampler(["apply", 0], "amed", "amed", 5),
    }
    again = graphs.k_sampler(["apply", 0], "amed", "amed", 5, latent_image=["first", 0], denoise=0.4, seed=8)
    first = sampled(server, graph, graph["first"])
    changed = sampled(server, graph, again)
    assert 0 < rmse(first, changed) < rmse(first, first.flip(0)), "img2img must stay near its input, but not at it"


def test_compare_shows_its_sheet_and_refuses_unknown_names_when_queued(server: Any) -> None:
    load = {"load": node("AMEDLoadPredictor", predictor_name="digits_amed_multistep_5.safetensors")}
    about = {"seed": 0, "cfg": 1.0, "steps": "5", "pictures": 2, "against": "dpmpp_2m karras"}
    sockets = {"model": MODEL, "positive": POSITIVE, "negative": NEGATIVE, "latent_image": LATENT, "vae": VAE}
    compare = node("AMEDCompare", **sockets, **about, predictor=["load", 0])
    graph = graphs.demo() | load | {"compare": compare, "table": node("PreviewAny", source=["compare", 2])}
    outputs = server.run(graph)
    (shown,) = outputs["compare"]["images"]
    with Image.open(server.base / "temp" / shown["filename"]) as image:
        assert image.width > image.height / 2
    assert outputs["table"]["text"][0].startswith("5 calls of AMED are as near to the teacher as ")

    graph["compare"]["inputs"]["against"] = "dpmpp_2n karras"
    refused = json.dumps(server.post("/prompt", {"prompt": graph}))
    assert "there is no sampler 'dpmpp_2n'. Did you mean dpmpp_2m?" in refused


def test_an_unknown_predictor_lists_what_there_is(server: Any) -> None:
    graph = graphs.demo() | {"load": node("AMEDLoadPredictor", predictor_name="no.safetensors")}
    graph |= {"apply": graphs.apply(["load", 0]), "sample": graphs.k_sampler(["apply", 0], "amed", "amed", 5)}
    answer = server.post("/prompt", {"prompt": graph | {"save": graphs.save_latent(["sample", 0], "test")}})
    text = str(answer["error"]["node_errors"])
    assert "digits_amed_5.safetensors" in text
    assert "AMED Train Predictor" in text


def test_a_damaged_predictor_file_is_named(server: Any) -> None:
    folder: Path = server.base / "models" / "amed_predictors"
    (folder / "damaged.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    graph = graphs.demo() | {
        "load": node("AMEDLoadPredictor", predictor_name="damaged.safetensors"),
        "apply": graphs.apply(["load", 0]),
        "sample": graphs.k_sampler(["apply", 0], "amed", "amed", 5),
        "save": graphs.save_latent(["sample", 0], "test"),
    }
    assert "damaged.safetensors" in server.fail(graph)


@pytest.mark.trust("load")
def test_cancel_stops_training(server: Any) -> None:
    graph = graphs.demo() | {
        "train": graphs.train(trajectories=100_000),
        "file": node("AMEDSavePredictor", predictor=["train", 0], filename_prefix="never"),
    }
    prompt_id = server.queue(graph)
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(1.0)
    server.post("/interrupt")
    history = server.wait(prompt_id)
    assert "execution_interrupted" in dict(history["status"]["messages"])
    assert not list((server.base / "models" / "amed_predictors").glob("never*"))
