"""A real ComfyUI server as a child process, and a small client for it. Standard library only.

`python -m lab.server --port 8188` keeps one open for a person and opens a graph of the demo in the browser; the demo
and the tests use `LiveServer`.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .comfyui import BASE, COMFYUI, prepare_base

START_SECONDS = 180
FIRST_GRAPH = "?template=side_by_side&source=linearize_demo"  # a template of the demo's nodes


class ServerProblem(Exception):
    """The server did not start or refused a workflow; the message says why."""


class LiveServer:
    """Talks to one server.

    Args:
        port: where it listens on this machine.
        log: the file that holds its output.
    """

    def __init__(self, port: int, log: Path, process: subprocess.Popen) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.process = process

    def get(self, path: str) -> Any:
        """Return the JSON of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def bytes(self, path: str) -> bytes:
        """Return the body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def queue(self, workflow: dict[str, Any]) -> str:
        """Queue a workflow in API format; return its prompt id.

        Raises:
            ServerProblem: the server refused it; the message holds its node errors.
        """
        body = json.dumps({"prompt": workflow, "client_id": uuid.uuid4().hex}).encode()
        request = urllib.request.Request(self.url + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ServerProblem(error.read().decode()) from None

    def wait(self, prompt_id: str, seconds: float = 600) -> dict[str, Any]:
        """Return the outputs of a finished prompt, by node id.

        Raises:
            ServerProblem: a node failed (its message is given), or time ran out.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry["status"].get("status_str") == "error":
                errors = [data for name, data in entry["status"]["messages"] if name == "execution_error"]
                found = f"{errors[0]['node_type']}: {errors[0]['exception_message']}" if errors else "no message"
                raise ServerProblem(found.strip())
            if entry and entry["status"].get("completed"):
                return entry["outputs"]
            if self.process.poll() is not None:
                raise ServerProblem(f"the server ended; its output is in {self.log}")
            time.sleep(0.1)
        raise ServerProblem(f"no result after {seconds:.0f} s; the server's output is in {self.log}")

    def run(self, workflow: dict[str, Any], seconds: float = 600) -> dict[str, Any]:
        """Queue a workflow in API format and return its outputs."""
        return self.wait(self.queue(workflow), seconds)

    def measure(self, workflow: dict[str, Any], seconds: float = 600) -> tuple[dict[str, Any], float]:
        """Run a workflow in API format; return its outputs by node type, and how long it took."""
        prompt = self.queue(workflow)
        outputs = self.wait(prompt, seconds)
        return {workflow[key]["class_type"]: output for key, output in outputs.items()}, self.seconds(prompt)

    def image(self, saved: dict[str, str]) -> bytes:
        """Return the bytes of a picture that an output names."""
        return self.bytes("/view?" + urllib.parse.urlencode(saved))

    def seconds(self, prompt_id: str) -> float:
        """Return how long a finished prompt took."""
        messages = self.get(f"/history/{prompt_id}")[prompt_id]["status"]["messages"]
        times = {name: data["timestamp"] for name, data in messages}
        return (times["execution_success"] - times["execution_start"]) / 1000


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_is_taken(port: int) -> bool:
    """Return whether something listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def server_command(port: int) -> list[str]:
    """Return the command that starts ComfyUI on this machine only, with data in this checkout."""
    command = [sys.executable, str(COMFYUI / "main.py"), "--listen", "127.0.0.1", "--port", str(port),
               "--disable-auto-launch", "--disable-api-nodes", "--preview-method", "latent2rgb",
               "--base-directory", str(BASE), "--database-url", "sqlite:///:memory:"]  # fmt: skip
    has_cuda = subprocess.run(
        [sys.executable, "-c", "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"]
    ).returncode
    return command if has_cuda == 0 else [*command, "--cpu", "--use-pytorch-cross-attention"]


@contextlib.contextmanager
def live_server(
    port: int | None = None, environment: dict[str, str] | None = None, options: Sequence[str] = ()
) -> Iterator[LiveServer]:
    """Start the server, wait until it answers, stop it at the end.

    Args:
        port: None takes a free one.
        environment: added to this process's own.
        options: added to ComfyUI's command line.

    Raises:
        ServerProblem: the port is taken, or the server ended or stayed silent; the end of its output is given.
    """
    prepare_base()
    port = port or free_port()
    if port_is_taken(port):
        raise ServerProblem(f"port {port} is in use; stop what listens there or choose another one with --port")
    log = BASE.parent / f"server-{port}.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*server_command(port), *options], stdout=output, stderr=subprocess.STDOUT, cwd=BASE,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})},
        )  # fmt: skip
        server = LiveServer(port, log, process)
        try:
            _wait_until_up(server)
            yield server
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _wait_until_up(server: LiveServer) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            nodes = server.get("/object_info/LinearizeCLEAR")
            if nodes:
                return
            break
        time.sleep(0.2)
    tail = server.log.read_text(encoding="utf-8", errors="replace")[-2000:]
    found = re.findall(r"^.*Cannot import.*linearize.*$", tail, flags=re.MULTILINE)
    why = found[-1] if found else tail
    raise ServerProblem(f"ComfyUI did not start with the pack; the end of {server.log}:\n{why}")


def first_address(server: LiveServer) -> str:
    """Return the address at which the interface opens the demo's graph instead of ComfyUI's own."""
    return f"{server.url}/{FIRST_GRAPH}"


def show(address: str) -> None:
    """Open an address in the browser of whoever sits at this machine; a terminal without a screen opens none."""
    has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_screen and sys.stdout.isatty():
        webbrowser.open(address)


def main() -> int:
    parser = argparse.ArgumentParser(description="Keep a ComfyUI server with the pack open.")
    parser.add_argument("--port", type=int, default=8188)
    port = parser.parse_args().port
    try:
        with live_server(port) as server:
            address = first_address(server)
            print(f"Dense and cheaper attention side by side: {address}", flush=True)
            print(f"Press Ctrl+C to stop ComfyUI. Its output: {server.log}", flush=True)
            show(address)
            server.process.wait()
    except ServerProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
