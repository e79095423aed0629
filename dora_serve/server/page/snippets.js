// How to ask a model from a shell and from Python.

import { base } from "./api.js";
import { element } from "./rankmap.js";

const COMPLETES = {
  path: "/v1/completions",
  body: { prompt: "Once upon a time", max_tokens: 16, temperature: 0 },
  python: (body) =>
    `answer = client.completions.create(\n${named(body)})\nprint(answer.choices[0].text)`,
};
const TASKS = {
  "causal-lm": COMPLETES,
  "seq2seq-lm": COMPLETES,
  "question-answering": {
    path: "/dora/answer",
    told: "answer",
    body: { question: "What is good?", context: "a good film" },
  },
  "automatic-speech-recognition": {
    path: "/v1/audio/transcriptions",
    file: "speech.wav",
    body: {},
    python: (body) =>
      `answer = client.audio.transcriptions.create(\n${named(body)}    file=open("speech.wav", "rb"),\n)\nprint(answer.text)`,
  },
  "feature-extraction": {
    path: "/v1/embeddings",
    body: { input: "a good film" },
    python: (body) =>
      `answer = client.embeddings.create(\n${named(body)})\nprint(answer.data[0].embedding)`,
  },
  "sequence-classification": { path: "/classify", body: { input: "a good film" } },
  "token-classification": { path: "/pooling", body: { input: "a good film" } },
};

export function snippets(model, locked) {
  const { path, body, python, told, file } = TASKS[model.task];
  const asked = { model: model.id, ...body };
  return [
    snippet("curl", curl(base + path, asked, locked, file)),
    snippet(
      "Python",
      python ? client(python(asked), locked) : plain(base + path, asked, locked, told),
    ),
  ];
}

function curl(url, body, locked, file) {
  const lines = [`curl ${quoted(url)}`];
  if (locked) lines.push('-H "Authorization: Bearer $DORA_SERVE_API_KEY"');
  if (file) return [...lines, `-F file=@${file}`, `--form-string ${quoted(`model=${body.model}`)}`].join(" \\\n  ");
  lines.push("-H 'Content-Type: application/json'", `-d ${quoted(json(body, "  "))}`);
  return lines.join(" \\\n  ");
}

function client(call, locked) {
  const secret = locked ? 'os.environ["DORA_SERVE_API_KEY"]' : '"none"';
  const make = `client = OpenAI(base_url=${JSON.stringify(`${base}/v1`)}, api_key=${secret})`;
  return `${locked ? "import os\n\n" : ""}from openai import OpenAI\n\n${make}\n${call}`;
}

function plain(url, body, locked, told = "data") {
  const header = locked
    ? '    headers={"Authorization": "Bearer " + os.environ["DORA_SERVE_API_KEY"]},\n'
    : "";
  const call = `httpx.post(\n    ${JSON.stringify(url)},\n${header}    json=${json(body, "    ")},\n)`;
  const imports = `${locked ? "import os\n\n" : ""}import httpx`;
  return `${imports}\n\nanswer = ${call}\nprint(answer.json()["${told}"])`;
}

/** Keyword arguments of Python; what JSON writes of texts and numbers, Python reads the same. */
function named(body) {
  const lines = Object.entries(body).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`);
  return lines.join("");
}

function json(body, indent) {
  return JSON.stringify(body, null, indent).replaceAll("\n", `\n${indent}`);
}

/** One word of a shell. */
function quoted(text) {
  return /^[\w:/.=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function snippet(title, text) {
  const code = element("code", {}, text);
  const copy = element(
    "button",
    { class: "plain", "aria-label": `Copy the ${title} snippet`, onclick: () => take() },
    "Copy",
  );
  const told = element("span", { class: "note", role: "status" });
  async function take() {
    try {
      await navigator.clipboard.writeText(text);
      told.textContent = "copied";
    } catch {
      // Browsers give the clipboard to pages of localhost and https alone.
      getSelection().selectAllChildren(code);
      told.textContent = "selected: copy it with Ctrl+C";
    }
  }
  return element(
    "div",
    { class: "snippet" },
    element("div", { class: "row" }, element("h3", {}, title), told, copy),
    element("pre", { tabindex: 0, role: "region", "aria-label": `${title} snippet` }, code),
  );
}
