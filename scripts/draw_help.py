"""Draw the pictures of nodes in the help pages: `web/docs/*/*.jpg`, as a browser shows them after a run.

    python scripts/draw_help.py --server http://127.0.0.1:8188                 # all of them
    python scripts/draw_help.py --server http://127.0.0.1:8188 AMEDSampler     # of one page

It needs a running ComfyUI with this pack, Chromium, and the packages playwright and pillow.
"""

import argparse
import io
import json
import shutil
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

PACK = Path(__file__).parents[1]
sys.path.append(str(PACK / "tests" / "nodes"))
from graphs import Graph, node

PAGES = PACK / "web" / "docs"
WIDTH, SCALE, AROUND = 600, 1.5, 12  # pixels of a picture, of one of the canvas, and around the nodes
LARGEST = 60 * 1024  # bytes of a picture
LEFT, TOP = 260, 220  # where the first node is, clear of the browser's bars
STEP, GAP = 60, 70  # from node to node
READY = "() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100"
PLACE = """([kinds, left, top, step, gap, scale]) => {
    let x = left, y = top, right = 0, seen = 0;
    const rest = [...app.graph._nodes];
    for (const kind of kinds) {
        const [one] = rest.splice(rest.findIndex(node => node.comfyClass === kind), 1);
        one.pos = [x, y];
        [right, x, y] = [Math.max(right, x + one.size[0]), x + step, y + one.size[1] + gap];
    }
    for (const one of rest) one.pos = [-4000, 600 * seen++];
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [0, 0];
    app.canvas.setDirty(true, true);
    const bounds = app.canvas.canvas.getBoundingClientRect();
    const height = y - gap - top + 30;
    return [bounds.x + left * scale, bounds.y + (top - 30) * scale, (right - left) * scale, height * scale];
}"""
PREPARE = """() => app.graph._nodes.forEach(node => {
    const after = node.widgets?.find(widget => widget.name === "control_after_generate");
    if (after) after.value = "fixed";
    node.setSize([370, node.computeSize()[1]]);
})"""
# What is in the cache says nothing on its node.
FORGET = "() => fetch('/free', {method: 'POST', body: JSON.stringify({unload_models: true, free_memory: true})})"
MODEL, CLIP, VAE = (["demo", slot] for slot in range(3))


@dataclass(frozen=True)
class Shot:
    """A picture: a graph, and which kinds of its nodes are seen, from top to bottom."""

    page: str
    name: str
    graph: Graph
    kinds: tuple[str, ...]


def start(words: str = "rocket") -> Graph:
    """What every graph begins with."""
    return {
        "demo": node("AMEDDemoCheckpoint"),
        "positive": node("CLIPTextEncode", clip=CLIP, text=words),
        "negative": node("CLIPTextEncode", clip=CLIP, text=""),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    }


def load(name: str = "pictures_amed_multistep.safetensors") -> dict[str, Any]:
    return node("AMEDLoadPredictor", predictor_name=name)


PROMPTS = {"positive": ["positive", 0], "negative": ["negative", 0]}
ASKED = {**PROMPTS, "latent_image": ["latent", 0]}


def k_sampler(**changes: Any) -> Graph:
    """With a predictor, and what it is for."""
    settings = {"seed": 2026, "steps": 5, "cfg": 3.0, "sampler_name": "amed", "scheduler": "amed", "denoise": 1.0}
    sampler = node("KSampler", model=["apply", 0], **ASKED, **(settings | changes))
    applied = node("AMEDApplyPredictor", model=MODEL, predictor=["load", 0])
    return start() | {"load": load(), "apply": applied, "sample": sampler, **seen(["sample", 0])}


def seen(samples: Any) -> Graph:
    return {
        "decode": node("VAEDecode", samples=samples, vae=VAE),
        "image": node("PreviewImage", images=["decode", 0]),
    }


def saved(number: int) -> dict[str, Any]:
    """A file of this number of steps alone, which a quick training makes."""
    train = {"seed": 0, "cfg": 3.0, "steps": str(number), "effort": "quick", "budget": 0.0, "starts": "noise"}
    return node("AMEDTrainPredictor", model=MODEL, **ASKED, trajectories=0, **train, save_as=f"demo_{number}")


def custom() -> Graph:
    sockets = {"sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
    more = {"add_noise": True, "noise_seed": 2026, "cfg": 3.0}
    return start() | {
        "load": load(),
        "sampler": node("AMEDSampler", predictor=["load", 0]),
        "sigmas": node("AMEDScheduler", predictor=["load", 0], denoise=1.0, steps=5),
        "sample": node("SamplerCustom", model=MODEL, **PROMPTS, **sockets, **more),
        **seen(["sample", 0]),
    }


def shots() -> list[Shot]:
    """All pictures, and first of all the files that some of them load."""
    two = {
        "load": load("demo_5_00001_.safetensors"),
        "other": load("demo_8_00001_.safetensors"),
        "merge": node("AMEDMergePredictors", predictor=["load", 0], other=["other", 0]),
        "save": node("AMEDSavePredictor", predictor=["merge", 0], filename_prefix="demo"),
    }
    one = {
        "load": load("demo_5_00001_.safetensors"),
        "save": node("AMEDSavePredictor", predictor=["load", 0], filename_prefix="sdxl/portraits"),
    }
    training = saved(5)
    training["inputs"] |= {"effort": "standard", "clip": CLIP, "prompts": "rocket\nstrawberry"}
    train = start("bear") | {"train": training}
    three = "AMEDLoadPredictor", "AMEDApplyPredictor", "KSampler"
    sampler = "AMEDLoadPredictor", "AMEDSampler", "AMEDScheduler", "SamplerCustom"
    merge = "AMEDLoadPredictor", "AMEDLoadPredictor", "AMEDMergePredictors", "AMEDSavePredictor"
    return [
        Shot("", "5 calls", start() | {"train": saved(5)}, ()),
        Shot("", "8 calls", start() | {"train": saved(8)}, ()),
        Shot("AMEDApplyPredictor", "graph", k_sampler(), three),
        Shot("AMEDApplyPredictor", "warning", k_sampler(cfg=7.0), ("KSampler",)),
        Shot("AMEDLoadPredictor", "graph", k_sampler(), three[:2]),
        Shot("AMEDMergePredictors", "graph", two, merge),
        Shot("AMEDSampler", "graph", custom(), sampler),
        Shot("AMEDSavePredictor", "graph", one, ("AMEDLoadPredictor", "AMEDSavePredictor")),
        Shot("AMEDTrainPredictor", "node", train, ("AMEDTrainPredictor",)),
    ]


def draw(page: Any, server: str, shot: Shot) -> None:
    """Run a graph in the page, and keep what its nodes look like."""
    page.evaluate("graph => app.loadApiJson(graph, 'help')", shot.graph)
    page.wait_for_timeout(1000)
    page.evaluate(PREPARE)
    page.evaluate(FORGET)
    page.wait_for_timeout(1500)
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_timeout(1500)
    while any(told(server, "/queue").values()):
        page.wait_for_timeout(300)
    page.wait_for_timeout(1500)
    if not shot.kinds:  # the browser lists the new file only when it is opened again
        opened(page, server)
        return
    for _ in range(2):  # nodes grow once they are seen
        x, y, width, height = page.evaluate(PLACE, [shot.kinds, LEFT, TOP, STEP, GAP, SCALE])
        page.wait_for_timeout(2000)
    clip = {"x": x - AROUND, "y": y - AROUND, "width": width + 2 * AROUND, "height": height + 2 * AROUND}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    tall = round(picture.height * WIDTH / picture.width)
    file = PAGES / shot.page / f"{shot.name}.jpg"
    keep(picture.resize((WIDTH, tall), Image.Resampling.LANCZOS), file)


def keep(picture: Image.Image, file: Path) -> None:
    """Write a picture, as well as its size allows."""
    for quality in range(85, 30, -5):
        picture.save(file, quality=quality, optimize=True)
        if file.stat().st_size <= LARGEST:
            return


def opened(page: Any, server: str) -> None:
    """Open ComfyUI with the old canvas, which both versions have."""
    page.goto(server)
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate("() => app.ui.settings.setSettingValueAsync('Comfy.VueNodes.Enabled', false)")
    page.reload()
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(3000)
    page.keyboard.press("Escape")


def told(server: str, path: str) -> Any:
    with urllib.request.urlopen(server + path) as answer:
        return json.load(answer)


def main() -> None:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - after the arguments, so that help needs none

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    parser.add_argument("pages", nargs="*", help="names of nodes; all if none is named")
    asked = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 2400})
        page.on("dialog", lambda asks: asks.accept())  # whether to leave a changed workflow
        opened(page, asked.server)
        for shot in shots():
            if not asked.pages or shot.page in asked.pages or not shot.page:
                draw(page, asked.server, shot)


if __name__ == "__main__":
    main()
