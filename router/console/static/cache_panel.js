// The answer caches: what they did, and whether the semantic one keeps its promise.

import { h, keyed, s, text } from "./dom.js";
import { count, percent } from "./format.js";

const RESULTS = [
  ["hit-exact", "exact hit", "decode"],
  ["hit-semantic", "semantic hit", "transfer"],
  ["coalesced", "shared", "prefill"],
  ["miss", "miss", "line-strong"],
  ["ineligible", "not eligible", "line"],
  ["bypass", "bypassed", "line"],
];

export function cachePanel() {
  const bar = h("span.kv.tall", { role: "img" });
  const parts = h("p.legend");
  const none = h("p.dim", {}, "No request yet.");
  const semantic = h("div.semantic");
  const classes = h("div");
  const element = h("section.card", { "aria-label": "Answer caches" }, h("h2", {}, "Answer caches"), bar, parts, none, semantic, classes);
  return {
    element,
    draw(cache) {
      const known = RESULTS.filter(([name]) => cache.requests[name]);
      const total = known.reduce((sum, [name]) => sum + cache.requests[name], 0);
      keyed(bar, known, ([name]) => name, ([, , colour]) => h(`i.c-${colour}`), (part, [name]) => {
        part.style.width = `${(100 * cache.requests[name]) / total}%`;
      });
      bar.setAttribute("aria-label", known.map(([name, label]) => `${cache.requests[name]} ${label}`).join(", ") || "no requests yet");
      keyed(
        parts,
        known,
        ([name]) => name,
        ([, label, colour]) => h("span", {}, h(`i.swatch.c-${colour}`), `${label} `, h("b")),
        (part, [name]) => text(part.lastChild, `${count(cache.requests[name])} (${percent(cache.requests[name] / total)})`),
      );
      none.hidden = known.length > 0;
      text(
        semantic,
        cache.semantic
          ? `Semantic cache: at most ${percent(cache.bound)} wrong answers, ${count(cache.known_questions)} questions known, embedder ${cache.embedder}.`
          : "The semantic cache is off.",
      );
      keyed(classes, Object.entries(cache.classes), ([name]) => name, bound, (part, [, kind]) => drawBound(part, kind, cache.bound));
    },
  };
}

// Where the measured upper bound lies against the promised one.
function bound([name]) {
  return h(
    "div.bound",
    {},
    h("p.spread", {}, h("b", {}, name), h("span.state")),
    s("svg.gauge", { viewBox: "0 0 200 14", preserveAspectRatio: "none", "aria-hidden": "true" }, s("rect.track", { x: 0, y: 5, width: 200, height: 4 }), s("rect.worst", { x: 0, y: 5, height: 4 }), s("rect.seen", { y: 2, width: 2, height: 10 }), s("path.promise", { d: "M100 0V14" })),
    h("p.dim"),
  );
}

function drawBound(part, kind, promised) {
  const [head, gauge, said] = part.children;
  const state = head.lastChild;
  text(state, { proven: "on", unproven: "on trial", off: "off" }[kind.state] ?? kind.state);
  state.dataset.state = { proven: "ready", unproven: "starting", off: "failed" }[kind.state] ?? "";
  const place = (share) => Math.min(200, (100 * share) / promised);
  gauge.children[1].setAttribute("width", kind.upper_bound < 1 ? place(kind.upper_bound) : 0);
  gauge.children[1].dataset.within = String(kind.upper_bound <= promised);
  gauge.children[2].setAttribute("width", kind.upper_bound < 1 ? 1 : 0);
  gauge.children[2].setAttribute("x", Math.max(0, place(kind.wrong_ratio) - 1));
  text(
    said,
    kind.upper_bound >= 1
      ? `not shown yet; promised at most ${percent(promised)}`
      : `wrong at most ${percent(kind.upper_bound)} at 95 % confidence, ${percent(kind.wrong_ratio)} seen, promised ${percent(promised)}`,
  );
}
