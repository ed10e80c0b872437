"""Write the example workflows that the template browser shows, and the blueprint: a node made of nodes.

    python scripts/make_templates.py --server http://127.0.0.1:8188

A running ComfyUI (0.33.0) with this pack says what inputs its nodes have, and what they are where nobody touched them.
Each function here is one workflow. The name of its file is the title of its card.
"""

import argparse
import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[1]
sys.path.append(str(PACK))
from scripts.workflow_json import TOP, Node, Sheet, as_text

Model = dict[str, str]
WORKFLOWS, BLUEPRINTS = PACK / "example_workflows", PACK / "subgraphs"
BLUEPRINT = "Text to image, AMED"
HUB = "https://huggingface.co"
SPLIT = "resolve/main/split_files"
NEXT = (
    "The first picture is slow, for it teaches: it is drawn in 24 model calls, and some more teach. "
    "**The next one takes {steps}.** Every other one is slow again, until it is good enough. "
    "The sampling node says which is which."
)
LEARNED = "What was learned is kept. It is for this model, steps, cfg and about this size."


def model_file(name: str, folder: str, place: str) -> list[Model]:
    """Where the browser offers to fetch a model that is not there."""
    return [{"name": name, "url": f"{HUB}/{place}/{name}", "directory": folder}]


def checkpoint(sheet: Sheet, name: str, place: str) -> Node:
    return sheet.add(
        "CheckpointLoaderSimple", ckpt_name=name, models=model_file(name, "checkpoints", f"{place}/resolve/main")
    )


def stable_diffusion(sheet: Sheet) -> Node:
    return checkpoint(sheet, "v1-5-pruned-emaonly-fp16.safetensors", "Comfy-Org/stable-diffusion-v1-5-archive")


def prompts(sheet: Sheet, clip: Any, positive: str, negative: str, tall: int = 130) -> tuple[Node, Node]:
    """What to draw, and what not to."""
    return (
        sheet.add("CLIPTextEncode", "Prompt", tall=tall, clip=clip, text=positive),
        sheet.add("CLIPTextEncode", "Negative prompt", tall=tall - 30, clip=clip, text=negative),
    )


def sampler(sheet: Sheet, title: str, model: Any, **inputs: Any) -> Node:
    """KSampler with what this pack adds to its lists."""
    usual = {"sampler_name": "amed", "scheduler": "amed", "steps": 5, "after": "randomize"} | inputs
    return sheet.add("KSampler", title, model=model, **usual)


def picture(sheet: Sheet, samples: Any, vae: Any, prefix: str, tall: int = 430) -> list[Node]:
    """Decode in a column, and save in the next."""
    sheet.column(225)
    decoded = sheet.add("VAEDecode", samples=samples, vae=vae)
    sheet.column(380)
    return [decoded, sheet.add("SaveImage", tall=tall, images=decoded["IMAGE"], filename_prefix=prefix)]


def start_here(sheet: Sheet) -> None:
    sheet.column(320)
    model = sheet.add("AMEDDemoCheckpoint")
    sheet.skip(40)
    file = sheet.add("AMEDLoadPredictor", predictor_name="pictures_amed_multistep.safetensors")
    sheet.skip(30)
    sheet.note(
        "## Start here\n\n"
        "Press **Run**. The same four drawings come twice, in 5 model calls each. Above is AMED, below a stock "
        "sampler.\n\n"
        "The model is small and comes with this pack. It knows 1,357 drawings: try *rocket*, *octopus* or *owl*.\n\n"
        "The predictor was trained for this model at cfg 3. **Load** it, **apply** it, and choose its sampler, the "
        "scheduler *amed* and its steps.\n\n"
        "Next: template **2**, with a checkpoint of yours and no node of this pack.",
    )
    sheet.column(320, 120)
    applied = sheet.add("AMEDApplyPredictor", model=model["MODEL"], predictor=file["predictor"])
    sheet.skip(60)
    positive, negative = prompts(sheet, model["CLIP"], "rocket", "")
    latent = sheet.add("EmptyLatentImage", width=128, height=128, batch_size=4)
    sheet.column(290, 120)
    both = {"positive": positive["CONDITIONING"], "negative": negative["CONDITIONING"]}
    both |= {"latent_image": latent["LATENT"], "seed": 2026, "cfg": 3.0, "after": "fixed"}
    ours = sampler(sheet, "AMED, 5 calls", applied["model"], sampler_name="amed", **both)
    second = 690
    sheet.down_to(second)
    around = model["MODEL"].via((sheet.x - 25, 14), (sheet.x - 25, second - 50))
    stock = sampler(sheet, "Stock, 5 calls", around, sampler_name="euler", scheduler="simple", grows=False, **both)
    sheet.column(225, 120)
    vae = model["VAE"].via((sheet.x - 30, 54))
    decoded = sheet.add("VAEDecode", samples=ours["LATENT"], vae=vae)
    sheet.down_to(second)
    vae = model["VAE"].via((sheet.x - 30, 54), (sheet.x - 30, second - 50))
    decoded_too = sheet.add("VAEDecode", samples=stock["LATENT"], vae=vae)
    sheet.column(350, 120)
    shown = sheet.add("SaveImage", "AMED", tall=350, images=decoded["IMAGE"], filename_prefix="AMED")
    sheet.down_to(second)
    shown_too = sheet.add("PreviewImage", "Stock", tall=350, images=decoded_too["IMAGE"])
    sheet.group("1 Model and predictor", model, file)
    sheet.group("2 Prompt and size", positive, negative, latent)
    sheet.group("3 Sample with AMED", ours)
    sheet.group("4 Sample without", stock)
    sheet.group("5 Pictures from the same noise", decoded, decoded_too, shown, shown_too)


def from_checkpoint(sheet: Sheet, note: str, load: Callable[[Sheet], Node], **settings: Any) -> None:
    """Text to picture with a checkpoint of three parts."""
    size = settings.pop("size")
    sheet.column(340)
    model = load(sheet)
    sheet.skip(60)
    sheet.note(note)
    source = model["MODEL"]
    sheet.column(340, 120)
    if settings.pop("learn", False):
        source = sheet.add("AMEDLearn", model=source)["model"]
        sheet.skip(70)
    else:
        sheet.down_to(230)
    positive, negative = prompts(sheet, model["CLIP"], settings.pop("prompt"), settings.pop("negative"))
    latent = sheet.add("EmptyLatentImage", width=size, height=size, batch_size=1)
    sheet.column(290, 130)
    drawn = sampler(
        sheet,
        f"AMED, {settings.get('steps', 5)} calls",
        source,
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent["LATENT"],
        **settings,
    )
    shown = picture(sheet, drawn["LATENT"], model["VAE"], "AMED")
    sheet.group("1 Model", model)
    sheet.group("2 Prompt and size", positive, negative, latent)
    sheet.group("3 Sample", drawn)
    sheet.group("4 Picture", *shown)


def own_checkpoint(sheet: Sheet) -> None:
    from_checkpoint(
        sheet,
        "## Your own checkpoint\n\n"
        "There is no node of this pack here. All it takes are the sampler *amed*, the scheduler *amed* and 5 steps in "
        "KSampler.\n\n"
        "**Exchange** the checkpoint for yours, and set its size and cfg.\n\n"
        f"{NEXT.format(steps=5)}\n\n{LEARNED}\n\n"
        "Next: **9** compares with stock samplers, **10** trains more thoroughly.",
        stable_diffusion,
        size=512,
        cfg=7.0,
        prompt="a lighthouse on a cliff at dusk, waves, warm light in its windows, oil painting",
        negative="blurry, watermark",
    )


def sdxl(sheet: Sheet) -> None:
    from_checkpoint(
        sheet,
        "## SD 1.5 and SDXL\n\n"
        "For **SD 1.5** load such a checkpoint, and set 512x512. LoRAs go between the checkpoint and AMED Learn.\n\n"
        "**AMED Learn** says from how many pictures to learn. Without it, that is automatic.\n\n"
        f"{NEXT.format(steps=8)}\n\n{LEARNED}\n\n"
        "Fewer steps are faster, and more are nearer to what the model means: 5 to 10 are useful.",
        lambda s: checkpoint(s, "sd_xl_base_1.0.safetensors", "stabilityai/stable-diffusion-xl-base-1.0"),
        size=1024,
        cfg=6.0,
        steps=8,
        learn=True,
        prompt="portrait of an old clockmaker in his workshop, brass gears, window light, photograph, 85 mm",
        negative="cartoon, watermark",
    )


def flux(sheet: Sheet) -> None:
    sheet.column(340)
    texts = "comfyanonymous/flux_text_encoders/resolve/main"
    names = "clip_l.safetensors", "t5xxl_fp16.safetensors"
    clip = sheet.add(
        "DualCLIPLoader",
        clip_name1=names[0],
        clip_name2=names[1],
        type="flux",
        models=[one for name in names for one in model_file(name, "text_encoders", texts)],
    )
    sheet.skip(60)
    sheet.note(
        "## Flux\n\n"
        "Flux.1 dev has its guidance built in: **cfg stays 1**, and Flux Guidance sets how strong it is.\n\n"
        "**Exchange** the file names for what you have. On a small card choose fp8 files, or *fp8_e4m3fn* as "
        "weight_dtype.\n\n"
        f"{NEXT.format(steps=5)}\n\n{LEARNED}\n\n"
        "Schnell draws in 4 calls already, and needs none of this.",
    )
    sheet.column(340, 230)
    prompt = sheet.add(
        "CLIPTextEncode",
        "Prompt",
        tall=300,
        clip=clip["CLIP"],
        text="a red fox asleep in a hammock between two birches, morning fog, soft light, photograph",
    )
    sheet.column(320)
    name = "flux1-dev.safetensors"
    model = sheet.add(
        "UNETLoader", unet_name=name, models=model_file(name, "diffusion_models", "Comfy-Org/flux1-dev/resolve/main")
    )
    sheet.down_to(230)
    guided = sheet.add("FluxGuidance", conditioning=prompt["CONDITIONING"], guidance=3.5)
    nothing = sheet.add("ConditioningZeroOut", conditioning=prompt["CONDITIONING"])
    latent = sheet.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    sheet.column(300)
    name = "ae.safetensors"
    vae = sheet.add(
        "VAELoader", vae_name=name, models=model_file(name, "vae", f"Comfy-Org/Lumina_Image_2.0_Repackaged/{SPLIT}/vae")
    )
    sheet.down_to(230)
    drawn = sampler(
        sheet,
        "AMED, 5 calls",
        model["MODEL"],
        positive=guided["CONDITIONING"],
        negative=nothing["CONDITIONING"],
        latent_image=latent["LATENT"],
        cfg=1.0,
    )
    shown = picture(sheet, drawn["LATENT"], vae["VAE"], "AMED_Flux")
    sheet.group("1 Model", clip, model, vae)
    sheet.group("2 Prompt and size", prompt, guided, nothing, latent)
    sheet.group("3 Sample", drawn)
    sheet.group("4 Picture", *shown)


def by_parts(
    sheet: Sheet,
    note: str,
    place: str,
    text_encoder: tuple[str, str],
    network: str,
    shift: tuple[str, float],
    vae_name: str,
    latent: tuple[str, dict[str, int]],
    text: tuple[str, str],
    **settings: Any,
) -> tuple[Any, Any]:
    """Text encoder, network and VAE of files of their own, with a shift; what is sampled, and the VAE."""

    def load(kind: str, name: str, value: str, folder: str, **inputs: Any) -> Node:
        models = model_file(value, folder, f"{place}/{SPLIT}/{folder}")
        return sheet.add(kind, models=models, **{name: value}, **inputs)

    sheet.column(340)
    clip = load("CLIPLoader", "clip_name", text_encoder[0], "text_encoders", type=text_encoder[1])
    sheet.skip(60)
    sheet.note(note)
    sheet.column(340)
    model = load("UNETLoader", "unet_name", network, "diffusion_models")
    sheet.down_to(230)
    positive, negative = prompts(sheet, clip["CLIP"], *text)
    sheet.column(260)
    shifted = sheet.add(shift[0], model=model["MODEL"], shift=shift[1])
    sheet.down_to(500)
    empty = sheet.add(latent[0], batch_size=1, **latent[1])
    sheet.column(300)
    vae = load("VAELoader", "vae_name", vae_name, "vae")
    sheet.down_to(230)
    drawn = sampler(
        sheet,
        f"AMED, {settings['steps']} calls",
        shifted["MODEL"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=empty["LATENT"],
        **settings,
    )
    sheet.group("1 Model", clip, model, shifted, vae)
    sheet.group("2 Prompt and size", positive, negative, empty)
    sheet.group("3 Sample", drawn)
    return drawn["LATENT"], vae["VAE"]


def qwen(sheet: Sheet) -> None:
    samples, vae = by_parts(
        sheet,
        "## Qwen-Image and Z-Image\n\n"
        "As it is, this draws with **Qwen-Image**.\n\n"
        "For **Z-Image** choose the text encoder *qwen_3_4b* of type *lumina2*, the model *z_image_bf16*, the VAE *ae* "
        "and shift 3.\n\n"
        "Turbo and Lightning models draw in few calls already. Train those with the teacher *my recipe*, in template "
        "**10**.\n\n"
        f"{NEXT.format(steps=5)}\n\n{LEARNED}",
        "Comfy-Org/Qwen-Image_ComfyUI",
        ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image"),
        "qwen_image_fp8_e4m3fn.safetensors",
        ("ModelSamplingAuraFlow", 3.1),
        "qwen_image_vae.safetensors",
        ("EmptySD3LatentImage", {"width": 1328, "height": 1328}),
        ('a small bookshop at night in the rain, a neon sign that says "FIVE STEPS"', "blurry"),
        steps=5,
        cfg=4.0,
    )
    sheet.group("4 Picture", *picture(sheet, samples, vae, "AMED_Qwen"))


def wan(sheet: Sheet) -> None:
    samples, vae = by_parts(
        sheet,
        "## Wan video\n\n"
        "This draws 33 frames with Wan 2.1.\n\n"
        f"{NEXT.format(steps=8).replace('picture', 'video')}\n\n"
        "Begin with few frames. What was learned is a first guess at more.\n\n"
        "For the two models of **Wan 2.2** use *AMED Two Models Guider* and SamplerCustomAdvanced.\n\n"
        f"{LEARNED}",
        "Comfy-Org/Wan_2.1_ComfyUI_repackaged",
        ("umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan"),
        "wan2.1_t2v_1.3B_fp16.safetensors",
        ("ModelSamplingSD3", 8.0),
        "wan_2.1_vae.safetensors",
        ("EmptyHunyuanLatentVideo", {"width": 832, "height": 480, "length": 33}),
        ("a paper boat drifts down a brook through a forest, the camera follows it", "blurry, static"),
        steps=8,
        cfg=6.0,
    )
    sheet.column(225)
    decoded = sheet.add("VAEDecode", samples=samples, vae=vae)
    sheet.column(380)
    film = {"fps": 16.0, "lossless": False, "quality": 90, "filename_prefix": "AMED_Wan"}
    shown = sheet.add("SaveAnimatedWEBP", tall=430, images=decoded["IMAGE"], **film)
    sheet.group("4 Video", decoded, shown)


def from_image(sheet: Sheet, note: str, masked: bool, **settings: Any) -> None:
    """A picture is encoded and changed: all of it, or where a mask says."""
    sheet.column(340)
    model = stable_diffusion(sheet)
    sheet.skip(50)
    sheet.note(note)
    given = sheet.add("LoadImage", "Picture", tall=330, image="example.png")
    sheet.column(340, 230)
    positive, negative = prompts(sheet, model["CLIP"], settings.pop("prompt"), "blurry, watermark")
    sheet.down_to(given.y - TOP + 90)
    encoded = sheet.add("VAEEncode", pixels=given["IMAGE"], vae=model["VAE"])
    latent, steps = encoded, [given, encoded]
    if masked:
        sheet.column(225, given.y - TOP)
        latent = sheet.add("SetLatentNoiseMask", samples=encoded["LATENT"], mask=given["MASK"])
        steps.append(latent)
    sheet.column(290, 130)
    drawn = sampler(
        sheet,
        "AMED, 5 calls",
        model["MODEL"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent["LATENT"],
        cfg=7.0,
        **settings,
    )
    shown = picture(sheet, drawn["LATENT"], model["VAE"], "AMED")
    sheet.group("1 Model", model)
    sheet.group("2 Picture" + (" and mask" if masked else ""), *steps)
    sheet.group("3 Prompt", positive, negative)
    sheet.group("4 Sample", drawn)
    sheet.group("5 Picture", *shown)


def image_to_image(sheet: Sheet) -> None:
    from_image(
        sheet,
        "## Image to image\n\n"
        "A picture of yours is changed, by as much as **denoise** says: 0.3 a little, 0.8 nearly all.\n\n"
        "**Exchange** the checkpoint and the picture. SD 1.5 likes about 512x512, SDXL about 1024x1024.\n\n"
        "Steps are model calls at any denoise: 5 are 5.\n\n"
        f"{NEXT.format(steps=5)}\n\n"
        "Every denoise is learned by itself, so keep to one.\n\n"
        "**AMED Train Predictor** with *noise and images* trains for denoise 0.3 to 0.8 at once: template 10.",
        masked=False,
        denoise=0.6,
        prompt="watercolour painting, loose brush strokes, white paper",
    )


def inpainting(sheet: Sheet) -> None:
    from_image(
        sheet,
        "## Inpainting\n\n"
        "Right-click the picture, choose **Open in MaskEditor**, and paint over what shall be drawn anew. The rest "
        "stays.\n\n"
        "**Exchange** the checkpoint and the picture, and describe the whole picture in the prompt.\n\n"
        "At denoise 1 nothing of what was there is left under the mask. At 0.6 its colours remain.\n\n"
        f"{NEXT.format(steps=5)}\n\n"
        "With a mask a picture is learned apart from those without one.",
        masked=True,
        denoise=0.8,
        prompt="a glass bottle with a small garden inside, on a wooden table",
    )


def compare(sheet: Sheet) -> None:
    sheet.column(320)
    model = sheet.add("AMEDDemoCheckpoint")
    sheet.skip(30)
    file = sheet.add("AMEDLoadPredictor", predictor_name="pictures_amed_multistep.safetensors")
    sheet.skip(60)
    sheet.note(
        "## Compare\n\n"
        "Press **Run**. The same pictures are drawn by a slow teacher, by AMED and by stock samplers. All but the "
        "teacher have the same number of model calls. Beside each is how far it is off.\n\n"
        "**Exchange** the demo checkpoint for yours. Without a predictor, AMED is taught first.\n\n"
        "In **against** write any sampler and scheduler of KSampler's lists, separated by commas.\n\n"
        "Next: **10** trains a predictor.",
    )
    sheet.column(320, 290)
    positive, negative = prompts(sheet, model["CLIP"], "rocket", "")
    latent = sheet.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    sheet.column(560, 90)
    compared = sheet.add(
        "AMEDCompare",
        tall=740,
        model=model["MODEL"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent["LATENT"],
        predictor=file["predictor"],
        vae=model["VAE"],
        seed=2026,
        cfg=3.0,
    )
    sheet.column(420)
    table = sheet.add("PreviewAny", "Table", tall=330, source=compared["table"])
    plot = sheet.add("PreviewImage", "Errors over calls", tall=380, images=compared["plot"])
    sheet.group("1 Model and predictor", model, file)
    sheet.group("2 Prompt and size", positive, negative, latent)
    sheet.group("3 Compare", compared)
    sheet.group("4 Who is nearer", table, plot)


def train(sheet: Sheet) -> None:
    sheet.column(270)
    model = sheet.add("AMEDDemoCheckpoint")
    sheet.skip(60)
    sheet.note(
        "## Train the best, and share it\n\n"
        "Press **Run**. AMED Train Predictor says how long it takes here. Cancel keeps the best so far.\n\n"
        "**Exchange** the demo checkpoint for yours, and set its size and cfg. Loaders, LoRAs and shift nodes come "
        "before.\n\n"
        "**effort**: *quick* for a first try, *standard* for good ones, *thorough* for the best. **steps** may be a "
        "range, as 3-10. **starts** adds image to image.\n\n"
        "For turbo and lightning models set **teacher** to *my recipe*.\n\n"
        "**Share** the file: it is saved by itself in *models/amed_predictors*, is small, and serves all who have this "
        "model. KSampler with the sampler *amed* finds it there.",
    )
    sheet.column(250, 150, gap=70)
    positive, negative = prompts(sheet, model["CLIP"], "penguin", "", tall=110)
    latent = sheet.add("EmptyLatentImage", "Size to draw", width=128, height=128, batch_size=4)
    small = sheet.add("EmptyLatentImage", "Size to train at", width=128, height=128, batch_size=1)
    sheet.column(330, 310, gap=90)
    lane = sheet.x - 60  # where wires turn to the sampler, above the training
    asked = positive["CONDITIONING"], negative["CONDITIONING"], latent["LATENT"]
    over = [one.via((lane + 15 * n, 154 + 20 * n)) for n, one in enumerate(asked)]
    source = (lane - 15, 64)
    way = model["MODEL"].via(source, (sheet.x - 15, 214), (sheet.right + 25, 214))
    made = sheet.add(
        "AMEDTrainPredictor",
        tall=440,
        model=model["MODEL"].via(source),
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=small["LATENT"],
        cfg=3.0,
    )
    results = 730  # below the sampling
    sheet.column(270, 270, gap=50)
    below = (sheet.x - 36, results - 84), (sheet.right + 25, results - 84)
    applied = sheet.add("AMEDApplyPredictor", model=way, predictor=made["predictor"])
    sheet.down_to(results)
    report = sheet.add("PreviewAny", "What was gained", tall=330, source=made["report"])
    sheet.column(280, 120, gap=50)
    drawn = sampler(
        sheet,
        "AMED, 5 calls",
        applied["model"],
        sampler_name="amed",
        positive=over[0],
        negative=over[1],
        latent_image=over[2],
        cfg=3.0,
        seed=2026,
        after="fixed",
    )
    sheet.down_to(results)
    plot = sheet.add("PreviewImage", "What was learned", tall=330, wide=855, images=made["plot"].via(*below))
    sheet.column(225, gap=45)
    decoded = sheet.add("VAEDecode", samples=drawn["LATENT"], vae=model["VAE"])
    sheet.column(260, gap=45)
    shown = sheet.add("SaveImage", tall=400, images=decoded["IMAGE"], filename_prefix="AMED_trained")
    sheet.group("1 Model", model)
    sheet.group("2 Prompt and sizes", positive, negative, latent, small)
    sheet.group("3 Train", made)
    sheet.group("4 Sample", applied, drawn, decoded, shown)
    sheet.group("5 What came of it", report, plot)


TEMPLATES: dict[str, Callable[[Sheet], None]] = {
    "1 Start here - 5 steps, no download": start_here,
    "2 Your own checkpoint - the first picture teaches": own_checkpoint,
    "3 SD 1.5 and SDXL": sdxl,
    "4 Flux": flux,
    "5 Qwen-Image and Z-Image": qwen,
    "6 Wan video": wan,
    "7 Image to image": image_to_image,
    "8 Inpainting": inpainting,
    "9 Compare with stock samplers": compare,
    "10 Train the best and share it": train,
}


def text_to_image(sheet: Sheet) -> dict[str, Any]:
    """The blueprint: a node from a checkpoint's name and a prompt to a picture."""
    sheet.column(340)
    model = stable_diffusion(sheet)
    sheet.column(340, 230)
    positive, negative = prompts(sheet, model["CLIP"], "", "")
    latent = sheet.add("EmptyLatentImage", width=512, height=512, batch_size=1)
    sheet.column(290, 130)
    both = {"positive": positive["CONDITIONING"], "negative": negative["CONDITIONING"]}
    drawn = sampler(sheet, "AMED", model["MODEL"], **both, latent_image=latent["LATENT"], cfg=7.0)
    sheet.column(225)
    decoded = sheet.add("VAEDecode", samples=drawn["LATENT"], vae=model["VAE"])
    asked = [
        (model, "ckpt_name", "checkpoint"),
        (positive, "text", "prompt"),
        (negative, "text", "negative prompt"),
        (latent, "width", "width"),
        (latent, "height", "height"),
        (drawn, "seed", "seed"),
        (drawn, "steps", "steps"),
        (drawn, "cfg", "cfg"),
    ]
    about = "Text to picture in about 5 model calls with any checkpoint. The first picture is slow, for it teaches."
    return sheet.blueprint(BLUEPRINT, about, asked, decoded["IMAGE"])


def written(known: dict[str, Any]) -> dict[Path, str]:
    """Every file and its content, as ComfyUI's nodes are."""
    texts = {}
    for name, fill in TEMPLATES.items():
        fill(sheet := Sheet(known))
        texts[WORKFLOWS / f"{name}.json"] = as_text(sheet.saved())
    return texts | {BLUEPRINTS / f"{BLUEPRINT}.json": as_text(text_to_image(Sheet(known)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    with urllib.request.urlopen(f"{parser.parse_args().server}/object_info") as answer:
        known = json.load(answer)
    for file, text in written(known).items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
