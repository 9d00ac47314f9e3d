"""The shipped workflow files by themselves: links, frames, files to load, notes, pictures; both forms say the same."""

import json
import re
from pathlib import Path

import pytest
import tomllib
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
DEMOS = ("foveated_demo", "clear_demo", "distill_demo", "distill_clips")
SERVED = ROOT / "lab" / "demo" / "nodes" / "workflows" / "side_by_side.json"
WORKFLOWS = [*TEMPLATES, SERVED, *(ROOT / "lab" / "demo" / f"{name}.json" for name in DEMOS)]
SHIPPED = [*WORKFLOWS, *BLUEPRINTS, *(path.parent / "api" / path.name for path in WORKFLOWS)]
TITLE_BAR = 30  # pixels that the frontend draws above a node's position
USERS_OWN = {"flux_lora.safetensors"}  # a name that stands for a file of the user's
SEEDS = ("seed", "noise_seed")
UPLOAD = "upload"  # the button of Load Image, whose value is never sent
SLIDER = {"compare_view": {"__value__": ["", ""]}}  # of Compare Images, whose value is sent and never stored
FOLDERS = {"checkpoints", "diffusion_models", "text_encoders", "vae", "loras", "linearize"}
FORBIDDEN_TEXT = re.compile(r"^(/|~|\\|[A-Za-z]:[\\/]|file:)|hf_[A-Za-z0-9]{8,}|[?&](token|key)=", re.IGNORECASE)


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def api_form(path):
    return load(path.parent / "api" / path.name)


def by_name(path):
    return path.relative_to(ROOT).as_posix()


def nodes_of(workflow):
    """Return the nodes that run, by id as the API form writes it."""
    return {str(node["id"]): node for node in workflow["nodes"] if node["type"] != "MarkdownNote"}


def widget_values(node):
    """Return a node's values by name, without what the frontend adds behind seeds and pictures; and what it adds."""
    values, found, controls = list(node.get("widgets_values", [])), {}, []
    for name in (slot["widget"]["name"] for slot in node["inputs"] if "widget" in slot):
        found[name] = SLIDER[name] if name in SLIDER else values.pop(0)
        if name == UPLOAD:
            del found[name]
        if name in SEEDS:
            controls.append(values.pop(0))
    assert not values, f"{node['type']} has values without a name: {values}"
    return found, controls


def strings(value):
    """Yield every text inside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def nothings(value, where="$"):
    """Yield the places of nulls that are not the number of a link: newer frontends read objects and lists there."""
    if isinstance(value, (list, dict)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            place = f"{where}.{key}"
            if each is not None:
                yield from nothings(each, place)
            elif key != "link":
                yield place


def box(node):
    left, top = node["pos"]
    return left, top - TITLE_BAR, left + node["size"][0], top + node["size"][1]


def frame_box(group):
    left, top, width, height = group["bounding"]
    return left, top, left + width, top + height


def apart(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def inside(one, other):
    return one[0] >= other[0] and one[1] >= other[1] and one[2] <= other[2] and one[3] <= other[3]


def test_every_template_has_all_its_parts_and_no_part_is_left_over():
    names = {path.stem for path in TEMPLATES}
    assert names >= {"flux_dev_clear", "flux_dev_high_res"}, "shipped names are for ever"
    for pattern in ("*.jpg", "api/*.json", "api/*.md"):
        assert {path.stem for path in (ROOT / "workflows").glob(pattern)} == names
    ids = [load(path)["id"] for path in WORKFLOWS]
    assert len(set(ids)) == len(ids)


def test_every_template_is_in_the_documents():
    text = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    assert [path.stem for path in TEMPLATES if f"`{path.stem}`" not in text] == []


@pytest.mark.parametrize("path", SHIPPED, ids=by_name)
def test_nothing_is_null_but_the_link_of_an_empty_socket(path):
    assert list(nothings(load(path))) == []


def test_the_author_writes_no_nulls_of_a_frontend():
    """What frontends write as null at any depth goes, or becomes an empty list; empty sockets stay as they are."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    from linearize.lab.authoring import workflows

    socket, node = {"name": "model", "shape": None, "link": None}, {"id": 7, "type": "A", "color": None}
    node |= {"inputs": [socket], "outputs": [{"name": "x", "links": None}], "size": [5, 6], "widgets_values": [1]}
    node |= {"properties": {"aux_id": None}}
    workflow = {"nodes": [node], "links": [], "floatingLinks": None, "definitions": None, "reroutes": None}
    workflow |= {"groups": [{"title": "a", "flags": {"pinned": None}}], "config": {"later": None}}
    workflows.tidy(workflow, ("7",), "", "name")
    assert list(nothings(workflow)) == []
    assert workflow["nodes"][0]["inputs"] == [{"name": "model", "link": None}]
    assert workflow["nodes"][0]["outputs"] == [{"name": "x", "links": []}]
    assert not {"floatingLinks", "definitions", "reroutes"} & workflow.keys()


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_both_forms_say_the_same(path):
    workflow, api = load(path), api_form(path)
    origin = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    nodes = nodes_of(workflow)
    assert nodes.keys() == api.keys()
    for key, node in nodes.items():
        linked = {slot["name"]: origin[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        assert {"class_type": node["type"], "inputs": {**widget_values(node)[0], **linked}} == api[key], key


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_links_are_known_at_both_ends(path):
    workflow = load(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) <= workflow["last_node_id"]
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"]) and max(links) <= workflow["last_link_id"]
    for number, origin, slot, target, entry, kind in links.values():
        output, socket = nodes[origin]["outputs"][slot], nodes[target]["inputs"][entry]
        assert number in output["links"] and socket["link"] == number
        assert output["type"] == kind and {kind, "*"} & set(socket["type"].split(","))
    ends = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot.get("link") is not None]
    starts = [number for node in nodes.values() for slot in node["outputs"] for number in slot["links"] or []]
    assert sorted(ends) == sorted(starts) == sorted(links)


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_nothing_overlaps_and_frames_have_titles(path):
    workflow = load(path)
    nodes, groups = workflow["nodes"], workflow["groups"]
    for number, node in enumerate(nodes):
        assert min(node["pos"]) >= 0 and min(node["size"]) > 0, node["type"]
        for other in nodes[number + 1 :]:
            assert apart(box(node), box(other)), f"{node['type']} lies on {other['type']}"
    for number, group in enumerate(groups):
        edge = frame_box(group)
        assert group["title"].strip() and all(apart(edge, frame_box(other)) for other in groups[number + 1 :])
        assert all(apart(edge, box(node)) or inside(box(node), edge) for node in nodes), group["title"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_seeds_are_fixed_and_no_text_is_a_place_or_a_secret(path):
    workflow = load(path)
    for node in nodes_of(workflow).values():
        assert set(widget_values(node)[1]) <= {"fixed"}
    for form in (workflow, api_form(path)):
        assert [text for text in strings(form) if FORBIDDEN_TEXT.search(text)] == []


@pytest.mark.parametrize("path", TEMPLATES, ids=by_name)
def test_a_template_names_packs_and_files(path):
    """Manager finds missing packs by `cnr_id`; the frontend offers the files of `models` for download."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for node in nodes_of(load(path)).values():
        properties = node["properties"]
        ours = node["type"].startswith("Linearize")
        assert properties["cnr_id"] == ("linearize" if ours else "comfy-core")
        assert properties["ver"] == (version if ours else "0.30.0")
        wanted = {text for text in strings(widget_values(node)[0]) if text.endswith(".safetensors")} - USERS_OWN
        models = properties.get("models", [])
        assert {model["name"] for model in models} == wanted
        for model in models:
            address = rf"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/([\w.-]+/)*{re.escape(model['name'])}"
            assert model.keys() == {"name", "url", "directory"} and model["directory"] in FOLDERS
            assert re.fullmatch(address, model["url"]), model["url"]


@pytest.mark.parametrize("path", TEMPLATES, ids=by_name)
def test_a_template_has_a_note_and_a_small_picture(path):
    (note,) = (node for node in load(path)["nodes"] if node["type"] == "MarkdownNote")
    text = (path.parent / "api" / f"{path.stem}.md").read_text(encoding="utf-8")
    assert note["widgets_values"] == [text] and text.startswith("## ")
    assert load(path)["groups"], "a template is framed"
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 200_000
    with Image.open(picture) as opened:
        assert opened.format == "JPEG" and opened.size == (640, 400)
