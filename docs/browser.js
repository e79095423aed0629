// Adapters of an ONNX folder in a browser: one graph, another adapter whenever it is wanted.

/** The parameters of an `.onnx_adapter` file: name of the graph's input → { dims, data }. */
export function readAdapter(buffer) {
  const view = new DataView(buffer);
  const follow = (at) => at + view.getUint32(at, true);
  const field = (table, number) => {
    const known = table - view.getInt32(table, true);
    return table + view.getUint16(known + 4 + 2 * number, true);
  };
  const vector = (table, number) => {
    const at = follow(field(table, number));
    return [at + 4, view.getUint32(at, true)];
  };
  if (new TextDecoder().decode(buffer.slice(4, 8)) !== "TORT") throw new Error("no adapter");
  const [first, count] = vector(follow(0), 3);
  const found = {};
  for (let i = 0; i < count; i++) {
    const parameter = follow(first + 4 * i);
    const [text, length] = vector(parameter, 0);
    const [sizes, axes] = vector(parameter, 1);
    const [bytes, size] = vector(parameter, 3);
    const dims = Array.from({ length: axes }, (_, n) => Number(view.getBigInt64(sizes + 8 * n, true)));
    const name = new TextDecoder().decode(buffer.slice(text, text + length));
    found[name] = { dims, data: new Float32Array(buffer.slice(bytes, bytes + size)) };
  }
  return found;
}

/** What `session` is fed for `adapter`, null for none. */
export function feedsOf(ort, session, adapter) {
  const feeds = {};
  for (const { name, shape } of session.inputMetadata) {
    if (!/\.lora_[AB]$/.test(name)) continue;
    const none = { dims: shape.map((size) => (typeof size === "number" ? size : 0)), data: [] };
    const { dims, data } = adapter?.[name] ?? none;
    feeds[name] = new ort.Tensor("float32", Float32Array.from(data), dims);
  }
  return feeds;
}
