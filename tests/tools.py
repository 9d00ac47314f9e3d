"""Make what the tests need beside .venv, each in a folder of its own below .comfyui/.

Called by `run.py test` with the Python that runs ComfyUI. The steps do not depend on each other.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import run  # noqa: E402

COMFYUI_MANAGER = "comfyui-manager==4.3"
# the newest one; the browser tests run on it too, beside the one that ComfyUI itself asks for
FRONTEND = "comfyui-frontend-package==1.58.1"


def main() -> int:
    frontend = run.HOME / "frontends" / FRONTEND.partition("==")[2]
    steps = [
        ("comfy-cli", run.COMFY_CLI, run.HOME / "cli", lambda: run.make_tool("cli", run.COMFY_CLI)),
        ("ComfyUI Manager", f"{COMFYUI_MANAGER} {sys.executable}", run.HOME / "manager", install_manager),
        ("newest frontend", FRONTEND, frontend, lambda: install_frontend(frontend)),
    ]
    try:
        for name, inputs, product, action in steps:
            run.take_steps([(name, inputs, action)], {name: product}, str(sys.version_info[:2]))
    except run.Problem as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    return 0


def install_manager() -> None:
    """Install the Manager with ComfyUI's packages behind its own, as it finds them where people run it."""
    packages = run.packages_of(run.make_tool("manager", COMFYUI_MANAGER))
    (packages / "zz_comfyui.pth").write_text(f"{run.packages_of(Path(sys.executable))}\n", encoding="utf-8")


def install_frontend(folder: Path) -> None:
    partial = folder.with_name("partial")
    shutil.rmtree(folder.parent, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run.run([*pip, "install", "--no-deps", "--target", str(partial), FRONTEND])
    (partial / "comfyui_frontend_package" / "static").rename(folder)
    shutil.rmtree(partial)


if __name__ == "__main__":
    sys.exit(main())
