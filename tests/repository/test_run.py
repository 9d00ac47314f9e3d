"""run.py's errors: each is one sentence that says what to do, and nothing half-made stays behind."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run.py as a module, in a copy of the checkout's few files that the set-up reads."""
    for name in ("run.py", "constraints.txt", "requirements.txt", "pyproject.toml", "lab/cpu_torchvision_compat.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    spec = importlib.util.spec_from_file_location("run_in_copy", tmp_path / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert tmp_path == module.ROOT

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        return module.main()

    module.with_arguments = main
    return module


def test_wrong_python(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "sys", SimpleNamespace(version_info=(3, 10, 4), stderr=sys.stderr))
    assert run.with_arguments("demo") == 1
    assert "This is Python 3.10; run.py needs 3.11, 3.12 or 3.13" in capsys.readouterr().err


def test_full_disk(run, monkeypatch, capsys):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.5e9))
    assert run.with_arguments("demo") == 1
    assert "1.5 GB free here; the set-up needs about 6 GB" in capsys.readouterr().err
    assert not (run.ROOT / ".venv").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("NewConnectionError: Failed to establish a new connection", "The package index could not be reached"),
        ("error: something else", "finished steps are kept"),
    ],
)
def test_a_failed_step_is_explained(run, output, words):
    run.HOME.mkdir()
    with pytest.raises(run.Problem, match=words):
        run.run([sys.executable, "-c", f"print({output!r}); raise SystemExit(1)"])


def test_no_network_then_again(run, monkeypatch, capsys):
    """An index that drops connections: one sentence; the step is tried anew, finished ones are not."""

    class Drop(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.connection.close()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Drop)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    made = []
    monkeypatch.setattr(run, "make_venv", lambda make=run.make_venv: made.append(True) or make())
    for _ in range(2):
        assert run.with_arguments("demo") == 1
        assert "could not be reached" in capsys.readouterr().err
    server.shutdown()
    assert made == [True], "the virtual environment was made twice"


def test_a_half_made_environment_is_made_again(run):
    run.HOME.mkdir()
    (run.VENV / "bin").mkdir(parents=True)
    (run.VENV / "bin" / "leftover").touch()
    run.make_venv()
    assert run.venv_python(run.VENV).exists() and not (run.VENV / "bin" / "leftover").exists()


def test_existing_comfyui_is_checked(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run.with_arguments("demo", "--comfyui", str(empty)) == 1
    assert "holds no ComfyUI" in capsys.readouterr().err
    (empty / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    assert run.with_arguments("demo", "--comfyui", str(empty)) == 1
    error = capsys.readouterr().err
    assert "ComfyUI 0.3.64" in error and "is too old: Linearize needs 0.30.0 or newer" in error
    for version in ("0.30.0", "0.30", "0.31.0rc1", "v0.31", "1.0.0"):
        (empty / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
        run.check_comfyui(empty)


def test_a_mistyped_folder_is_not_taken_for_a_version(run, capsys):
    assert run.with_arguments("demo", "--comfyui", "/no/such/ComfyUl") == 1
    assert "There is no folder /no/such/ComfyUl; --comfyui takes a folder or a version" in capsys.readouterr().err


@pytest.fixture
def recorded(run, monkeypatch):
    """The steps of the set-up that ran, as names; nothing is installed."""
    names = []

    for name in ("run", "install_torch", "install_vision", "install_requirements"):
        monkeypatch.setattr(run, name, lambda *args, name=name, **kwargs: names.append(name))

    def make(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(run, "make_venv", lambda: (names.append("make_venv"), make(run.venv_python(run.VENV))))
    monkeypatch.setattr(
        run, "fetch_pinned", lambda pip, comfyui: (names.append("fetch_pinned"), make(comfyui / "main.py"))
    )
    monkeypatch.setattr(run, "check_comfyui", lambda comfyui: None)
    monkeypatch.setattr(run, "link_packs", lambda: None)
    monkeypatch.setitem(run.COMMANDS, "demo", lambda *args: 0)
    return names


def test_a_second_call_does_nothing_and_deleted_folders_are_made_again(run, recorded):
    assert run.with_arguments("demo") == 0
    assert recorded[0] == "make_venv" and "fetch_pinned" in recorded
    recorded.clear()
    assert run.with_arguments("demo") == 0 and recorded == []
    shutil.rmtree(run.HOME / "comfyui")
    assert run.with_arguments("demo") == 0 and recorded[0] == "fetch_pinned"
    recorded.clear()
    shutil.rmtree(run.VENV)
    assert run.with_arguments("demo") == 0 and recorded[0] == "make_venv"


def test_another_torch_index_reinstalls_and_is_remembered(run, recorded):
    assert run.with_arguments("demo") == 0
    recorded.clear()
    assert run.with_arguments("demo", "--torch-index", "http://127.0.0.1/cu130") == 0
    assert recorded[0] == "install_torch"
    recorded.clear()
    assert run.with_arguments("demo") == 0 and recorded == []


def test_tools_of_the_tests_are_made_once_and_again_when_they_are_gone(run, monkeypatch):
    """Each in a folder of its own; a tool that could not be had stops the tests with a sentence."""
    monkeypatch.setitem(sys.modules, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts the checkout on it
    spec = importlib.util.spec_from_file_location("tools_in_test", ROOT / "tests" / "tools.py")
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    made = []

    def record(command):
        made.append(command[-1])
        if "--target" in command:
            (Path(command[-2]) / "comfyui_frontend_package" / "static").mkdir(parents=True)
        elif "venv" in command:
            (run.HOME / Path(command[-1]).name).mkdir()

    run.HOME.mkdir()
    monkeypatch.setattr(run, "run", record)
    monkeypatch.setattr(run, "packages_of", lambda python: run.HOME / "manager")
    frontend = run.HOME / "frontends" / tools.FRONTEND.partition("==")[2]
    assert tools.main() == 0 and set(made) > {run.COMFY_CLI, tools.COMFYUI_MANAGER, tools.FRONTEND}
    assert list(frontend.parent.iterdir()) == [frontend]
    made.clear()
    assert tools.main() == 0 and made == []
    shutil.rmtree(frontend)
    assert tools.main() == 0 and made == [tools.FRONTEND]
    shutil.rmtree(run.HOME / "manager")

    def fail(command):
        raise run.Problem("The package index could not be reached.")

    monkeypatch.setattr(run, "run", fail)
    assert tools.main() == 1


def test_tests_of_a_comfyui_of_the_users_have_their_tools_too(run, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(run, "check_comfyui", lambda comfyui: None)
    monkeypatch.setattr(run, "imports", lambda python, module: True)
    monkeypatch.setattr(run, "call", lambda comfyui, python, *command: called.append((comfyui, *command)) or 0)
    (tmp_path / "own").mkdir()
    assert run.with_arguments("test", "--comfyui", str(tmp_path / "own"), "--only", "browser") == 0
    assert called[0] == (tmp_path / "own", "-u", "tests/tools.py")
    assert called[1] == (tmp_path / "own", "-u", "tests/stages.py", "--only", "browser")
    monkeypatch.setattr(run, "call", lambda comfyui, python, *command: called.append(command) or 1)
    called.clear()
    assert run.with_arguments("test", "--comfyui", str(tmp_path / "own")) == 1 and len(called) == 1


def test_a_comfyui_without_an_environment_runs_in_the_callers_then_in_ours(run, tmp_path, monkeypatch):
    comfyui, ours = tmp_path / "own", run.venv_python(run.VENV)
    for path in (ours, run.venv_python(comfyui / "venv")):
        path.parent.mkdir(parents=True)
        path.touch()
    for able, expected in (
        ({ours, Path(sys.executable), run.venv_python(comfyui / "venv")}, run.venv_python(comfyui / "venv")),
        ({ours, Path(sys.executable)}, Path(sys.executable)),
        ({ours}, ours),
    ):
        monkeypatch.setattr(run, "imports", lambda python, module, able=able: python in able)
        assert run.own_python(comfyui) == expected
    monkeypatch.setattr(run, "imports", lambda python, module: False)
    with pytest.raises(run.Problem, match="No Python with torch found"):
        run.own_python(comfyui)


def test_bench_passes_other_arguments_on_and_nobody_else_does(run, monkeypatch):
    monkeypatch.setattr(run, "prepare", lambda args: (Path("python"), Path("comfyui")))
    called = []
    monkeypatch.setattr(run, "call", lambda comfyui, *command, **extra: called.append(command) or 0)
    assert run.with_arguments("bench", "--suite", "declined", "--rounds", "3") == 0
    assert called[0][-4:] == ("--suite", "declined", "--rounds", "3")
    with pytest.raises(SystemExit):
        run.with_arguments("demo", "--suite", "declined")


def test_unknown_stage():
    command = [sys.executable, str(ROOT / "tests" / "stages.py"), "--only", "unit,fast"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "No test stage fast; the stages are lint, unit" in result.stderr


def test_links_survive_a_second_call_and_point_here(run):
    run.link_packs()
    run.link_packs()
    link = run.BASE / "custom_nodes" / "linearize"
    assert link.resolve() == run.ROOT


def test_every_folder_of_tests_is_in_a_stage():
    text = (ROOT / "tests" / "stages.py").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    for folder in folders:
        assert any(f'"{each.as_posix()}"' in text for each in (folder, *folder.parents)), folder
    assert folders


def test_every_test_command_of_the_readme_is_one_of_ours(run):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("demo", "test", "serve", "bench"):
        assert f"python run.py {command}" in text and command in run.COMMANDS
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "run.py test" in ci
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0
