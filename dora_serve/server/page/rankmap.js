// The rank map of one model: `{module: {start, rank, norm, relative, lost}}`, all but rank or null.
// Imports nothing, since `dora-export inspect --html` puts this file into a page of its own.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** "298 of 336 components kept, ranks 2 to 12, 8.0 on average" */
export function summary(modules) {
  const all = Object.values(modules);
  const ranks = all.map((module) => module.rank);
  const range = `ranks ${Math.min(...ranks)} to ${Math.max(...ranks)}`;
  const mean = sum(ranks) / ranks.length;
  const kept = known(all) ? `${sum(ranks)} of ${sum(starts(all))}` : sum(ranks);
  return `${kept} components kept, ${range}, ${mean.toFixed(1)} on average`;
}

export function rankMap(modules) {
  if (!Object.keys(modules).length) {
    return element("p", { class: "note" }, "No matrix has an update, so there is no rank map.");
  }
  const hint = "Point at a matrix, or go through them with the arrow keys.";
  const about = element("p", { class: "about note" }, hint);
  const show = (name) =>
    about.replaceChildren(element("code", {}, name), facts(modules[name]).join(" · "));
  const share = shares(modules);
  const tables = [...stacks(modules)].map(([stack, kinds]) => {
    const table = grid(stack, kinds, modules, share, show);
    return element("div", { class: "scroll" }, table);
  });
  return element("div", { class: "rank-map" }, ...tables, legend(modules), about, list(modules));
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}

function starts(all) {
  return all.map((module) => module.start);
}

function known(all) {
  return !starts(all).includes(null);
}

/** The share that was kept, or where that is not known the sum of the ranks. */
function kept(all) {
  const ranks = sum(all.map((module) => module.rank));
  const whole = known(all) && sum(starts(all));
  return whole ? `${Math.round((100 * ranks) / whole)} %` : String(ranks);
}

/** By module, how dark it is: what was kept of its own start, or else of the largest rank. */
function shares(modules) {
  const largest = Math.max(1, ...Object.values(modules).map((module) => module.rank));
  return (name) => modules[name].rank / (modules[name].start || largest);
}

/** The facts about one module as text, those that are known. */
function facts({ start, rank, norm, relative, lost }) {
  const told = [start === null ? `rank ${rank}` : `rank ${rank} of ${start}`];
  if (norm !== null) told.push(`‖ΔW‖ ${number(norm)}`);
  if (relative !== null) told.push(`‖ΔW‖/‖W‖ ${number(relative)}`);
  if (lost !== null) told.push(`rounding loses ${number(100 * lost)} %`);
  return told;
}

function number(value) {
  return String(Number(value.toPrecision(3)));
}

/** `Map(stack → Map(kind → Map(layer → module)))`; what is in no numbered layer is in stack "". */
function stacks(modules) {
  const found = new Map();
  const at = (map, key) => map.get(key) ?? map.set(key, new Map()).get(key);
  for (const name of Object.keys(modules)) {
    const match = /^(.*?)\.(\d+)\.(.+)$/.exec(name);
    const [stack, layer, kind] = match ? [match[1], Number(match[2]), match[3]] : ["", 0, name];
    at(at(found, stack), kind).set(layer, name);
  }
  return found;
}

function grid(stack, kinds, modules, share, show) {
  const layers = [...new Set([...kinds.values()].flatMap((row) => [...row.keys()]))];
  layers.sort((a, b) => a - b);
  const head = (scope, ...text) => element("th", { scope }, ...text);
  const total = (names) =>
    element("td", { class: "sum", role: "gridcell" }, kept(names.map((name) => modules[name])));
  const cells = [];
  const rows = [...kinds].map(([kind, row]) => {
    const line = layers.map((layer) => {
      const name = row.get(layer);
      if (name === undefined) return element("td", { role: "gridcell" });
      return cell(name, modules[name], share(name), show);
    });
    cells.push(line);
    return element("tr", {}, head("row", kind), ...line, total([...row.values()]));
  });
  const every = [...kinds.values()].flatMap((row) => [...row]);
  const foot = layers.map((layer) =>
    total(every.filter(([own]) => own === layer).map(([, name]) => name)),
  );
  const all = total(every.map(([, name]) => name));
  const heads = ["layer", ...layers.map(String), "kept"].map((text) => head("col", text));
  const table = element(
    "table",
    { class: "map", role: "grid", "aria-label": `Ranks by module and layer, ${stack || "other"}` },
    element("caption", {}, stack || "outside of layers"),
    element("thead", {}, element("tr", {}, ...heads)),
    element("tbody", {}, ...rows),
    element("tfoot", {}, element("tr", {}, head("row", "kept"), ...foot, all)),
  );
  movable(table, cells);
  return table;
}

function cell(name, module, share, show) {
  const made = element(
    "td",
    {
      class: module.rank ? "module" : "module gone",
      role: "gridcell",
      tabindex: -1,
      "data-module": name,
      "aria-label": `${name}: ${facts(module).join(", ")}`,
      onpointerenter: () => show(name),
      onfocus: () => show(name),
    },
    String(module.rank),
  );
  made.style.setProperty("--share", Math.min(1, share));
  return made;
}

/** One stop of the Tab key; arrows, Home and End go from cell to cell, over the empty ones. */
function movable(table, cells) {
  const all = cells.flat().filter((each) => each.dataset.module);
  all[0].tabIndex = 0;
  table.addEventListener("focusin", ({ target }) => {
    for (const each of all) each.tabIndex = each === target ? 0 : -1;
  });
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  table.addEventListener("keydown", (event) => {
    let row = cells.findIndex((line) => line.includes(event.target));
    if (row < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const filled = cells[row].filter((each) => each.dataset.module);
    let next = { Home: filled.at(0), End: filled.at(-1) }[event.key];
    if (event.key in steps) {
      const [down, right] = steps[event.key];
      let column = cells[row].indexOf(event.target);
      do {
        row += down;
        column += right;
        next = cells[row]?.[column];
      } while (next && !next.dataset.module);
    }
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
}

function legend(modules) {
  const [none, all] = known(Object.values(modules))
    ? ["pruned", "kept whole"]
    : ["rank 0", "largest rank"];
  const colours = element("i", { "aria-hidden": "true" });
  return element("p", { class: "legend note" }, none, colours, all);
}

/** All of it as a plain table, with the columns that any module has. */
function list(modules) {
  const columns = [
    ["start rank", "start", String],
    ["rank", "rank", String],
    ["‖ΔW‖", "norm", number],
    ["‖ΔW‖/‖W‖", "relative", number],
    ["lost to rounding, %", "lost", (value) => number(100 * value)],
  ].filter(([, key]) => Object.values(modules).some((module) => module[key] !== null));
  const rows = Object.entries(modules).map(([name, module]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, element("code", {}, name)),
      ...columns.map(([, key, write]) =>
        element("td", {}, module[key] === null ? "" : write(module[key])),
      ),
    ),
  );
  const heads = ["module", ...columns.map(([title]) => title)];
  const head = element("tr", {}, ...heads.map((title) => element("th", { scope: "col" }, title)));
  const parts = [element("thead", {}, head), element("tbody", {}, ...rows)];
  const box = { class: "scroll", tabindex: 0, role: "region", "aria-label": "Ranks" };
  return element(
    "details",
    {},
    element("summary", {}, "As a table"),
    element("div", box, element("table", { class: "list" }, ...parts)),
  );
}
