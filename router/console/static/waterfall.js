// Where the time of one request went, as a picture: the whole of it on one line, and below, larger, the way to the first token.
//
//     ├ first token ┤├──────────── the other tokens ─────────────┤
//     router ▌ prefill queue ▌ prefill ▓▓▓▓▓▓▓▓▓▓ transfer ▒ ...
//                              (hidden transfer ░░░░░░░)

import { h, s } from "./dom.js";
import { bytes, count, ms } from "./format.js";

const KINDS = {
  router: "route",
  queue: "wait",
  network: "route",
  "decode queue": "wait",
  "prefill queue": "wait",
  prefill: "prefill",
  "transfer exposed": "transfer",
  rpc: "route",
  activate: "decode",
};
const NAMES = { router: "router", network: "network", "transfer exposed": "transfer", rpc: "call", activate: "first step" };
const ROW = 22;

// `request` is a record of the router; `width` in pixels.
export function waterfall(request, width) {
  const stages = request.stages.filter(([, value]) => value > 0);
  if (!stages.length) return h("p.dim", {}, request.cache?.startsWith("hit") ? "Answered from the cache: no worker was asked." : "There was no first token.");
  const left = width < 480 ? 98 : 118; // "hidden transfer" is the longest name
  const right = width < 480 ? 58 : 76;
  const track = Math.max(60, width - left - right);
  const ttft = Math.max(request.ttft_ms ?? 0, 1e-6);
  const total = Math.max(request.total_ms, ttft);
  const rows = [];
  const add = (name, kind, from, length, scale, said, className = "") => {
    const y = rows.length * ROW + 4;
    const x = left + track * Math.min(1, from / scale);
    rows.push([
      s("text.wf-name", { x: left - 8, y: y + 13, "text-anchor": "end" }, name),
      s("rect.wf-track", { x: left, y: y + 2, width: track, height: ROW - 8, rx: 2 }),
      s(`rect.wf-bar.wf-${kind}${className}`, { x, y: y + 2, width: Math.max(1.5, Math.min(track, (track * length) / scale)), height: ROW - 8, rx: 2 }),
      s("text.wf-value", { x: width - right + 8, y: y + 13 }, said),
    ]);
  };

  const whole = s(
    "g",
    {},
    s("text.wf-name", { x: left - 8, y: 17, "text-anchor": "end" }, "request"),
    s("rect.wf-bar.wf-first", { x: left, y: 6, width: Math.max(2, (track * ttft) / total), height: ROW - 8, rx: 2 }),
    s("rect.wf-bar.wf-decode", { x: left + (track * ttft) / total, y: 6, width: Math.max(1, track * (1 - ttft / total)), height: ROW - 8, rx: 2 }),
    s("text.wf-value", { x: width - right + 8, y: 17 }, ms(request.total_ms)),
    s("path.wf-zoom", {
      d: `M${left} ${ROW + 2}L${left} ${ROW + 12}H${left + track}L${left + Math.max(2, (track * ttft) / total)} ${ROW + 2}Z`,
    }),
  );
  let at = 0;
  for (const [name, value] of stages) {
    add(NAMES[name] ?? name, KINDS[name] ?? "route", at, value, ttft, ms(value));
    if (name === "prefill" && request.transfer_hidden_ms > 0) {
      const hidden = Math.min(request.transfer_hidden_ms, value);
      add("hidden transfer", "transfer", at + value - hidden, hidden, ttft, ms(request.transfer_hidden_ms), ".wf-hidden");
    }
    at += value;
  }
  const below = ROW + 14;
  const height = below + rows.length * ROW + 6;
  return s(
    "svg.waterfall",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": describe(request) },
    whole,
    s("g", { transform: `translate(0 ${below})` }, ...rows),
  );
}

export function describe(request) {
  const parts = request.stages.map(([name, value]) => `${NAMES[name] ?? name} ${ms(value)}`);
  return `First token after ${ms(request.ttft_ms)}: ${parts.join(", ")}. In all ${ms(request.total_ms)}.`;
}

// The same in one line, for a row of a table.
export function waterfallLine(request) {
  const total = Math.max(request.total_ms, 1e-6);
  const parts = request.stages.map(([name, value]) => [KINDS[name] ?? "route", value]);
  if (request.ttft_ms !== null) parts.push(["decode", total - request.ttft_ms]);
  return h(
    "span.kv.line",
    { role: "img", "aria-label": request.ttft_ms === null ? "no first token" : describe(request) },
    ...parts.map(([kind, value]) => {
      const part = h(`i.wf-${kind}`);
      part.style.width = `${Math.max(0, (100 * value) / total)}%`;
      return part;
    }),
  );
}

export function facts(request) {
  const path = request.decode_worker ? [request.prefill_worker, request.decode_worker, ...request.migrated_to].filter(Boolean) : [];
  const alone = request.decode_worker && !request.prefill_worker ? ", which computed the prompt too" : "";
  const moved = request.transport ? `${bytes(request.transfer_bytes)} by ${request.transport}` : "";
  const found = [
    ["Tokens", `${count(request.prompt_tokens)} prompt (${count(request.cached_tokens)} cached), ${count(request.completion_tokens)} generated`],
    ["Time per token", request.tpot_ms === null ? "–" : ms(request.tpot_ms)],
    ["Way", path.length ? path.join(" → ") + alone : "no worker"],
  ];
  if (moved) found.push(["KV", moved]);
  if (request.retries) found.push(["Retries", count(request.retries)]);
  return found;
}
