"""What people do, from the first click to the picture."""

import json
from typing import Any

import graphs
import pytest
from graphs import MODEL, Graph, node
from pages import opened, press_run, put, put_workflow, run, saved_template, texts, wait_idle


def test_a_newcomers_path(page: Any, server: Any) -> None:
    """Template, Run, pictures; another loader in its place, Run, and Run again: no value is copied."""
    put_workflow(page, saved_template(1))
    press_run(page)
    first = wait_idle(page, server)
    assert first["status"]["status_str"] == "success"
    assert [len(one["images"]) for one in first["outputs"].values() if "images" in one] == [4, 4], "ours and stock"
    own = saved_template(2)
    for one in own["nodes"]:
        if one["type"] == "CheckpointLoaderSimple":  # the one action: another loader in its place
            one["type"], one["widgets_values"] = "AMEDDemoCheckpoint", []
            one["inputs"] = []
        if one["type"] == "EmptyLatentImage":
            one["widgets_values"][:2] = [128, 128]
    put_workflow(page, own)
    learned = server.base / "user" / "amed_learned"
    for _ in range(2):
        press_run(page)
        assert wait_idle(page, server)["status"]["status_str"] == "success"
        assert list(learned.glob("*.safetensors")), "the first picture taught"


def test_training_is_cancelled_and_goes_on(page: Any, server: Any) -> None:
    states = server.base / "user" / "amed_training"
    others = set(states.glob("*.safetensors"))
    graph = graphs.demo() | {"train": graphs.train(seed=11, effort="standard", save_as="cancelled")}
    put(page, graph)
    press_run(page)
    page.wait_for_timeout(3000)
    page.evaluate("() => fetch('/interrupt', {method: 'POST'})")
    assert wait_idle(page, server)["status"]["status_str"] == "error", "as ComfyUI calls what was interrupted"
    assert len(set(states.glob("*.safetensors")) - others) == 1
    press_run(page)
    assert wait_idle(page, server)["status"]["status_str"] == "success"
    assert set(states.glob("*.safetensors")) == others
    assert (server.base / "models" / "amed_predictors" / "cancelled_00001_.safetensors").is_file()


OTHERWISE = {  # what is chosen in KSampler beside a multistep predictor for 5 calls; and what stands on the node
    "wrong steps": ({"steps": 7}, "learning 1 of 8"),
    "wrong cfg": ({"cfg": 4.0}, "Set cfg 1."),
    "wrong sampler": ({"sampler_name": "euler"}, 'Set sampler_name "amed".'),
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_a_wrong_choice_is_told_on_the_sampling_node(page: Any, server: Any, how: str) -> None:
    changes, said = OTHERWISE[how]
    sampler = graphs.k_sampler(["apply", 0], "amed", "amed", 5)
    sampler["inputs"] |= changes
    graph = graphs.demo(batch=2) | {
        "load": node("AMEDLoadPredictor", predictor_name="digits_amed_multistep_5.safetensors"),
        "apply": graphs.apply(["load", 0]),
        "sample": sampler,
        **graphs.save_image(["sample", 0], "otherwise"),
    }
    heard = said in run(page, server, graph)
    assert heard or how == "wrong steps", "which goes on to say what it learned"
    if how == "wrong steps":
        assert "learned from" in texts(page)


def test_two_browsers_at_once_have_their_own_pictures_and_texts(page: Any, browser: Any, server: Any) -> None:
    """Nodes of one number in both."""
    both = {"first": page, "second": opened(browser, server)}
    for name, one in both.items():
        put(one, drawing(name))
        one.evaluate("() => app.graph.arrange()")
    for one in both.values():
        press_run(one)
    assert wait_idle(page, server)["status"]["status_str"] == "success"
    for name, other in zip(both, reversed(both), strict=True):
        shown = texts(both[name])
        assert f"Saved as {name}_" in shown
        assert f"Saved as {other}_" not in shown
        pictures = json.dumps(both[name].evaluate("() => app.nodeOutputs"))
        assert f"{name}_00001_.png" in pictures
        assert f"{other}_00001_.png" not in pictures
    assert not both["second"].of_ours
    both["second"].context.close()


def drawing(name: str) -> Graph:
    """A picture, and a predictor that is saved, both under a name."""
    return graphs.demo(batch=1) | {
        "load": node("AMEDLoadPredictor", predictor_name="digits_amed_multistep_5.safetensors"),
        "file": node("AMEDSavePredictor", predictor=["load", 0], filename_prefix=name),
        "sample": graphs.k_sampler(MODEL, "euler", "karras", 3),
        **graphs.save_image(["sample", 0], name),
    }
