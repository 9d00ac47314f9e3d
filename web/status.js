// Keeps on each of the pack's nodes what it last said, in LiteGraph and in Nodes 2.0, after the job and after a reload.
//
// The server sends `linearize.status` events; ComfyUI's own progress texts are taken off nodes when a job ends.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { inWordsOf, lastRun } from "./words.js";

const EVENT = "linearize.status";
const STORE = "linearize.status"; // in the tab's session storage: {workflow id: {node id: status}}
const MOST_WORKFLOWS = 30;
const WIDGET = "linearize_status";
const MOST_PIXELS = 240; // of a text's height; longer ones scroll
const MARGIN = 4; // that the frontend leaves around it
const ERROR = "color-mix(in srgb, var(--error-text) 60%, var(--input-text))"; // readable in every theme

const refusing = new WeakSet(); // nodes that take no widget
const heights = new WeakMap(); // by element, in pixels at the graph's own scale

let statuses = stored(); // the storage is for a reload only

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

function store(all) {
  statuses = Object.fromEntries(Object.entries(all).slice(-MOST_WORKFLOWS));
  try {
    sessionStorage.setItem(STORE, JSON.stringify(statuses));
  } catch {
    // a full or forbidden storage costs the texts after a reload, nothing else
  }
}

const root = () => app.rootGraph ?? app.graph;

// Returns the nodes from the outside in that an id such as "100:9" names: a subgraph's node, then one inside it.
function nodesAlong(id) {
  const found = [];
  let graph = root();
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part);
    if (!node) return [];
    found.push(node);
    graph = node.subgraph;
  }
  return found;
}

function dateOf(seconds) {
  const when = new Date(seconds * 1000);
  const today = when.toDateString() === new Date().toDateString();
  const options = today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(undefined, { ...options, hourCycle: "h23" }).format(when);
}

const language = () => app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";

function newElement(node) {
  const element = document.createElement("div");
  const text = document.createElement("div");
  element.className = text.className = "linearize-status";
  element.style.cssText = "overflow-y: auto; pointer-events: auto;";
  text.style.cssText =
    "white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; padding: 2px 4px; " +
    "font: 11px/14px sans-serif; color: var(--descrip-text);";
  element.append(text);
  new ResizeObserver(() => {
    if (!text.offsetHeight || heights.get(element) === text.offsetHeight) return; // 0 while it is out of sight
    heights.set(element, text.offsetHeight);
    node.setDirtyCanvas?.(true, true);
  }).observe(text);
  return element;
}

// Returns our widget of a node, null where a node takes none: subgraphs' own before frontend 1.58.
function widgetOf(node) {
  const find = () => node.widgets?.find((widget) => widget.name === WIDGET);
  if (find()) return find();
  if (refusing.has(node)) return null;
  const element = newElement(node);
  const height = () => Math.min(heights.get(element) ?? 18, MOST_PIXELS) + 2 * MARGIN;
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false, // neither in the prompt
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: height,
    getMaxHeight: height,
    getValue: () => element.innerText,
    setValue: () => {},
  });
  widget.serialize = false; // nor in the workflow
  widget.label = "";
  if (find()) return widget;
  refusing.add(node);
  widget.onRemove?.();
  return null;
}

// Puts a status on a node: the first line is the outcome, the others are smaller.
function show(node, status) {
  const text = widgetOf(node)?.element.firstChild;
  if (!text) return;
  const [outcome, ...more] = inWordsOf(language(), status.text).split("\n");
  if (status.over) more.push(lastRun(language(), dateOf(status.at)));
  const first = document.createElement("span");
  first.textContent = outcome;
  first.style.color = status.failed ? ERROR : "var(--input-text)";
  const rest = document.createElement("span");
  rest.textContent = more.map((line) => `\n${line}`).join("");
  rest.style.fontSize = "10px";
  text.replaceChildren(first, rest);
  node.setDirtyCanvas?.(true, true);
}

// Shows a status inside and, for nodes of subgraphs, outside under the title of the node that told it.
function showAlong(id, status) {
  const along = nodesAlong(id);
  const inner = along.at(-1);
  if (!inner || (status.type && inner.type !== status.type)) return;
  show(inner, status);
  const [outcome] = status.text.split("\n");
  for (const outer of along.slice(0, -1)) show(outer, { ...status, text: `${inner.title}\n${outcome}` });
}

function showStored() {
  const entries = Object.entries(statuses[root()?.id] ?? {});
  entries.sort(([, one], [, other]) => one.at - other.at);
  for (const [id, status] of entries) showAlong(id, status);
}

function receive({ node, workflow, ...status }) {
  const id = workflow || root()?.id;
  const { [id]: own = {}, ...others } = statuses;
  store({ ...others, [id]: { ...own, [node]: status } });
  if (id === root()?.id) showAlong(node, status);
}

// A job is over: what was told is dated from now on.
function end() {
  for (const own of Object.values(statuses)) for (const status of Object.values(own)) status.over = true;
  store(statuses);
  showStored();
}

app.registerExtension({
  name: "linearize.status",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => receive(detail));
    for (const name of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(name, end);
    end(); // what an earlier page was told
  },
  afterConfigureGraph() {
    showStored();
  },
});
