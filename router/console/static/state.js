// What the page knows, and who wants to hear of it. Frames of the live stream are its only source.

const MOST_REQUESTS = 500;
const MOST_SECONDS = 900;
const MOST_EVENTS = 200;

export const state = {
  picture: null, // null until the first frame
  active: [],
  requests: [], // newest first
  series: [], // oldest first
  events: [], // oldest first
  atS: 0, // the router's clock, of the last frame
  connection: { is: "connecting", text: "connecting" },
};

const listeners = new Set();
let drawing = false;

// `listener` is called before the next repaint after any number of changes.
export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export function changed() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    for (const listener of listeners) listener(state);
  });
}

export function take(frame) {
  state.atS = frame.at_s ?? state.atS;
  if (frame.picture) {
    state.picture = frame.picture;
    state.requests = frame.requests ?? [];
    state.series = frame.series ?? [];
    state.events = frame.events ?? [];
    state.active = frame.active ?? [];
  } else {
    if (frame.patch) mergePatch(state.picture, frame.patch);
    if (frame.active) state.active = frame.active;
    if (frame.requests) state.requests = [...frame.requests, ...state.requests].slice(0, MOST_REQUESTS);
    if (frame.series) state.series = [...state.series, ...frame.series].slice(-MOST_SECONDS);
    if (frame.events) state.events = [...state.events, ...frame.events].slice(-MOST_EVENTS);
  }
  changed();
}

// RFC 7396.
export function mergePatch(target, patch) {
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete target[name];
    else if (isObject(value) && isObject(target[name])) mergePatch(target[name], value);
    else target[name] = value;
  }
  return target;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
