// Calls to the router that served this page, with the key that this tab knows, if any.

const STORED = "pdserve-key";

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message ?? `status ${status}`);
    this.status = status;
    this.code = error.code ?? "";
    this.param = error.param ?? "";
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

function headers(more = {}) {
  return key.get() ? { Authorization: `Bearer ${key.get()}`, ...more } : more;
}

// Resolves with a response that is OK; what the router refuses is an ApiError.
export async function call(path, { body, signal, extra } = {}) {
  const options = { signal, headers: headers(extra), cache: "no-store", credentials: "omit" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  if (!response.ok) throw new ApiError(response.status, await errorOf(response));
  return response;
}

async function errorOf(response) {
  try {
    const error = (await response.json()).error;
    return { message: error.message, code: error.code ?? error.type, param: error.param };
  } catch {
    return { message: `the router answered ${response.status}` };
  }
}

export async function act(name, body) {
  const response = await call(`/admin/v1/actions/${name}`, { body, extra: { "x-pdserve-console": "1" } });
  return response.json();
}

// The data of Server-Sent Events, one string each, until the stream ends.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
