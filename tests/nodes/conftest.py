"""Fixtures of the node tests: this pack in this process, and a real ComfyUI that runs it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for `comfyui` and `graphs`
from comfyui import COMFYUI, WHY_NOT, load_pack
from families import SPECS, Family, here, make
from servers import Server, started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = set(SPECS) - set(here())
    for item in items:
        if Path(item.fspath).parent != Path(__file__).parent:
            continue
        if COMFYUI is None:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))
        for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
            if isinstance(value, str) and value in lacking:
                item.add_marker(pytest.mark.skip(reason=f"this ComfyUI has no {SPECS[value].kind}"))


@pytest.fixture(scope="session")
def pack() -> Any:
    """This pack, imported as ComfyUI imports it, in this process."""
    return load_pack()


@pytest.fixture(scope="module")
def flux(pack: Any) -> Family:
    """A toy of one family, which the tests of a module share; those that change it have one of their own."""
    del pack
    return make("flux")


@pytest.fixture(autouse=True)
def user(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Where the states of fits are kept: every test has a folder of its own, so that none goes on from another's."""
    if "pack" not in request.fixturenames:
        return None
    import folder_paths  # noqa: PLC0415 - ComfyUI's

    registered = request.getfixturevalue("pack").nodes.registration.FOLDER
    paths, kinds = folder_paths.folder_names_and_paths[registered]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, registered, ([str(tmp_path / "models"), *paths[1:]], kinds)
    )
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return tmp_path / "amed_training"


@pytest.fixture
def models(user: Path, tmp_path: Path) -> Path:
    """Where predictors are saved, which is a folder of this test's own."""
    del user
    return tmp_path / "models"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with this pack, which all tests of a file share."""
    with started(tmp_path_factory.mktemp("comfyui")) as running:
        yield running
