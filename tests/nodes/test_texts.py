"""What stands on our nodes while they run: the first words are few, and only what is wrong begins with a sign."""

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import Family
from toys import apply, dual_cfg, guided, k_sample, predictor, stopped_at, train

LONGEST = 60  # characters of the first sentence, or line: a node at its natural size shows two lines of 40
LONG_NAME = "a_name_that_somebody_chose_to_be_very_long_indeed_and_in_a_folder/too"


@pytest.fixture
def shown(pack: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that a browser is sent, as if a node of each kind ran."""
    texts: list[str] = []
    values = pack.nodes.values
    monkeypatch.setattr(values, "_show", lambda text, node_id: texts.append(text))
    monkeypatch.setattr(values, "get_executing_context", lambda: SimpleNamespace(node_id="1", prompt_id="1"))
    hidden = SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None)
    for node in pack.nodes.NODES:
        monkeypatch.setattr(node, "hidden", hidden, raising=False)
    return texts


def is_warning(pack: Any, text: str) -> bool:
    return text.startswith(pack.nodes.values.WARNING)


def first_words(pack: Any, text: str) -> str:
    """The first sentence, or line, without the sign and without our name."""
    said = text.removeprefix(f"{pack.nodes.values.WARNING} ").removeprefix("AMED: ")
    return re.split(r"\. |\n", said)[0].removesuffix(".")


def check(pack: Any, shown: list[str], *, warned: bool = False) -> None:
    """There are texts, none of them begins with many words, and there is a warning only where one is due."""
    assert shown
    for text in shown:
        assert len(first_words(pack, text)) <= LONGEST, text
    assert any(is_warning(pack, text) for text in shown) == warned, shown


def demo(pack: Any, count: int = 2) -> Family:
    """The bundled digits."""
    model, positive, negative, latent, _ = pack.nodes.AMEDDemoModel.execute("0 to 9", count).args
    return Family(model, positive, negative, latent)


def load(pack: Any, name: str = "digits_amed_multistep_5.safetensors") -> Any:
    return pack.nodes.AMEDLoadPredictor.execute(name).args[0]


@pytest.mark.parametrize("name", ["digits_amed_5", "digits_amed_multistep_5", "pictures_amed_multistep"])
def test_a_loaded_file_says_what_to_set(pack: Any, shown: list[str], name: str) -> None:
    made, plot = pack.nodes.AMEDLoadPredictor.execute(f"{name}.safetensors").args
    assert float(plot.mean()) < 0.2, "dark, as the browser is"
    for number in range(len(made.every.from_noise)):
        color = torch.tensor(pack.nodes.sheets.SERIES[number % 6]) / 255
        assert ((plot - color).abs().amax(-1) < 0.01).sum() > 100, "a line for each number of calls"
    pack.nodes.AMEDSavePredictor.execute(made, LONG_NAME)
    check(pack, shown)
    assert shown[0].startswith("Set steps ")
    assert shown[1].startswith("Saved as a_name_that_some")


def test_merged_predictors_say_what_to_set(pack: Any, shown: list[str], flux: Family) -> None:
    both = [multistep(pack, flux, calls) for calls in (5, 8)]
    pack.nodes.AMEDMergePredictors.execute(*both)
    check(pack, shown)
    assert shown[0].startswith("Set steps 5, 8, cfg 3. ")


def multistep(pack: Any, family: Family, calls: int) -> Any:
    """A predictor of the default kind that has learned nothing."""
    core = pack.amed_core
    facts = pack.nodes.pairing.model_facts(family.model, guided=True)
    config = core.student_config("amed_multistep", calls, facts, guidance=3.0)
    return pack.nodes.values.NotedPredictor(core.predictor.build(config))


@pytest.mark.parametrize("picture", [1, 3], ids=["one", "three"])
def test_learning(pack: Any, shown: list[str], picture: int) -> None:
    family = demo(pack, picture)
    for _ in range(4):
        k_sample(family, family.model, 5, 1.0)
    check(pack, shown)
    assert any("learning 1" in text for text in shown)
    assert any("learned from" in text for text in shown)


@pytest.mark.parametrize("mode", ["never", "from N pictures"])
def test_learning_as_it_was_set(pack: Any, shown: list[str], mode: str) -> None:
    family = demo(pack)
    model = pack.nodes.AMEDLearn.execute(family.model, mode, 1, 24, True).args[0]
    for _ in range(2):
        k_sample(family, model, 5, 1.0)
    check(pack, shown)


def test_what_cannot_be_learned(pack: Any, shown: list[str]) -> None:
    family, learning = demo(pack), pack.nodes.learning
    with pytest.MonkeyPatch.context() as small:
        small.setattr(learning, "MOST_BYTES", 1)
        k_sample(family, family.model, 5, 1.0)
    k_sample(family, family.model, 1, 1.0)
    check(pack, shown, warned=True)
    assert all(is_warning(pack, text) for text in shown)


def broken(model: Any) -> Any:
    """A clone of a MODEL that answers NaN."""
    clone = model.clone()
    clone.set_model_unet_function_wrapper(lambda function, about: about["input"] * torch.nan)
    return clone


def test_a_slow_run_that_fails(pack: Any, shown: list[str]) -> None:
    family = demo(pack)
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            k_sample(family, broken(family.model), 5, 1.0)
    check(pack, shown, warned=True)


OTHERWISE: dict[str, Callable[[Family, Any], Any]] = {
    "another cfg": lambda family, model: k_sample(family, model, 5, 7.0),
    "another scheduler": lambda family, model: k_sample(family, model, 5, 3.0, scheduler="karras"),
    "another start": lambda family, model: k_sample(family, model, 5, 3.0, denoise=0.5),
    "both": lambda family, model: k_sample(family, model, 8, 5.5, scheduler="normal"),
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_a_run_for_which_a_predictor_was_not_made(pack: Any, shown: list[str], flux: Family, how: str) -> None:
    OTHERWISE[how](flux, apply(pack, flux, predictor(pack, flux, guidance=3.0)))
    check(pack, shown, warned=True)
    assert any(re.search(r"AMED: Set (cfg 3|scheduler)", text) for text in shown)


def test_every_difference_is_named_in_few_words(pack: Any, flux: Family) -> None:
    """Of all that a predictor remembers of its model, whatever it is now."""
    pairing = pack.nodes.pairing
    config, found = predictor(pack, flux, guidance=3.0).config, pairing.fingerprint(flux.model)
    for key in pairing.ADVICE:
        there = replace(config, model={**config.model, key: "x" * 100})
        sentences = pairing.differences(there, {**found, key: "y" * 100}, guided(flux, cfg=3.0))
        assert len(sentences) == 1, key
        assert len(first_words(pack, sentences[0])) <= LONGEST, sentences


def test_a_guider_that_shows_too_little(
    pack: Any, shown: list[str], flux: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.samplers  # noqa: PLC0415

    made = multistep(pack, flux, 5)
    (sampler,), (levels,) = pack.nodes.AMEDSampler.execute(made).args, pack.nodes.AMEDScheduler.execute(made, 1.0).args
    noise = torch.randn(flux.latent["samples"].shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        dual_cfg(flux, flux.negative).sample(noise, 0 * noise, sampler, levels, disable_pbar=True, seed=3)
    assert "adds up its answers unseen" in shown[-1]
    own = comfy.samplers.CFGGuider.predict_noise

    def exchanged(self: Any, *more: Any, **named: Any) -> Any:
        return own(self, *more, **named)

    monkeypatch.setattr(comfy.samplers.CFGGuider, "predict_noise", exchanged)
    for model in (apply(pack, flux, made), flux.model):
        k_sample(flux, model, 5, 3.0)
        assert "another pack's code answers here" in shown[-1]
    check(pack, shown, warned=True)


def test_training_that_is_stopped_and_goes_on(pack: Any, shown: list[str], flux: Family) -> None:
    import comfy.model_management as mm  # noqa: PLC0415

    model, _ = stopped_at(flux, 40)
    with pytest.raises(mm.InterruptProcessingException):
        train(pack, flux, model, effort="quick", trajectories=4)
    train(pack, flux, model, effort="quick", trajectories=4, save_as=LONG_NAME)
    assert any("going on from" in text for text in shown)
    assert any("stopped at" in text for text in shown)
    assert any(" left. " in text for text in shown)
    worse = "NOT better" in shown[-1]
    check(pack, shown, warned=worse)


def test_comparing(pack: Any, shown: list[str]) -> None:
    family = demo(pack, 1)
    about = {"positive": family.positive, "negative": family.negative, "cfg": 1.0, "predictor": load(pack)}
    compare = pack.nodes.AMEDCompare.execute
    shown.clear()
    compare(family.model, family.latent, 0, "5", 2, against="gradient_estimation linear_quadratic", **about)
    check(pack, shown)
    assert re.match(r"5 calls (equal|beat) .* of gradient_estimation linear_quadratic\. 5 calls of AMED are", shown[-1])
    shown.clear()
    compare(family.model, family.latent, 0, "5", 1, against="ipndm karras", **(about | {"predictor": spoiled(pack)}))
    check(pack, shown, warned=True)


def spoiled(pack: Any) -> Any:
    """A predictor whose pictures are worse than stock."""
    made = load(pack)
    with torch.no_grad():
        for values in made.predictor.parameters():
            values.mul_(1.5)
    return made
