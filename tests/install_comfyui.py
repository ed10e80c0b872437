"""Install what a ComfyUI found on this machine needs, for the node tests; does nothing where there is none.

    python tests/install_comfyui.py

torch stays as it is: ComfyUI's plain `torch` requirement would pull another build. Of torchvision
only the Python parts are used, so a version whose compiled part may be missing is enough, and of
torchaudio nothing is.
"""

import importlib.util
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "nodes"))
from comfyui import COMFYUI, WHY_NOT

APART = ("torch", "torchvision", "torchaudio", "spandrel")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def main() -> None:
    if COMFYUI is None:
        print(f"Node tests will be skipped: {WHY_NOT}.")
        return
    lines = (COMFYUI / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line.split("=")[0].split(">")[0].split("<")[0].strip() not in APART]
    with tempfile.TemporaryDirectory() as folder:
        requirements, constraints = Path(folder) / "requirements.txt", Path(folder) / "constraints.txt"
        requirements.write_text("\n".join([*wanted, "requests"]))  # imported by ComfyUI 0.3.64, but not listed
        constraints.write_text(f"torch=={version('torch').split('+')[0]}\n")
        pip("-r", str(requirements), "-c", str(constraints))
    if importlib.util.find_spec("torchvision") is None:
        pip("--no-deps", "torchvision==0.16.2")
    if importlib.util.find_spec("spandrel") is None:
        pip("--no-deps", "spandrel==0.4.2")


if __name__ == "__main__":
    main()
