"""ComfyUI Manager's own command line installs the pack from a git address, ComfyUI starts with it, and it is removed.

Everything stays on this machine: a process that asks for another is refused and written down.
"""

import functools
import http.server
import os
import re
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("LINEARIZE_COMFYUI", ROOT / ".comfyui" / "comfyui"))
MANAGER = ROOT / ".comfyui" / "manager"
USERS_OWN = {".git", ".venv", "venv", "custom_nodes", "input", "models", "output", "temp", "user"}
SETTINGS = "[default]\nuse_uv = False\nnetwork_mode = offline\n"
# every Python that starts reads this first, so the Manager's children do too
STAY_HERE = """
import os, sys

def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect"):
        place = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = place[0] if isinstance(place, tuple) else place
        if str(host) not in ("127.0.0.1", "localhost", "::1"):
            with open(os.environ["ASKED_FOR"], "a") as file:
                print(host, file=file)
            raise OSError(f"{host} is another machine")

sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A git address on this machine that holds the checkout as it is now, with what is not committed yet."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("the Manager clones packs: this wants git, and a checkout that git knows")
    folder = tmp_path_factory.mktemp("git")
    source = folder / "linearize"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "as it is now"], ["repack", "-adq"]):
        subprocess.run(["git", *command], cwd=source, check=True)
    subprocess.run(["git", "update-server-info"], cwd=source, check=True)
    (source / ".git").rename(folder / "linearize.git")

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/linearize.git"
    server.shutdown()


@pytest.fixture
def empty_comfyui(tmp_path):
    """A ComfyUI without packs, models and settings, but for the Manager's: pip, and no network."""
    if not (COMFYUI / "main.py").exists():
        pytest.skip("no ComfyUI here; run the tests with: python run.py test")
    folder = tmp_path / "ComfyUI"

    def left_out(where, names):
        return USERS_OWN & set(names) if Path(where) == COMFYUI else {"__pycache__"} & set(names)

    shutil.copytree(COMFYUI, folder, ignore=left_out)
    (folder / "custom_nodes").mkdir()
    (folder / "user" / "__manager").mkdir(parents=True)
    (folder / "user" / "__manager" / "config.ini").write_text(SETTINGS, encoding="utf-8")
    return folder


def write_wheel(folder: Path, package: str) -> None:
    """Write an empty package of a high version that pip installs."""
    name = f"{package.replace('-', '_')}-9999"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        about = f"{name}.dist-info"
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 9999\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def manager(empty_comfyui, tmp_path):
    """A function that runs the Manager's command line and returns what it says."""
    program = next((path for path in MANAGER.glob("*/cm-cli*") if path.is_file()), None)
    if program is None:
        pytest.skip("ComfyUI Manager is not installed; run the tests with: python run.py test")
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(STAY_HERE, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not re.match("PIP_|UV_|GIT_|COMFYUI", name)}
    environment = {
        **kept, "COMFYUI_PATH": str(empty_comfyui), "PYTHONPATH": str(tmp_path / "python"), "UV_OFFLINE": "1",
        "ASKED_FOR": str(tmp_path / "asked"), "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"),
        "PIP_TARGET": str(tmp_path / "installed"),
    }  # fmt: skip

    def run(*arguments):
        command = [str(program), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
        said = result.stdout + result.stderr
        assert result.returncode == 0, said
        return said

    return run


def test_the_manager_installs_the_pack_and_removes_it(live, manager, address, empty_comfyui, tmp_path, monkeypatch):
    """With its requirements, which pip takes from a folder here; the server then has every node, page and template."""
    requirements = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    (tmp_path / "wheels").mkdir()
    for package in requirements:
        write_wheel(tmp_path / "wheels", package)
    packs = empty_comfyui / "custom_nodes"

    said = manager("install", address, "--exit-on-fail")
    assert "[INSTALLED]" in said and "install script failed" not in said, said
    assert [path.name for path in packs.iterdir()] == ["linearize"]
    installed = {path.name.partition("-")[0] for path in (tmp_path / "installed").glob("*.dist-info")}
    assert installed == {package.replace("-", "_") for package in requirements}, said

    monkeypatch.setattr(live, "COMFYUI", empty_comfyui)
    monkeypatch.setattr(live, "BASE", empty_comfyui)
    with live.live_server(environment={"LINEARIZE_STRICT": "1"}) as running:
        known = running.get("/object_info")
        ours = {name for name, node in known.items() if node["python_module"] == "custom_nodes.linearize"}
        assert ours == {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
        assert running.bytes("/extensions/linearize/docs/LinearizeCLEAR.md").startswith(b"# ")
        assert "flux_dev_clear" in running.get("/workflow_templates")["linearize"]

    said = manager("uninstall", "linearize")
    assert "[UNINSTALLED] linearize" in said, said
    assert list(packs.iterdir()) == []
    assert not (tmp_path / "asked").exists(), (tmp_path / "asked").read_text()
