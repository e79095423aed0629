// The table of models, the one that is chosen, and the key.

import { base, call, key } from "./api.js";
import { offer, suggest } from "./playground.js";
import { element, rankMap, summary } from "./rankmap.js";
import { snippets } from "./snippets.js";

const field = (id) => document.getElementById(id);
let chosen = linked(); // the name of a model
let shown = null; // what the part below the table was made from
let locked = false; // whether the server wants a key
let version = null;

field("address").textContent = `${base}/v1`;

async function refresh() {
  let told;
  try {
    told = await (await call("/dora/models")).json();
    version ??= (await (await call("/version")).json()).version;
  } catch (error) {
    fail(error);
    return;
  }
  const models = told.data;
  locked ||= key.get() !== null;
  field("version").textContent = `version ${version}`;
  field("trouble").textContent = "";
  field("key-form").hidden = true;
  field("forget").hidden = !locked;
  field("all").hidden = false;
  offer(models, refresh);
  list(models);
  absent(told.not_served);
  const adapted = ({ modules }) => Object.keys(modules).length;
  show(models.find(({ id }) => id === chosen) ?? models.find(adapted) ?? models[0]);
}

function fail(error) {
  const wrong = error.status === 401;
  if (wrong) {
    locked = true;
    field("all").hidden = true;
    field("key-form").hidden = false;
    field("key").focus();
  }
  const asked = wrong && key.get() === null; // the form says what is wanted
  field("trouble").textContent = asked ? "" : error.message;
}

field("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(field("key").value);
  field("key").value = "";
  refresh();
});

field("forget").addEventListener("click", () => {
  key.forget();
  refresh();
});

field("refresh").addEventListener("click", refresh);

function list(models) {
  const columns = [
    ["Kind", ({ kind, method }) => (method ? `${kind}, ${method}` : kind), "short"],
    ["Base", (model) => model.base ?? ""],
    ["Task", (model) => model.task],
    ["Ranks", ranks, "short"],
    ["Size", (model) => size(model.bytes), "number"],
    ["Requests", (model) => String(model.requests), "number"],
    ["In memory", (model) => (model.loaded ? "yes" : "no"), "short"],
  ];
  const heads = columns.map(([title, , kind]) =>
    element("th", { scope: "col", role: "columnheader", class: kind ?? null }, title),
  );
  const rows = models.map((model) =>
    element(
      "tr",
      { role: "row" },
      element(
        "th",
        { scope: "row", role: "rowheader" },
        element("button", { "data-name": model.id, onclick: () => choose(model) }, model.id),
      ),
      ...columns.map(([title, write, kind]) =>
        element("td", { role: "cell", "data-label": title, class: kind ?? null }, write(model)),
      ),
    ),
  );
  const first = element("th", { scope: "col", role: "columnheader" }, "Model");
  const focused = document.activeElement.dataset.name;
  // Said outright: as a list on a narrow screen it would be no table any more.
  field("models").replaceChildren(
    element(
      "table",
      { role: "table", "aria-labelledby": "models-title" },
      element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, first, ...heads)),
      element("tbody", { role: "rowgroup" }, ...rows),
    ),
  );
  buttons().find((button) => button.dataset.name === focused)?.focus();
}

function buttons() {
  return [...field("models").querySelectorAll("button")];
}

/** "2–12 of 12" */
function ranks({ modules }) {
  const all = Object.values(modules);
  if (!all.length) return "";
  const range = (values) => {
    const [least, most] = [Math.min(...values), Math.max(...values)];
    return least === most ? String(most) : `${least}–${most}`;
  };
  const kept = range(all.map(({ rank }) => rank));
  const starts = all.map(({ start }) => start);
  return starts.includes(null) ? kept : `${kept} of ${range(starts)}`;
}

function size(bytes) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, bytes)) / 3));
  return `${Number((bytes / 1000 ** power).toPrecision(3))} ${units[power]}`;
}

/** What the folder has and the server does not serve, with the reason. */
function absent(problems) {
  const names = Object.keys(problems);
  field("absent").hidden = !names.length;
  const part = (kind) => field("absent").querySelector(kind);
  part("summary").textContent = `Not served: ${names.length}`;
  const told = ([name, reason]) => [element("dt", {}, name), element("dd", {}, reason)];
  part("dl").replaceChildren(...Object.entries(problems).flatMap(told));
}

/** The model that the address names behind its #. */
function linked() {
  try {
    return decodeURIComponent(location.hash.slice(1)) || null;
  } catch {
    return null;
  }
}

addEventListener("hashchange", () => {
  chosen = linked() ?? chosen;
  refresh();
});

function choose(model) {
  history.replaceState(null, "", `#${encodeURIComponent(model.id)}`);
  show(model);
}

function show(model) {
  field("chosen").hidden = !model;
  if (!model) return;
  chosen = model.id;
  suggest(model);
  for (const button of buttons()) {
    button.setAttribute("aria-pressed", String(button.dataset.name === chosen));
  }
  const now = JSON.stringify([chosen, model.modules, locked]);
  if (shown === now) return;
  shown = now;
  field("chosen-title").textContent = chosen;
  const told = Object.keys(model.modules).length ? `${summary(model.modules)}.` : "";
  field("map").replaceChildren(element("p", {}, told), rankMap(model.modules));
  field("snippets").replaceChildren(...snippets(model, locked));
}

refresh();
