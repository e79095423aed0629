// One prompt to several models side by side.

import { call, events } from "./api.js";
import { element } from "./rankmap.js";

const field = (id) => document.getElementById(id);
const names = field("names");
const stop = field("stop");
const progress = field("progress");
const ASKS = {
  "causal-lm": generate,
  "seq2seq-lm": generate,
  "sequence-classification": classify,
};
const PROMPTS = { "causal-lm": "Once upon a time", "sequence-classification": "a good film" };

let models = [];
let running = null;
let suggested = ""; // the prompt that nobody wrote

/** Offer these models; what was chosen stays chosen. `done` is called after every round. */
export function offer(found, done) {
  field("playground").onsubmit = (event) => {
    event.preventDefault();
    send().then(done);
  };
  models = found.filter((model) => model.task in ASKS);
  const before = new Map(boxes().map((box) => [box.value, box.checked]));
  if (models.length === before.size && models.every(({ id }) => before.has(id))) return;
  const first = models.find((model) => model.kind === "run" || model.kind === "adapter");
  const family = models.filter((model) => [model.id, model.base].includes(first?.base));
  const chosen = new Set((family.length ? family : models).slice(0, 3).map((model) => model.id));
  names.replaceChildren(
    ...models.map(({ id }) => {
      const checked = before.size ? (before.get(id) ?? false) : chosen.has(id);
      const box = element("input", { type: "checkbox", value: id });
      box.checked = checked;
      return element("label", {}, box, ` ${id}`);
    }),
  );
}

/** A prompt that fits the model, and the form that its template wants, until one is written. */
export function suggest({ task, chat }) {
  if (field("prompt").value !== suggested) return;
  suggested = chat ? "What can you do?" : (PROMPTS[task] ?? "");
  field("prompt").value = suggested;
  field("form").value = chat ? "chat" : "text";
  field("form").onchange();
}

const chats = () => field("form").value === "chat";

field("form").onchange = () => {
  for (const id of ["system", "tools"]) field(id).disabled = !chats();
};
field("form").onchange();

/** The JSON of a field, null where it is empty. Throws an error that names the field. */
function written(id) {
  const text = field(id).value.trim();
  if (!text || field(id).disabled) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    field("more").open = true;
    field(id).focus();
    throw new Error(`${field(id).labels[0].textContent}: ${error.message}`);
  }
}

function boxes() {
  return [...names.querySelectorAll("input")];
}

field("prompt").addEventListener("focus", ({ target }) => {
  if (target.value === suggested) target.select();
});

field("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    field("playground").requestSubmit();
  }
});

stop.addEventListener("click", () => running?.abort());

async function send() {
  const wanted = new Set(boxes().flatMap((box) => (box.checked ? [box.value] : [])));
  const asked = models.filter((model) => wanted.has(model.id));
  if (!asked.length) {
    progress.textContent = "Choose whom to ask.";
    return;
  }
  let more;
  try {
    more = { schema: written("schema"), tools: written("tools") };
  } catch (error) {
    progress.textContent = error.message;
    return;
  }
  running?.abort();
  const round = (running = new AbortController());
  stop.disabled = false;
  progress.textContent = "Asking…";
  const columns = asked.map((model) => column(model));
  field("answers").replaceChildren(...columns.map(({ article }) => article));
  const ends = await Promise.all(columns.map((each) => fill(each, round.signal, more)));
  if (running !== round) return;
  running = null;
  if (document.activeElement === stop) field("playground").querySelector("button").focus();
  stop.disabled = true;
  const count = (end) => ends.filter((each) => each === end).length;
  const parts = ["answered", "stopped", "failed"].filter(count).map((end) => `${count(end)} ${end}`);
  progress.textContent = `${parts.join(", ")}.`;
}

function column(model) {
  const text = element("p", { class: "answer" });
  const note = element("p", { class: "note" });
  const title = element("h3", {}, model.id);
  const attributes = { "aria-label": model.id, "aria-busy": "true" };
  const article = element("article", attributes, title, text, note);
  return { model, article, text, note };
}

/** How it ended: "answered", "stopped" or "failed"; the column says the rest. */
async function fill({ model, article, text, note }, signal, more) {
  const begin = performance.now();
  try {
    const told = await ASKS[model.task](model, text, signal, more);
    const seconds = (performance.now() - begin) / 1000;
    note.textContent = `${told}, ${seconds.toFixed(2)} s`;
    return "answered";
  } catch (error) {
    if (error.name === "AbortError") {
      note.textContent = "stopped";
      return "stopped";
    }
    note.textContent = error.message;
    note.className = "wrong";
    return "failed";
  } finally {
    article.setAttribute("aria-busy", "false");
  }
}

async function generate(model, text, signal, { schema, tools }) {
  const prompt = field("prompt").value;
  const system = chats() && field("system").value;
  const turns = system ? [{ role: "system", content: system }] : [];
  const body = {
    model: model.id,
    max_tokens: field("length").valueAsNumber,
    temperature: field("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (schema) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  if (tools) body.tools = tools;
  const [path, asked] = chats()
    ? ["/v1/chat/completions", { messages: [...turns, { role: "user", content: prompt }] }]
    : ["/v1/completions", { prompt }];
  const answer = await call(path, { ...body, ...asked }, signal);
  let tokens = 0;
  let reason = null;
  for await (const { choices, usage } of events(answer)) {
    for (const choice of choices) {
      text.append(choice.text ?? choice.delta.content ?? "");
      for (const { function: called } of choice.delta?.tool_calls ?? []) {
        text.append(called.name ? `\n${called.name} ` : "", called.arguments ?? "");
      }
      reason = choice.finish_reason ?? reason;
    }
    tokens = usage?.completion_tokens ?? tokens;
  }
  return `${tokens} tokens${reason === "length" ? ", stopped at max tokens" : ""}`;
}

async function classify(model, text, signal) {
  const body = { model: model.id, input: field("prompt").value };
  const answer = await (await call("/classify", body, signal)).json();
  const [{ label, probs, index }] = answer.data;
  text.textContent = label ?? String(index);
  const named = model.labels.length === probs.length;
  const name = (i) => (named ? model.labels[i] : `class ${i}`);
  return probs.map((value, i) => `${name(i)}: ${value.toFixed(3)}`).join(", ");
}
