// The live stream: connects, hands frames to the state, notices silence, connects again.
//
//   connecting -> live -> (silence, an end, an error) -> waiting -> connecting ...        locked: a key is needed first

import { ApiError, call, events } from "./api.js";
import { changed, state, take } from "./state.js";

const SILENCE_MS = 4000;
const FIRST_WAIT_MS = 500;
const LAST_WAIT_MS = 8000;

let attempt = null; // AbortController of the connection that is being tried or used
let wake = () => {};

function say(is, text) {
  state.connection = { is, text };
  changed();
}

// Begins anew now, with a key that has just been given for instance.
export function reconnect() {
  attempt?.abort();
  wake();
}

export async function follow() {
  let waitMs = FIRST_WAIT_MS;
  for (;;) {
    const lost = state.picture ? "connection lost" : "no connection";
    let reason = lost;
    try {
      reason = (await connectOnce(() => (waitMs = FIRST_WAIT_MS))) ?? lost;
    } catch (error) {
      if (error instanceof ApiError) {
        if (error.status === 401 || error.status === 403) {
          say("locked", error.message);
          await sleep(86400000);
          continue;
        }
        reason = error.message;
      }
    }
    say("waiting", `${reason}, trying again`);
    await sleep(waitMs);
    waitMs = Math.min(2 * waitMs, LAST_WAIT_MS);
  }
}

async function connectOnce(onFirst) {
  const controller = (attempt = new AbortController());
  let watchdog = setTimeout(() => controller.abort(), SILENCE_MS);
  try {
    const response = await call("/admin/v1/live", { signal: controller.signal });
    for await (const data of events(response)) {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => controller.abort(), SILENCE_MS);
      const frame = JSON.parse(data);
      if (frame.end) return frame.end;
      take(frame);
      onFirst();
      if (state.connection.is !== "live") say("live", "live");
    }
    return null;
  } finally {
    clearTimeout(watchdog);
  }
}

function sleep(milliseconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}
