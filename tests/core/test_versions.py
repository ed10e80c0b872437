"""How the test command finds ComfyUIs, and what it makes for them."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import comfyui
import pytest


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions", Path(__file__).parents[1] / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any ComfyUI."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path / "home"


def install(place: Path, version: str = "0.3.64", requirements: str = "torch\naiohttp>=3.11.8\n") -> Path:
    """What makes a folder a ComfyUI for the tests."""
    (place / "comfy").mkdir(parents=True)
    (place / "comfy" / "samplers.py").touch()
    (place / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    (place / "requirements.txt").write_text(requirements)
    return place


def test_every_comfyui_is_found_once_and_the_oldest_is_first(
    versions: ModuleType, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert versions.places([]) == []
    newest = install(home / "comfy" / "ComfyUI", "0.33.0")
    older = install(home / "comfy" / "ComfyUI-older", "0.3.64")
    (home / "comfy" / "ComfyUI-not").mkdir()
    one, two = install(tmp_path / "one", "0.4.0"), install(tmp_path / "two", "0.10.2")
    monkeypatch.setenv("COMFYUI_PATH", os.pathsep.join(map(str, (one, two, newest))))
    added = install(tmp_path / "added", "1.0.0")
    assert versions.places([str(added)]) == [older, one, two, newest, added]
    assert versions.places([str(older), str(older / ".." / "ComfyUI-older")]) == [older, one, two, newest]


def test_the_comfyui_around_the_clone_is_found_first(home: Path, tmp_path: Path) -> None:
    around = install(tmp_path / "here")
    other = install(home / "comfy" / "ComfyUI")
    assert comfyui.found(around / "custom_nodes" / "ComfyUI-AMED") == [around, other]
    assert comfyui.found(around / "elsewhere" / "ComfyUI-AMED") == [other]


def test_a_named_folder_without_comfyui_is_told_of(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "TESTS", tmp_path / "no tests")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nothing"))
    assert versions.main([]) != 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == f"node tests in ComfyUI of an unknown version ({tmp_path / 'nothing'}): none, there is no ComfyUI"


def test_without_any_comfyui_the_last_line_says_what_to_do(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "test_one.py").write_text("def test_one(): pass\n")
    monkeypatch.setattr(versions, "TESTS", tmp_path)
    assert versions.main(["--", "-p", "no:cacheprovider", "-k", "one"]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("node tests: none, no ComfyUI found: set COMFYUI_PATH")


def test_torch_stays_and_what_would_bring_another_is_apart(versions: ModuleType, tmp_path: Path) -> None:
    listed = "torch\ntorchsde\ntorchvision>=0.1\ntorchaudio\n\n# not essential:\nspandrel\nav>=14.2.0\npydantic~=2.0\n"
    wanted = versions.requirements(install(tmp_path / "one", requirements=listed))
    assert wanted == ["torchsde", "av>=14.2.0", "pydantic~=2.0", *versions.ALSO]
    assert versions.torch_pin().split("==")[1][0].isdigit()
    assert "+" not in versions.torch_pin()


def test_an_environment_is_made_once_for_its_requirements_and_anew_if_it_was_made_half(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "ENVIRONMENTS", tmp_path / "environments")
    place = install(tmp_path / "one")
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> None:
        commands.append(command)
        if command[2] == "venv":
            Path(command[3]).mkdir(parents=True)
            (Path(command[3]) / "torchaudio" / "lib").mkdir(parents=True)
            (Path(command[3]) / "torchaudio" / "lib" / "linked.so").touch()

    def stopped(command: Sequence[str]) -> None:
        run(command)
        if "pip" in command:
            raise versions.NoEnvironmentError("no network")

    with pytest.raises(versions.NoEnvironmentError):
        versions.make_environment(place, stopped)
    first = versions.make_environment(place, run)
    assert [command[:3] for command in commands[2:]] == [
        [sys.executable, "-m", "venv"],
        [str(first), "-m", "pip"],
        [str(first), "-m", "pip"],
    ]
    assert not list(first.parents[1].rglob("*.so"))
    assert versions.make_environment(place, run) == first
    assert len(commands) == 5, "nothing was installed again"
    (place / "requirements.txt").write_text("torch\naiohttp>=3.12\n")
    second = versions.make_environment(place, run)
    assert second != first
    assert [folder.name for folder in (tmp_path / "environments").iterdir()] == [second.parents[1].name]
