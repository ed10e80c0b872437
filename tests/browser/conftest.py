"""A browser for what a person sees; without one these tests are skipped."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for `pages`
from comfyui import COMFYUI, WHY_NOT
from pages import CHROMIUM, FLAGS, HAS_BROWSER, WHY_NO_BROWSER, opened
from servers import Server, started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = WHY_NOT if COMFYUI is None else None if HAS_BROWSER else WHY_NO_BROWSER
    for item in items if why else ():
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def shared_page(browser: Any, server: Server) -> Any:
    return opened(browser, server)


@pytest.fixture
def page(shared_page: Any) -> Iterator[Any]:
    """ComfyUI's own page, in whose console no test may leave an error of this pack's."""
    yield shared_page
    found, shared_page.of_ours = shared_page.of_ours, []
    assert not found
