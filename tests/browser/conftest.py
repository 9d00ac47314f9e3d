"""A live server and Chromium, for the frontend beside ComfyUI and for the newest, which `tests/tools.py` fetches."""

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from linearize.lab.comfyui import COMFYUI, write_settings
from linearize.lab.server import live_server

sys.path.insert(0, str(Path(__file__).parent))
from interface import READY, ROOT, in_mode  # noqa: E402

NEWEST = sorted((ROOT / ".comfyui" / "frontends").glob("[0-9]*")) or [Path("newest")]  # folders by version
INSTALLED = importlib.metadata.version("comfyui-frontend-package") if importlib.util.find_spec(
    "comfyui_frontend_package") else "installed"  # fmt: skip
FRONTENDS = {INSTALLED: None, NEWEST[-1].name: NEWEST[-1]}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MILLISECONDS = 60_000  # the longest that one step may take


@pytest.fixture(scope="session", params=FRONTENDS)
def version(request):
    """The version of the frontend."""
    folder = FRONTENDS[request.param]
    if folder and not (folder / "index.html").exists():
        pytest.skip("no newer frontend here; run the tests with: python run.py test")
    return request.param


@pytest.fixture(scope="session")
def server(version, tmp_path_factory):
    """A live server in strict mode, where a fall-back to dense fails the run; output and settings are its own."""
    if not (COMFYUI / "main.py").exists():
        pytest.skip("no ComfyUI here; run the tests with: python run.py test")
    users = tmp_path_factory.mktemp("user")
    write_settings(users, **{"Comfy.VueNodes.Enabled": False})
    options = ["--output-directory", str(tmp_path_factory.mktemp("output")), "--user-directory", str(users)]
    if FRONTENDS[version]:
        options += ["--front-end-root", str(FRONTENDS[version])]
    with live_server(environment={"LINEARIZE_STRICT": "1"}, options=options) as running:
        yield running


@pytest.fixture(scope="session")
def browser():
    """Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser on the path (looked for {', '.join(BROWSERS)})")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """An empty page that knows nothing of the other tests' pages."""
    context = browser.new_context(viewport={"width": 1920, "height": 1000})
    context.set_default_timeout(MILLISECONDS)
    yield context.new_page()
    context.close()


@pytest.fixture
def frontend(page, server):
    """The frontend, ready, with the graph that it opens by itself."""
    page.goto(server.url)
    page.wait_for_function(READY)
    return page


@pytest.fixture(params=[False, True], ids=["LiteGraph", "Nodes 2.0"])
def mode(frontend, request):
    """Both ways to draw nodes; LiteGraph's is there again afterwards."""
    in_mode(frontend, request.param)
    yield request.param
    in_mode(frontend, False)
