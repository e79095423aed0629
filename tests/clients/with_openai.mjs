// openai for Node: answers, streams, objects, tools that it runs itself, the next turn.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [modules, url, model] = process.argv.slice(2);
const OpenAI = createRequire(`${modules}/`)("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
const asked = { model, messages, temperature: 0, max_tokens: 5 };

const names = [];
for await (const each of client.models.list()) names.push(each.id);
assert(names.includes(model));

const first = await client.chat.completions.create(asked);
const turns = [...messages, first.choices[0].message, { role: "user", content: "more" }];
assert((await client.chat.completions.create({ ...asked, messages: turns })).usage.total_tokens);

let text = "";
for await (const event of await client.chat.completions.create({ ...asked, stream: true })) {
  text += event.choices[0].delta.content ?? "";
}
assert.equal(text, first.choices[0].message.content);

const only = { structured_outputs: { choice: ["yes"] }, max_tokens: 20 };
const helper = client.chat.completions.stream({ ...asked, ...only });
assert.equal(await helper.finalContent(), "yes");

const properties = { on: { type: "boolean" } };
const schema = { type: "object", properties, required: ["on"], additionalProperties: false };
const format = { type: "json_schema", json_schema: { name: "light", schema } };
const parsed = await client.chat.completions.parse({
  ...asked, max_tokens: 500, response_format: format,
});
assert.equal(typeof JSON.parse(parsed.choices[0].message.content).on, "boolean");

// A tool that the client runs, once, and then an answer that calls none.
let runs = 0;
const parameters = { type: "object", properties: {}, additionalProperties: false };
const tool = { name: "now", description: "d", parameters, parse: JSON.parse, function: () => (runs += 1, "noon") };
const called = await client.chat.completions.runTools({
  ...asked, max_tokens: 300, tools: [{ type: "function", function: tool }],
  tool_choice: { type: "function", function: { name: "now" } },
}).finalFunctionToolCallResult();
assert.equal(called, "noon");
assert.equal(runs, 1);

const left = await client.chat.completions.create({ ...asked, max_tokens: 500, stream: true });
for await (const _ of left) break; // a client that goes
const done = await client.completions.create({ model, prompt: "Hello", max_tokens: 4, logprobs: 1 });
assert.equal(done.choices[0].logprobs.tokens.length, done.usage.completion_tokens);
const told = await client.responses.create({ model, input: "Hello", max_output_tokens: 5 });
assert(["completed", "incomplete"].includes(told.status));
await assert.rejects(client.chat.completions.create({ ...asked, model: "none" }), { status: 404 });
console.log("all fine");
