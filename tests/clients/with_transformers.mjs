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
  const ids = Array.from(given.input_ids.data, Number);
  if (kind === "AutoModelForSeq2SeqLM") {
    const more = { max_new_tokens: 8, do_sample: false, num_beams: 1, no_repeat_ngram_size: 1 };
    const written = await model.generate({ ...given, ...more });
    found[name] = { ids, numbers: written.tolist()[0].map(Number) };
    continue;
  }
  const told = await model(given);
  const first = told.logits ?? told.start_logits ?? told.last_hidden_state;
  found[name] = { ids, numbers: Array.from(first.data) };
}
console.log(JSON.stringify(found));
