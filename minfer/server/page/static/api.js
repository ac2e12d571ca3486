// The server's API: requests with the key where one is needed, errors as sentences, streams as events.

const KEY = "minfer.key";
let key = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";

export function setKey(value, remember) {
  key = value;
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (value) (remember ? localStorage : sessionStorage).setItem(KEY, value);
}

export const hasKey = () => key !== "";

/** What the server said, or why it could not be asked. `status` is 0 where there was no answer. */
export class ApiError extends Error {
  constructor(status, message, code = null, param = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

/** fetch, but an answer that is not 2xx is an ApiError. Aborting raises AbortError as ever. */
export async function request(path, { body, signal } = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server can't be reached. Is it still running?");
  }
  if (!response.ok) throw await asError(response);
  return response;
}

async function asError(response) {
  const text = await response.text();
  try {
    const { message, code, param } = JSON.parse(text).error;
    return new ApiError(response.status, String(message), code, param);
  } catch {
    return new ApiError(response.status, `The server answered ${response.status} ${response.statusText}`.trim());
  }
}

/** The events of a stream. One that holds an error is raised; a stream that is cut before its end is an error too. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(0, "The connection broke in the middle of the reply.");
      }
      if (part.done) throw new ApiError(0, "The server closed the connection in the middle of the reply.");
      buffer += part.value;
      const blocks = buffer.split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue; // a comment, which keeps proxies awake
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(500, String(event.error.message), event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
