"""What is tracked: small, without secrets, places or forbidden calls; the two requirement lists agree."""

import re
import subprocess
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_CODE = re.compile(r"(?<![\w.])(eval|exec)\(|\bpickle\.|\btorch\.(load|save)\(|make_block_ptr")
TEXT = {".py", ".md", ".toml", ".json", ".yml", ".yaml", ".txt", ".csv", ".cfg", ""}


def tracked():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def test_everything_together_is_under_40_mb():
    assert sum(path.stat().st_size for path in tracked()) < 40 * 10**6


def test_no_forbidden_calls():
    own = Path(__file__).name
    bad = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix == ".py" and path.name != own
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN_CODE.search(line)
    ]
    assert bad == []


def test_nothing_names_a_place_of_a_machine_or_a_token():
    pattern = re.compile(
        r"/(home|root|Users|work)/[\w.]|hf_[A-Za-z0-9]{20,}|files\.pythonhosted|pypi\.org|registry\.npm"
    )
    bad = [
        f"{path.relative_to(ROOT)}: {match.group(0)}"
        for path in tracked()
        if path.suffix in TEXT and path.name not in (Path(__file__).name, "LICENSE")
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert bad == []


def test_modules_are_short_enough_to_read():
    long = {}
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py":
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > (500 if name.startswith("tests/") else 400):  # tests are read one at a time
                long[name] = count
    assert long == {}


def test_requirement_lists_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert project["project"]["dependencies"] == listed
    assert not [name for name in listed if re.match(r"(torch|triton|xformers|flash)", name)]


def test_every_package_is_mapped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        "linearize." + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for layer in ("kernels", "attention", "patching", "training", "nodes")
        for path in (ROOT / layer).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == {"linearize", *found}


PAGES = ["README.md", "README.zh.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".comfyignore"]
FRONT_PAGES = ["README.md", "README.zh.md", "CONTRIBUTING.md", "lab/evidence/README.md"]


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_there(name):
    assert len((ROOT / name).read_text(encoding="utf-8")) > 40


@pytest.mark.parametrize("name", FRONT_PAGES)
def test_front_pages_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 200


def test_links_between_documents_lead_somewhere():
    """To files, and to headings as GitHub names them."""
    dead = []
    for page in (path for path in tracked() if path.suffix == ".md" and "web" not in path.relative_to(ROOT).parts):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target, _, heading = link.partition("#")
            file = page.parent / target if target else page
            if target.startswith(("http:", "https:")):
                continue
            if not file.exists() or (heading and heading not in headings(file)):
                dead.append(f"{page.relative_to(ROOT)}: {link}")
    assert dead == []


def headings(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
