// Requests to the server that this page came from.

const KEPT = "dora-serve key";

export const base = new URL(".", location.href).href.replace(/\/$/, "");

export const key = {
  get: () => sessionStorage.getItem(KEPT),
  set: (value) => sessionStorage.setItem(KEPT, value),
  forget: () => sessionStorage.removeItem(KEPT),
};

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The response; a POST where there is a body. Throws `ApiError` with the server's own reason. */
export async function call(path, body, signal) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let answer;
  try {
    answer = await fetch(base + path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", 0);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new ApiError(told?.error?.message ?? `HTTP ${answer.status}`, answer.status);
}

/** The JSON of each server-sent event until [DONE]. Throws `ApiError` for an event that is one. */
export async function* events(answer) {
  let buffer = "";
  for await (const piece of pieces(answer.body.pipeThrough(new TextDecoderStream()))) {
    const parts = (buffer + piece).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, 0);
      yield event;
    }
  }
  throw new ApiError("The answer broke off.", 0);
}

async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
