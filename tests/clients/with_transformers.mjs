// transformers.js on exported folders: what it computes of a text, as JSON.
//
// with_transformers.mjs MODULES ROOT NAME=CLASS… : the folders ROOT/NAME.

import { createRequire } from "node:module";

const [modules, root, ...models] = process.argv.slice(2);
const hf = createRequire(`${modules}/`)("@huggingface/transformers");
hf.env.allowRemoteModels = false;
hf.env.localModelPath = `${root}/`;
const found = {};
for (const [name, kind] of models.map((each) => each.split("="))) {
  const tokenizer = await hf.AutoTokenizer.from_pretrained(name);
  const model = await hf[kind].from_pretrained(name, { dtype: "fp32", subfolder: "" });
  const given = await tokenizer("good film");
  const told = await model(given);
  const first = told.logits ?? told.start_logits ?? told.last_hidden_state;
  found[name] = { ids: Array.from(given.input_ids.data, Number), numbers: Array.from(first.data) };
}
console.log(JSON.stringify(found));
