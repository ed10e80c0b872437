"""KSampler's sampler `amed` on a MODEL without a predictor: which file of the models folder it takes."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, make
from toys import apply, image, k_sample, predictor


@pytest.fixture
def family(pack: Any) -> Family:
    del pack
    return make("flux")


def saved(pack: Any, family: Family, models: Path, name: str, *, seed: int = 1, age: int = 0, **changes: Any) -> Any:
    """A predictor in a file of so many hours."""
    made = multistep(pack, family, seed=seed, **changes)
    path = models / f"{name}.safetensors"
    pack.amed_core.files.save_predictor(made.every, path)
    written = path.stat().st_mtime - 3600 * age
    os.utime(path, (written, written))
    return made


def multistep(pack: Any, family: Family, calls: int = 5, seed: int = 1, **changes: Any) -> Any:
    """A table whose weights are moved a little at random."""
    config = pack.amed_core.student_config("amed_multistep", calls, pack.nodes.pairing.model_facts(family.model))
    table = pack.amed_core.predictor.build(replace(config, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in table.parameters():
            weight.add_(0.05 * torch.rand(weight.shape, generator=generator))
    return pack.nodes.values.NotedPredictor(table)


def text_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def drawn(family: Family, model: Any = None, sampler: str = "amed", **how: Any) -> torch.Tensor:
    return k_sample(family, model or family.model, 5, 1.0, sampler, **how)


def test_the_newest_that_fits_is_taken_and_named(
    pack: Any, family: Family, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(pack, family, models, "old", seed=1, age=2)
    newer = saved(pack, family, models, "newer", seed=2, age=1)
    saved(pack, family, models, "of other calls", calls=4)
    saved(pack, family, models, "of another cfg", seed=3, guidance=4.0)
    saved(pack, family, models / "unfinished", "stopped", seed=4)
    (models / "broken.safetensors").write_bytes(b"none")
    (models / "leads nowhere.safetensors").symlink_to(models / "gone")
    caplog.set_level("INFO")
    by_itself = drawn(family)
    assert torch.equal(by_itself, drawn(family, apply(pack, family, newer)))
    assert "5 calls with newer.safetensors." in text_of(caplog)
    assert "broken.safetensors is left alone" in text_of(caplog)


def test_one_of_another_checkpoint_or_other_patches_is_not_taken(pack: Any, family: Family, models: Path) -> None:
    saved(pack, family, models, "of this one")
    other = make("flux", seed=1)
    patched = family.model.clone()
    patched.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"])
    find = pack.nodes.finding.found
    sampling = family.model.get_model_object("model_sampling")
    levels = pack.nodes.own_grid.placeholder(sampling, 5).tolist()

    def name(model: Any, cfg: float = 1.0) -> str | None:
        guider = guider_for(pack, model, cfg)
        found = find(guider, levels)
        return None if found is None else found.name

    assert name(family.model) == "of this one.safetensors"
    assert name(other.model) is None
    assert name(patched) is None
    assert name(family.model, 2.0) is None


def guider_for(pack: Any, model: Any, cfg: float) -> Any:
    import comfy.samplers  # noqa: PLC0415 - ComfyUI's

    guider = comfy.samplers.CFGGuider(model)
    guider.set_cfg(cfg)
    guider.inner_model = model.model
    return guider


def test_amed_runs_a_predictor_of_any_sampler_and_the_others_insist(pack: Any, family: Family) -> None:
    made = predictor(pack, family, "amed_euler")
    model = apply(pack, family, made)
    assert torch.equal(drawn(family, model), drawn(family, model, sampler="amed_euler"))
    with pytest.raises(ValueError, match='Choose "amed" as sampler_name, which runs every predictor'):
        drawn(family, model, sampler="amed_ipndm")


@pytest.mark.parametrize("sampler", ["amed", "amed_euler", "amed_multistep"])
def test_a_paper_predictors_file_is_taken_on_its_own_levels(
    pack: Any, family: Family, models: Path, sampler: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = multistep(pack, family) if sampler == "amed_multistep" else predictor(pack, family, sampler)
    pack.amed_core.files.save_predictor(made.every, models / "one.safetensors")
    caplog.set_level("INFO")
    assert torch.equal(drawn(family), drawn(family, apply(pack, family, made), sampler=sampler))
    assert "5 calls with one.safetensors." in text_of(caplog)


def test_a_start_for_images_of_a_set_is_taken(pack: Any, family: Family, models: Path) -> None:
    """Without a predictor denoise 0.5 begins in the middle of twice the steps, and the set has a start there."""
    sampling = family.model.get_model_object("model_sampling")
    piece = pack.nodes.own_grid.placeholder(sampling, 10)[5:].tolist()
    level = piece[0]
    grid = (level, 0.6 * level, 0.4 * level, 0.2 * level, 0.1 * level, 0.0)
    whole, half = multistep(pack, family), multistep(pack, family, seed=2, sigmas=grid)
    every = pack.amed_core.predictor.PredictorSet((whole.predictor, half.predictor))
    pack.amed_core.files.save_predictor(every, models / "both.safetensors")
    found = pack.nodes.finding.found(guider_for(pack, family.model, 1.0), piece)
    assert found.levels == pytest.approx(grid)
    for ours, theirs in zip(found.one.parameters(), half.predictor.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    begin = image(family)
    assert torch.equal(*(drawn(family, latent=begin, denoise=0.5) for _ in range(2)))


def test_who_wants_to_learn_learns(pack: Any, family: Family, models: Path) -> None:
    """AMED Learn with another mode than "automatically" says so."""
    saved(pack, family, models, "one")
    never = pack.nodes.learning.AMEDLearn.execute(family.model, "never", 4, 24, False).args[0]
    assert not torch.equal(drawn(family), drawn(family, never))
