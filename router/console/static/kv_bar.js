// A pool of KV blocks as a bar: who has them.

import { attribute, h } from "./dom.js";
import { count, percent } from "./format.js";

const PARTS = [
  ["used", "used"],
  ["arriving", "arriving"],
  ["quarantined", "in quarantine"],
  ["cached", "cached"],
];

export function kvBar() {
  return h("span.kv", { role: "img" }, ...PARTS.map(([name]) => h(`i.kv-${name}`)));
}

export function updateKvBar(bar, kv) {
  PARTS.forEach(([name], index) => {
    const share = kv.total ? kv[name] / kv.total : 0;
    // What is there at all can be seen.
    bar.children[index].style.width = kv[name] ? `max(2px, ${share * 100}%)` : "0";
  });
  attribute(bar, "aria-label", `KV blocks of ${kv.total}: ${describeKv(kv)}`);
  attribute(bar, "title", describeKv(kv));
}

export function describeKv(kv) {
  const parts = PARTS.filter(([name]) => kv[name]).map(([name, label]) => `${count(kv[name])} ${label}`);
  return [...parts, `${count(kv.free)} free`].join(" · ");
}

export function kvShare(kv) {
  return percent(kv.total ? (kv.used + kv.arriving + kv.quarantined) / kv.total : 0);
}

export function kvLegend() {
  return h(
    "p.legend",
    { "aria-label": "Legend of KV bars" },
    "KV blocks",
    ...PARTS.map(([name, label]) => h("span", {}, h(`i.swatch.kv-${name}`), label)),
    h("span", {}, h("i.swatch.kv-free"), "free"),
  );
}
