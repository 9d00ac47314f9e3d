"""The real frontend in Chromium: a run by its button, statuses, Cancel, errors, languages, help pages.

On two frontends: the one that is installed beside ComfyUI, and the newest. The shipped graphs are in test_graphs.py.
"""

import json
import re
import urllib.error

import pytest
from interface import (
    HAS_OURS,
    LISTEN,
    OUTER,
    PICTURES,
    READY,
    ROOT,
    SET_WIDGETS,
    STATUS,
    beside_the_demos_model,
    open_workflow,
    prompt_of,
    status_of,
    take_picture,
)

OUTCOME = r"UNTRAINED · \d+ % of attention · 5 of 5 sites · [\d.]+ s a step, dense (about )?[\d.]+(: costs more .*)?"
TELL_ALL = """text => {
    const ours = app.graph.nodes.filter(node => node.type.startsWith('Linearize'));
    for (const { id, type } of ours) {
        const detail = { node: String(id), type, workflow: '', text, failed: false, at: Date.now() / 1000 };
        app.api.dispatchEvent(new CustomEvent('linearize.status', { detail }));
    }
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


def test_the_frontend_is_the_one_that_is_meant(frontend, version):
    assert frontend.evaluate("window.__COMFYUI_FRONTEND_VERSION__") == version


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


FIRST = {  # searched word: whether a node of ours comes before all others
    **dict.fromkeys(("sparse attention", "accelerate", "speed up", "memory", "sage attention", "faster video"), True),
    **dict.fromkeys(("加速", "稀疏", "窗口"), True),
    **dict.fromkeys(("sage", "wan"), False),
}
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


FILL_STORAGE = """() => {
    Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };
}"""


def test_a_full_storage_costs_no_status_while_the_page_is_open(frontend):
    open_workflow(frontend, "lab/demo/clear_demo.json")
    frontend.evaluate(TELL_ALL, "first")
    frontend.evaluate(FILL_STORAGE)
    frontend.evaluate(TELL_ALL, "second")
    frontend.evaluate("app.api.dispatchEvent(new CustomEvent('execution_success', { detail: {} }))")
    assert re.fullmatch(r"second\nlast run \d\d:\d\d", status_of(frontend, "LinearizeCLEAR"))


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


def test_a_status_inside_a_subgraph_is_shown_outside_too(frontend, version):
    blueprint = json.loads((ROOT / "subgraphs" / "Linearize my model.json").read_text(encoding="utf-8"))
    frontend.evaluate("workflow => app.loadGraphData(workflow)", beside_the_demos_model(blueprint))
    frontend.wait_for_function(f"window.app?.graph?.getNodeById({OUTER})?.title === 'Linearize my model'")
    tell = """node => app.api.dispatchEvent(new CustomEvent('linearize.status', { detail: {
        node, type: '', workflow: '', text: 'update 3 of 8\\nmore', failed: false, at: 0 } }))"""
    frontend.evaluate(tell, f"{OUTER}:9")
    find = "([id, name]) => app.graph.getNodeById(id).widgets.find(w => w.name === name)?.value"
    takes_widgets = tuple(map(int, version.split(".")[:2])) >= (1, 58)  # of its subgraphs' nodes
    assert frontend.evaluate(find, [OUTER, STATUS]) == ("Distill Attention\nupdate 3 of 8" if takes_widgets else None)


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


FOUND = "() => [...document.querySelectorAll('[data-testid=result-item]')].map(each => each.innerText.toLowerCase())"


def test_people_find_the_nodes_by_the_words_that_they_type(frontend):
    """First where a word means attention or speed, among others where it is a model's too.

    ComfyUI puts names before aliases and cuts the list, so *video* alone finds nodes that are called so.
    """
    frontend.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    frontend.locator("input:focus").wait_for()
    for word, comes_first in FIRST.items():
        frontend.keyboard.press("Control+A")
        frontend.keyboard.type(word)
        frontend.wait_for_timeout(800)
        found = frontend.evaluate(FOUND)
        assert any("linearize" in each for each in found[: 1 if comes_first else None]), (word, found[:5])


def test_a_status_is_told_in_the_users_language(frontend):
    """Every part of an outcome has its Chinese words; what no rule knows stays as it came."""
    open_workflow(frontend, "lab/demo/clear_demo.json")
    frontend.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    try:
        frontend.wait_for_timeout(1000)
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
