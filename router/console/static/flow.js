// The picture at the top: prefill pool, links, decode pool. Workers are elements; links are drawn between them.

import { attribute, h, keyed, s, text } from "./dom.js";
import { bytes, count, degree, duration, shortName } from "./format.js";
import { kvBar, updateKvBar } from "./kv_bar.js";

const CROWD = 6; // workers in a pool, beyond which they are shown small
const MOST_LABELS = 6;

export function flow(onWorker) {
  const prefill = pool("prefill", "Prefill", "prompt tokens/s");
  const decode = pool("decode", "Decode", "tokens/s");
  const links = s("svg.links", { "aria-hidden": "true" });
  const between = h("div.between", {}, h("p.pool-head", {}, h("span.link-title", {}, "KV"), h("b.link-rate"), h("span.link-by.dim")), links);
  const router = {
    in: h("b"),
    waiting: h("b"),
    element: null,
  };
  router.element = h(
    "div.router-row",
    {},
    h("span.arm.arm-in", {}, h("span", {}, "prompts")),
    h("div.router", {}, h("b", {}, "Router"), h("span", {}, router.in, " in flight"), h("span", {}, router.waiting, " waiting")),
    h("span.arm.arm-out", {}, h("span", {}, "tokens")),
  );
  const element = h("div.flow", {}, router.element, prefill.element, between, decode.element);
  const redraw = () => last && drawLinks(links, last.links, element);
  let last = null;
  new ResizeObserver(redraw).observe(element);

  return {
    element,
    draw(workers, linkList, figures, atS) {
      text(router.in, count(figures.inFlight));
      text(router.waiting, count(figures.waiting));
      for (const [name, one] of [["prefill", prefill], ["decode", decode]]) {
        drawPool(one, workers.filter((worker) => worker.role === name), figures[name], onWorker, atS);
      }
      const rate = linkList.reduce((sum, link) => sum + link.bytes_per_s, 0);
      text(between.querySelector(".link-rate"), rate ? `${bytes(rate)}/s` : "idle");
      text(between.querySelector(".link-by"), [...new Set(linkList.map((link) => link.transport).filter(Boolean))].join(", "));
      last = { links: linkList };
      redraw();
    },
  };
}

function pool(name, title, unit) {
  const ready = h("span.dim");
  const rate = h("b");
  const nodes = h("div.nodes");
  const element = h(
    `section.pool.pool-${name}`,
    { "aria-label": `${title} pool` },
    h("p.pool-head", {}, h("span.pool-title", {}, title), ready, h("span.pool-rate", {}, rate, ` ${unit}`)),
    nodes,
    h("p.none.dim", { hidden: true }, "no workers"),
  );
  return { element, ready, rate, nodes };
}

function drawPool(pool, workers, figures, onWorker, atS) {
  text(pool.ready, `${figures.ready} of ${figures.desired} ready`);
  text(pool.rate, count(figures.rate));
  pool.nodes.classList.toggle("crowd", workers.length > CROWD);
  pool.element.querySelector(".none").hidden = workers.length > 0;
  keyed(
    pool.nodes,
    workers,
    (worker) => worker.id,
    (worker) => node(worker, onWorker),
    (element, worker) => drawNode(element, worker, atS),
  );
}

function node(worker, onWorker) {
  return h(
    "button.node",
    { type: "button", "data-worker": worker.id, onclick: () => onWorker(worker.id) },
    h("span.node-head", {}, h("i.dot"), h("b.node-name"), h("span.node-age.dim")),
    h("span.node-rate", {}, h("b"), h("span.dim", {}, " tok/s")),
    h("span.node-load.dim"),
    kvBar(),
  );
}

function drawNode(element, worker, atS) {
  const [head, rate, load, bar] = element.children;
  attribute(element, "data-state", worker.suspect ? "suspect" : worker.state);
  text(head.children[1], shortName(worker.id, worker.model));
  const age = worker.started_s && worker.state === "ready" ? duration(atS - worker.started_s) : worker.state;
  text(head.children[2], [degree(worker), `#${worker.incarnation}`, age].filter(Boolean).join(" · "));
  text(rate.children[0], count(worker.role === "prefill" ? worker.rates.computed : worker.rates.generated));
  const waiting = worker.waiting ? ` · ${count(worker.waiting)} waiting` : "";
  text(load, worker.state === "ready" || worker.running ? `${count(worker.running)} running${waiting}` : worker.failure || "–");
  updateKvBar(bar, worker.kv);
  attribute(element, "title", worker.failure || null);
}

// -- links -------------------------------------------------------------------------------------------------------------

function drawLinks(svg, links, root) {
  const frame = svg.getBoundingClientRect();
  if (!frame.width) return;
  attribute(svg, "viewBox", `0 0 ${frame.width} ${frame.height}`);
  const place = new Map();
  for (const element of root.querySelectorAll(".node")) {
    const box = element.getBoundingClientRect();
    place.set(element.dataset.worker, box.top + box.height / 2 - frame.top);
  }
  const drawn = links.filter((link) => place.has(link.prefill) && place.has(link.decode));
  const labelled = frame.width < 110 ? new Set() : new Set([...drawn].sort((a, b) => b.bytes_per_s - a.bytes_per_s).slice(0, MOST_LABELS));
  const labels = spread(drawn.filter((link) => labelled.has(link)), place, frame);
  keyed(
    svg,
    drawn,
    (link) => `${link.prefill} > ${link.decode}`,
    () => s("g.tie", {}, s("title"), s("path.wire"), s("path.stream"), s("text.link-label")),
    (group, link) => {
      const [title, wire, stream, label] = group.children;
      const [from, to] = [place.get(link.prefill), place.get(link.decode)];
      const path = `M0 ${from} C${frame.width / 2} ${from} ${frame.width / 2} ${to} ${frame.width} ${to}`;
      attribute(wire, "d", path);
      attribute(stream, "d", path);
      const flows = link.bytes_per_s > 0;
      attribute(group, "data-flows", String(flows));
      attribute(group, "data-linked", String(link.transport !== ""));
      const strength = flows ? Math.log10(1 + link.bytes_per_s / 1e4) : 0;
      stream.style.strokeWidth = `${Math.min(9, 1.5 + 1.6 * strength).toFixed(1)}px`;
      stream.style.animationDuration = `${Math.max(0.35, 1.8 - 0.35 * strength).toFixed(2)}s`;
      const said = flows ? `${link.transport} ${bytes(link.bytes_per_s)}/s` : link.transport || "no link";
      text(title, `${link.prefill} to ${link.decode}: ${said}, ${count(link.transfers)} hand-offs, ${link.failures} failed`);
      text(label, flows && labels.has(link) ? `${bytes(link.bytes_per_s)}/s` : "");
      attribute(label, "x", frame.width / 2);
      attribute(label, "y", (labels.get(link) ?? 0) - 7);
    },
  );
}

// Labels stand in the middle of their links, pushed apart where these cross.
function spread(links, place, frame) {
  const found = new Map();
  let lowest = -Infinity;
  const middle = (link) => (place.get(link.prefill) + place.get(link.decode)) / 2;
  for (const link of [...links].sort((a, b) => middle(a) - middle(b))) {
    lowest = Math.max(middle(link), lowest + 17);
    found.set(link, Math.min(lowest, frame.height - 4));
  }
  return found;
}
