"""The real frontend in Chromium: templates, both forms of each shipped workflow, a run by its button, help pages.

All of it on two frontends: the one that is installed beside ComfyUI, and the newest, which `tests/tools.py` fetches.
"""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import urllib.error
from pathlib import Path

import pytest

from linearize.lab.comfyui import BASE, COMFYUI, write_settings
from linearize.lab.server import first_address, live_server

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = ROOT / "lab" / "demo" / "output"
NEWEST = sorted((ROOT / ".comfyui" / "frontends").glob("[0-9]*")) or [Path("newest")]  # folders by version
INSTALLED = importlib.metadata.version("comfyui-frontend-package") if importlib.util.find_spec(
    "comfyui_frontend_package") else "installed"  # fmt: skip
FRONTENDS = {INSTALLED: None, NEWEST[-1].name: NEWEST[-1]}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
READY = "window.app?.graph && app.extensionManager?.workflow?.activeWorkflow"
HAS_OURS = "window.app?.graph?.nodes.some(node => node.type.startsWith('Linearize'))"
MILLISECONDS = 60_000  # the longest that one step may take
TEMPLATES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "workflows").glob("*.json"))
DEMOS = [f"lab/demo/{name}.json" for name in ("foveated_demo", "clear_demo", "distill_demo", "distill_clips")]
SERVED = "lab/demo/nodes/workflows/side_by_side.json"
WORKFLOWS = [SERVED, *DEMOS, *TEMPLATES]
STATUS = "linearize_status"  # our widget for a node's status
CODEC = re.compile(r"(format\.)?codec(\..+)?")  # of SaveVideo, inside `format` since ComfyUI 0.34
OUTCOME = r"UNTRAINED · \d+ % of attention · 5 of 5 sites · [\d.]+ s a step, dense (about )?[\d.]+(: costs more .*)?"
OUTER = 100  # id of a blueprint's node in a workflow
NAME = "blueprint_test"
FEW = {  # nodes of the blueprint for any model: settings for a run of seconds
    "5": {"seeds": 1, "steps": 2},
    "9": {"updates": 2, "held_out": 1, "output_draws": 1},
    "13": {"updates": 1, "block_updates": 1, "accumulation": 1, "held_out": 1},
}
# not Playwright's own add_style_tag, which fails when the page is refused something else meanwhile
HIDE_OVERLAYS = """() => {
    const style = document.createElement('style');
    style.textContent = '.p-toast, .minimap-main-container { display: none !important; }';
    document.head.append(style);
}"""
TELL_ALL = """text => {
    const ours = app.graph.nodes.filter(node => node.type.startsWith('Linearize'));
    for (const { id, type } of ours) {
        const detail = { node: String(id), type, workflow: '', text, failed: false, at: Date.now() / 1000 };
        app.api.dispatchEvent(new CustomEvent('linearize.status', { detail }));
    }
}"""
SET_WIDGETS = """([id, values]) => {
    for (const widget of app.graph.getNodeById(id).widgets)
        if (widget.name in values) widget.value = values[widget.name];
}"""
CHANGE_AND_LISTEN = """() => {
    window.progress = [];
    app.api.addEventListener('progress', event => window.progress.push([event.detail.value, event.detail.max]));
    const ours = app.graph.nodes.find(node => node.type === 'LinearizeFoveated');
    const widget = ours.widgets.find(widget => widget.name === 'keep');
    widget.value = 0.2;
    widget.callback?.(0.2);
    for (const name of ['execution_success', 'execution_error'])
        app.api.addEventListener(name, event => window.ended = [name, event.detail.exception_message ?? '']);
}"""


def comparable(prompt: dict) -> dict:
    """Return a prompt without titles, and without the one input that cores name differently."""
    compared = {}
    for key, node in prompt.items():
        differs = CODEC if node["class_type"] == "SaveVideo" else re.compile("(?!)")
        inputs = {name: value for name, value in node["inputs"].items() if not differs.fullmatch(name)}
        compared[key] = {"class_type": node["class_type"], "inputs": inputs}
    return compared


def api_form(path: str) -> dict:
    """Return the API form that lies beside a workflow in the interface's form."""
    file = ROOT / path
    return comparable(json.loads((file.parent / "api" / file.name).read_text(encoding="utf-8")))


def prompt_of(page) -> dict:
    """Return what the frontend would queue now."""
    return comparable(page.evaluate("async () => (await app.graphToPrompt()).output"))


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


def test_the_widgets_of_every_node_stand_where_stored_workflows_have_their_values(frontend, server):
    nodes = {name: info for name, info in server.get("/object_info").items() if name.startswith("Linearize")}
    assert "LinearizeCLEAR" in nodes
    for name, info in nodes.items():
        widgets = frontend.evaluate(
            "name => (LiteGraph.createNode(name).widgets ?? []).filter(w => w.serialize !== false).map(w => w.name)",
            name,
        )
        order = [each for part in ("required", "optional") for each in info["input_order"].get(part, ())]
        found = [each.partition(".")[0] for each in widgets if each.partition(".")[0] in order]
        assert list(dict.fromkeys(found)) == [each for each in order if each in found], name
        given = {**info["input"]["required"], **info["input"].get("optional", {})}
        missing = {each for each in order if given[each][1].get("default") is not None} - set(found)
        assert not missing, f"{name} has no widget for {missing}"


def open_workflow(page, path: str) -> None:
    """Open a workflow file as the user's own."""
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads((ROOT / path).read_text(encoding="utf-8")))
    page.wait_for_function(HAS_OURS)


def test_the_frontend_is_the_one_that_is_meant(frontend, version):
    assert frontend.evaluate("window.__COMFYUI_FRONTEND_VERSION__") == version


def test_the_template_is_listed_with_its_picture(server):
    assert "flux_dev_clear" in server.get("/api/workflow_templates")["linearize"]
    assert server.bytes("/api/workflow_templates/linearize/flux_dev_clear.jpg")[:3] == b"\xff\xd8\xff"


def test_the_template_opens_by_its_address(page, server):
    page.goto(f"{server.url}/?template=flux_dev_clear&source=linearize")
    page.wait_for_function(HAS_OURS)
    assert prompt_of(page) == api_form("workflows/flux_dev_clear.json")


@pytest.mark.parametrize("path", WORKFLOWS)
def test_both_forms_of_a_workflow_say_the_same_and_nodes_do_not_overlap(frontend, path):
    open_workflow(frontend, path)
    assert prompt_of(frontend) == api_form(path)
    frontend.evaluate(
        TELL_ALL, "UNTRAINED · 17 % of attention · 57 of 57 sites · 0.31 s a step, dense about 0.69\n" * 2
    )
    frontend.wait_for_timeout(300)  # the texts are measured and their nodes grow
    boxes = frontend.evaluate("app.graph.nodes.map(node => [node.type, ...node.getBounding()])")
    assert overlapping(boxes) == []


@pytest.mark.parametrize("path", [SERVED, "lab/demo/distill_demo.json", *TEMPLATES[::4]])
def test_nodes_lie_apart_after_a_run_as_nodes_2(frontend, path):
    """With statuses of several lines and with pictures, which the frontend puts below them."""
    from linearize.lab.authoring.rooms import pretend_a_run

    picture = COMFYUI / "input" / "example.png"
    frontend.route("**/api/view?*example.png*", lambda route: route.fulfill(path=picture))
    in_mode(frontend, True)
    try:
        open_workflow(frontend, path)
        pretend_a_run(frontend, "example.png")
        boxes = frontend.evaluate(
            "[...document.querySelectorAll('[data-node-id]')].map(each => [each, each.getBoundingClientRect()])"
            ".map(([each, box]) => [each.dataset.nodeId, box.left, box.top, box.width, box.height])"
        )
        assert len(boxes) > 5 and overlapping(boxes) == []
    finally:
        in_mode(frontend, False)


def overlapping(boxes: list) -> list[str]:
    """Return which of (name, left, top, width, height) lie on which."""
    return [
        f"{name} lies on {other}"
        for index, (name, left, top, width, height) in enumerate(boxes)
        for other, x, y, w, h in boxes[index + 1 :]
        if not (left + width <= x or x + w <= left or top + height <= y or y + h <= top)
    ]


def with_blueprint(template: dict, blueprint: dict) -> dict:
    """Return the template of Wan 2.2 with the blueprint's node in place of its two foveated nodes."""
    (node,), changed = blueprint["nodes"], {**template, "definitions": blueprint["definitions"]}
    node["id"] = changed["last_node_id"] = template["last_node_id"] + 1
    slots = {socket["name"]: slot for slot, socket in enumerate(node["inputs"])}
    ours = [each["id"] for each in template["nodes"] if each["type"] == "LinearizeFoveated"]
    for output, (old, expert) in enumerate(zip(ours, ("high_noise", "low_noise"), strict=True)):
        node["outputs"][output]["links"] = [link[0] for link in template["links"] if link[1] == old]
        for link in template["links"]:
            if link[1] == old:
                link[1:3] = node["id"], output
            if link[3] == old:
                link[3:5] = node["id"], slots[expert]
                node["inputs"][slots[expert]]["link"] = link[0]
    changed["nodes"] = [each for each in template["nodes"] if each["id"] not in ours] + [node]
    return changed


def test_the_blueprint_of_wan_22_does_what_its_template_does(frontend):
    """Both experts go in and come out patched; ComfyUI writes nodes of a subgraph as outer id, colon, inner id."""
    files = ("workflows/wan22_t2v_foveated.json", "subgraphs/Linearize Wan 2.2.json")
    template, blueprint = (json.loads((ROOT / name).read_text(encoding="utf-8")) for name in files)
    frontend.evaluate("workflow => app.loadGraphData(workflow)", with_blueprint(template, blueprint))
    frontend.wait_for_function("window.app?.graph?.nodes.some(node => node.title === 'Linearize Wan 2.2')")
    outer = blueprint["nodes"][0]["id"]
    expanded = json.loads(json.dumps(prompt_of(frontend)).replace(f'"{outer}:', '"'))
    assert expanded == api_form("workflows/wan22_t2v_foveated.json")


def beside_the_demos_model(blueprint: dict) -> dict:
    """Return a workflow of the demo's model, text encoder and latent, and the blueprint's node behind them."""
    demo = json.loads((ROOT / "lab" / "demo" / "distill_demo.json").read_text(encoding="utf-8"))
    (node,), links = blueprint["nodes"], []
    node["id"], node["pos"] = OUTER, [500, 0]
    loaders = [each for each in demo["nodes"] if each["id"] in (1, 2, 3)]
    for slot, loader in enumerate(loaders):
        link = [slot + 1, loader["id"], 0, OUTER, slot, loader["outputs"][0]["type"]]
        loader["outputs"][0]["links"] = [link[0]]
        node["inputs"][slot]["link"] = link[0]
        links.append(link)
    return {**blueprint, "nodes": [*loaders, node], "links": links, "last_node_id": OUTER, "last_link_id": 3}


def test_the_blueprint_for_any_model_is_its_template_and_runs(frontend, server, version):
    """What its widgets say arrives inside; on the demo's model, with few updates, a student comes out and is saved."""
    for path in (BASE / "models" / "linearize").glob(f"{NAME}_*.safetensors"):
        path.unlink()
    blueprint = json.loads((ROOT / "subgraphs" / "Linearize my model.json").read_text(encoding="utf-8"))
    frontend.evaluate("workflow => app.loadGraphData(workflow)", beside_the_demos_model(blueprint))
    frontend.wait_for_function(f"window.app?.graph?.getNodeById({OUTER})?.title === 'Linearize my model'")
    take_picture(frontend, PICTURES / f"blueprint-{version}.png")
    shipped = prompt_of(frontend)
    template = api_form("workflows/flux_dev_distill.json")
    outside = {"4": ["3", 0]}  # ids of the template that are other ones here
    for key, node in template.items():
        if f"{OUTER}:{key}" in shipped:
            for name, value in node["inputs"].items():
                if isinstance(value, list):
                    inner = f"{OUTER}:{value[0]}"
                    node["inputs"][name] = [inner, value[1]] if inner in shipped else outside.get(value[0], value)
    template["5"]["inputs"].update(name="my-model", guidance=0.0)
    for plan in ("6", "7", "8"):
        template[plan]["inputs"]["host"] = "auto"
    template["14"]["inputs"].update(name="my-model", base_model="", licence="")
    inside = {key.removeprefix(f"{OUTER}:"): node for key, node in shipped.items() if ":" in key}
    assert inside == {key: template[key] for key in ("5", "6", "7", "8", "9", "12", "13", "14")}

    prompts = "night moon left hills red house left oak right\nday sun right hills blue house right pine left"
    frontend.evaluate(SET_WIDGETS, [OUTER, {"prompts": prompts, "name": NAME, "budget": 0.35}])
    queued = prompt_of(frontend)
    plans = [node["inputs"] for node in queued.values() if node["class_type"] == "LinearizeUniformPlan"]
    assert [plan["host"] for plan in plans] == ["auto"] * 3, "the host is found by itself"
    assert queued[f"{OUTER}:5"]["inputs"]["prompts"] == prompts
    assert {queued[f"{OUTER}:{key}"]["inputs"]["name"] for key in ("5", "14")} == {NAME}
    assert queued[f"{OUTER}:12"]["inputs"]["budget"] == 0.35
    for key, few in FEW.items():
        queued[f"{OUTER}:{key}"]["inputs"].update(few)
    text = server.run(queued)[f"{OUTER}:14"]["text"][0]
    assert f"{NAME}_00001_.safetensors" in text and "FLUX.1" in text, text


def status_of(page, kind: str) -> str:
    """Return the status that the first node of a type shows."""
    find = "([kind, name]) => app.graph.nodes.find(n => n.type === kind).widgets.find(w => w.name === name)?.value"
    return page.evaluate(find, [kind, STATUS]) or ""


def take_picture(page, path: Path) -> None:
    """Save a picture of the whole graph, without what the interface lays over it."""
    page.evaluate(HIDE_OVERLAYS)
    page.evaluate("app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")
    page.wait_for_timeout(1000)  # pictures arrive
    page.evaluate("app.canvas.canvas.focus()")
    page.keyboard.press(".")  # fit the view
    page.wait_for_timeout(1500)
    path.parent.mkdir(exist_ok=True)
    page.screenshot(path=path)


def test_the_template_list_shows_ours_and_opens_one(frontend):
    frontend.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    frontend.get_by_text("linearize", exact=True).first.click()
    frontend.get_by_test_id("template-workflow-flux_dev_clear").click()
    frontend.wait_for_function(HAS_OURS)
    assert prompt_of(frontend) == api_form("workflows/flux_dev_clear.json")


def test_the_demo_runs_and_the_nodes_say_what_ran(frontend, version):
    open_workflow(frontend, "lab/demo/foveated_demo.json")
    frontend.evaluate(CHANGE_AND_LISTEN)
    assert prompt_of(frontend)["4"]["inputs"]["keep"] == 0.2
    frontend.get_by_test_id("queue-button").click()
    frontend.wait_for_function("window.ended")
    ended, why = frontend.evaluate("window.ended")
    assert ended == "execution_success", why
    assert [16, 16] in frontend.evaluate("window.progress")
    frontend.wait_for_function("app.graph.nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth === 512")
    take_picture(frontend, PICTURES / f"browser-{version}.png")
    status, report = (status_of(frontend, kind) for kind in ("LinearizeFoveated", "LinearizeReport"))
    outcome, kind, dated = status.split("\n")
    assert re.fullmatch(OUTCOME, outcome), status
    assert re.fullmatch(r"foveated \((torch|triton)\): 5 sites", kind) and re.fullmatch(r"last run \d\d:\d\d", dated), (
        status
    )
    assert report.startswith(f"{outcome}\nsampled: 512 x 512 pixels, 12 text tokens\n"), report
    assert re.search(r"^foveated .*: 5 sites", report.partition("planned:")[2], re.MULTILINE), report
    assert outcome not in json.dumps(frontend.evaluate("app.graph.serialize()")), "a shared workflow tells of no run"


def in_mode(page, is_vue: bool) -> None:
    """Draw nodes as Nodes 2.0 or on LiteGraph's canvas."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", is_vue)
    page.wait_for_timeout(1000)


@pytest.fixture(params=[False, True], ids=["LiteGraph", "Nodes 2.0"])
def mode(frontend, request):
    """Both ways to draw nodes; LiteGraph's is there again afterwards."""
    in_mode(frontend, request.param)
    yield request.param
    in_mode(frontend, False)


LISTEN = """() => {
    window.executed = [];
    app.api.addEventListener('executing', event => window.executed.push(String(event.detail)));
    for (const name of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(name, event => window.ended = [name, event.detail.exception_message ?? '']);
}"""
SLIDER = "[...document.querySelectorAll('[data-node-id=\"17\"] img')].map(each => new URL(each.src).search)"


def test_serve_opens_a_graph_that_runs_dense_and_cheaper_attention_side_by_side(frontend, server, version, mode):
    """By the address that it names, in a tab that had ComfyUI's own graph; Nodes 2.0 draws the slider."""
    frontend.goto(first_address(server))
    frontend.wait_for_function(HAS_OURS)
    served = api_form(SERVED)
    assert prompt_of(frontend) == served
    assert served["4"]["class_type"] == "LinearizeFoveated" and served["17"]["class_type"] == "ImageCompare"
    frontend.evaluate(LISTEN)
    frontend.evaluate(SET_WIDGETS, [4, {"keep": 0.3 if mode else 0.25}])  # or the server's cache answers
    frontend.get_by_test_id("queue-button").click()
    frontend.wait_for_function("window.ended")
    assert frontend.evaluate("window.ended") == ["execution_success", ""]
    if mode:
        frontend.wait_for_function(f"{SLIDER}.length === 2")
        assert len({*frontend.evaluate(SLIDER)}) == 2
    take_picture(frontend, PICTURES / f"served-{version}-{'new' if mode else 'classic'}.png")
    assert status_of(frontend, "LinearizeFoveated").startswith("UNTRAINED")
    assert "PSNR" in status_of(frontend, "LinearizeCompare")


LINES = """() => {
    const shown = [...document.querySelectorAll('.linearize-status .linearize-status')].find(each => each.offsetHeight);
    return shown && [shown.innerText.split('\\n').length, Math.round(shown.offsetHeight / 14)];
}"""


def test_a_status_lasts_over_a_reload_in_both_modes_and_keeps_its_lines(frontend, mode):
    open_workflow(frontend, "lab/demo/clear_demo.json")
    frontend.evaluate(TELL_ALL, "first\nsecond\nthird")
    frontend.wait_for_function(LINES)
    said, drawn = frontend.evaluate(LINES)
    assert said == 3 <= drawn, "each line has a line of its own"
    frontend.wait_for_timeout(1500)  # the frontend keeps a draft of the graph
    frontend.reload()
    frontend.wait_for_function(READY)
    frontend.wait_for_function(HAS_OURS)
    frontend.wait_for_function(LINES)
    status = status_of(frontend, "LinearizeCLEAR")
    assert re.fullmatch(r"first\nsecond\nthird\nlast run \d\d:\d\d", status), status


QUICK_DISTILLATION = {  # of the demo's workflow: seconds until updates begin, and more of them than a test waits for
    4: {"prompts": "day sun left hills red house left oak", "name": "browser_cancel", "seeds": 2, "steps": 2},
    8: {"updates": 5000, "held_out": 1, "output_draws": 0},
}


def test_cancel_ends_the_prompt_and_the_node_says_how_far_it_came(frontend):
    open_workflow(frontend, "lab/demo/distill_demo.json")
    for key, values in QUICK_DISTILLATION.items():
        frontend.evaluate(SET_WIDGETS, [key, values])
    frontend.evaluate(LISTEN)
    frontend.get_by_test_id("queue-button").click()
    status = f"app.graph.getNodeById(8).widgets.find(w => w.name === '{STATUS}')?.value ?? ''"
    frontend.wait_for_function(f"/update \\d+ of 5000/.test({status})")
    frontend.evaluate("app.api.interrupt()")
    frontend.wait_for_function("window.ended")
    assert frontend.evaluate("window.ended[0]") == "execution_interrupted"
    told, dated = frontend.evaluate(status).split("\n")
    assert re.fullmatch(r"cancelled after \d+ of 5000 updates, run again to go on", told), told
    assert dated.startswith("last run ")
    assert not {"9", "10", "11", "14"} & set(frontend.evaluate("window.executed")), "nothing behind it runs"


def test_an_errors_sentence_is_on_its_node(frontend):
    open_workflow(frontend, "lab/demo/clear_demo.json")
    frontend.evaluate("() => { app.graph.nodes.find(n => n.type === 'LinearizeCLEAR').widgets"
                      ".find(w => w.name === 'sites').value = 'middle'; }")  # fmt: skip
    frontend.evaluate(LISTEN)
    frontend.get_by_test_id("queue-button").click()
    frontend.wait_for_function("window.ended")
    ended, message = frontend.evaluate("window.ended")
    sentence = "'middle' names no site of this model, which has double.0, single.0-3"
    assert ended == "execution_error" and message.strip() == sentence, message
    shown, dated = status_of(frontend, "LinearizeCLEAR").split("\n")
    assert shown == sentence and dated.startswith("last run ")


def test_a_status_of_another_workflow_or_type_is_not_shown(frontend):
    open_workflow(frontend, "lab/demo/clear_demo.json")
    tell = """([workflow, type]) => app.api.dispatchEvent(new CustomEvent('linearize.status', { detail: {
        node: String(app.graph.nodes.find(n => n.type === 'LinearizeCLEAR').id), type, workflow,
        text: 'mine', failed: false, at: 0 } }))"""
    own = frontend.evaluate("(app.rootGraph ?? app.graph).id")
    for workflow, kind, shown in (
        ("another", "LinearizeCLEAR", ""),
        (own, "KSampler", ""),
        (own, "LinearizeCLEAR", "mine"),
    ):
        frontend.evaluate(tell, [workflow, kind])
        assert status_of(frontend, "LinearizeCLEAR") == shown


def test_a_status_inside_a_subgraph_is_shown_outside_too(frontend):
    blueprint = json.loads((ROOT / "subgraphs" / "Linearize my model.json").read_text(encoding="utf-8"))
    frontend.evaluate("workflow => app.loadGraphData(workflow)", beside_the_demos_model(blueprint))
    frontend.wait_for_function(f"window.app?.graph?.getNodeById({OUTER})?.title === 'Linearize my model'")
    tell = """node => app.api.dispatchEvent(new CustomEvent('linearize.status', { detail: {
        node, type: '', workflow: '', text: 'update 3 of 8\\nmore', failed: false, at: 0 } }))"""
    frontend.evaluate(tell, f"{OUTER}:9")
    find = "([id, name]) => app.graph.getNodeById(id).widgets.find(w => w.name === name)?.value"
    assert frontend.evaluate(find, [OUTER, STATUS]) == "Distill Attention\nupdate 3 of 8"


@pytest.mark.parametrize(
    ("language", "title", "radius", "help_words"),
    [("en", "CLEAR Attention", "radius", "each image token"), ("zh", "CLEAR 注意力", "半径", "让每个图像 token")],
)
def test_a_node_speaks_the_users_language_and_explains_itself(frontend, language, title, radius, help_words):
    frontend.evaluate("language => app.extensionManager.setting.set('Comfy.Locale', language)", language)
    frontend.wait_for_timeout(1000)  # the setting is saved
    try:
        frontend.reload()
        frontend.wait_for_function(READY)
        open_workflow(frontend, "lab/demo/clear_demo.json")
        clear = "app.graph.nodes.find(node => node.type === 'LinearizeCLEAR')"
        shown = frontend.evaluate(f"[{clear}.title, {clear}.widgets[0].label ?? {clear}.widgets[0].name]")
        assert shown == [title, radius]
        frontend.evaluate(f"app.canvas.selectNode({clear})")
        frontend.get_by_test_id("info-button").click()
        frontend.locator(".node-help-content").get_by_text(help_words).first.wait_for()
    finally:
        frontend.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'en')")
        frontend.wait_for_timeout(1000)


def test_a_status_is_told_in_the_users_language(frontend):
    """Every part of an outcome has its Chinese words; what no rule knows stays as it came."""
    frontend.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    try:
        open_workflow(frontend, "lab/demo/clear_demo.json")
        outcome = "UNTRAINED · 17 % of attention · 5 of 5 sites · 0.31 s a step, dense about 0.69"
        frontend.evaluate(TELL_ALL, f"{outcome}\nclear (torch): 5 sites\na sentence")
        told = status_of(frontend, "LinearizeCLEAR")
        expected = "未训练 · 注意力运算的 17 % · 5 / 5 个位置 · 每步 0.31 秒，稠密约 0.69"
        assert told == f"{expected}\nclear (torch): 5 sites\na sentence", told
    finally:
        frontend.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'en')")
        frontend.wait_for_timeout(1000)


def help_page(server, name: str) -> str:
    """Return a node's help page, looked for where the frontend does: by language, then without one."""
    for path in (f"{name}/en.md", f"{name}.md"):
        try:
            return server.bytes(f"/extensions/linearize/docs/{path}").decode()
        except urllib.error.HTTPError:
            continue
    return ""


def test_every_node_has_a_help_page(server):
    nodes = server.get("/object_info")
    ours = [name for name, node in nodes.items() if node["python_module"] == "custom_nodes.linearize"]
    assert "LinearizeCLEAR" in ours
    assert [name for name in ours if not help_page(server, name).strip()] == []
