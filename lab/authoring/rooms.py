"""How tall nodes are after a run, on LiteGraph's canvas and as Nodes 2.0, so that none lies on another."""

from typing import Any

from playwright.sync_api import Page

STATUS = (
    "UNTRAINED · 17 % of attention · 57 of 57 sites · 0.31 s a step, dense about 0.29: costs more than dense at this"
    " size\nfoveated (triton): 57 sites\nlast run 20:14"
)
REPORT = "\n".join([STATUS, *["double.0-18: foveated, keep 0.15, tile 4, top 0.13: 17.2 % of dense"] * 12])
TELL = """([status, report]) => {
    for (const { id, type } of app.graph.nodes.filter(node => /^Linearize(?!Demo)/.test(node.type))) {
        const text = type === 'LinearizeReport' ? report : status;
        const detail = { node: String(id), type, workflow: '', text, failed: false, at: Date.now() / 1000 };
        app.api.dispatchEvent(new CustomEvent('linearize.status', { detail }));
    }
}"""
SHOWS_PICTURES = (
    "LinearizeCompare", "LinearizeReport", "LinearizeSiteErrors", "LossGraphNode", "PreviewImage", "SaveImage",
)  # fmt: skip
GIVE_PICTURES = """([types, filename]) => {
    for (const { id } of app.graph.nodes.filter(node => types.includes(node.type))) {
        const output = { images: [{ filename, subfolder: '', type: 'input' }] };
        const detail = { node: String(id), display_node: String(id), prompt_id: 'none', output };
        app.api.dispatchEvent(new CustomEvent('executed', { detail }));
    }
}"""
SEE_ALL = "app.extensionManager.command.execute('Comfy.Canvas.FitView')"
ON_CANVAS = "Object.fromEntries(app.graph.nodes.map(node => [node.id, node.getBounding()[3]]))"
AS_ELEMENTS = """() => Object.fromEntries([...document.querySelectorAll('[data-node-id]')].map(element =>
    [element.dataset.nodeId, element.getBoundingClientRect().height / app.canvas.ds.scale]))"""
TITLE_BAR = 30  # pixels above a node's position, part of its height here


def pretend_a_run(page: Page, picture: str) -> None:
    """Let the nodes show what they show after a run: statuses of several lines, and a picture of the input folder."""
    page.evaluate(SEE_ALL)  # what is out of sight takes no room
    page.evaluate(TELL, [STATUS, REPORT])
    page.evaluate(GIVE_PICTURES, [SHOWS_PICTURES, picture])
    page.wait_for_timeout(1000)
    page.evaluate(SEE_ALL)
    page.wait_for_timeout(500)


def draw_as(page: Page, is_vue: bool) -> None:
    """Draw nodes as Nodes 2.0 or on LiteGraph's canvas."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", is_vue)
    page.wait_for_timeout(800)


def rooms(page: Page, workflow: dict[str, Any], picture: str) -> dict[int, int]:
    """Return each node's height in pixels below its title bar after a run, the larger of both ways to draw it."""
    found: dict[int, int] = {}
    for is_vue in (False, True):
        draw_as(page, is_vue)
        page.evaluate("async workflow => { await app.loadGraphData(workflow); }", workflow)
        page.wait_for_timeout(800)
        pretend_a_run(page, picture)
        for key, height in page.evaluate(AS_ELEMENTS if is_vue else ON_CANVAS).items():
            found[int(key)] = max(found.get(int(key), 0), round(height) - TITLE_BAR)
    draw_as(page, False)
    page.evaluate("sessionStorage.clear()")  # or the workflow shows these statuses when it is opened again
    return found
