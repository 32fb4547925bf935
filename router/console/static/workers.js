// The table of workers, what is known of one, and what can be done to it.

import { confirmAction, showDetails } from "./dialogs.js";
import { attribute, h, keyed, text } from "./dom.js";
import { bytes, count, degree, duration, percent, shortName } from "./format.js";
import { describeKv, kvBar, kvLegend, kvShare, updateKvBar } from "./kv_bar.js";

const COLUMNS = ["Worker", "State", "Running", "Waiting", "Tokens/s", "KV", "Prefix hits", "Guesses right", "Up", ""];

export function workersTable() {
  const body = h("tbody");
  const table = h(
    "table.grid.workers",
    {},
    h("thead", {}, h("tr", {}, ...COLUMNS.map((name) => h("th", { scope: "col" }, name || h("span.hidden", {}, "Actions"))))),
    body,
  );
  return {
    element: h("div.scroll", { tabindex: "0", role: "region", "aria-label": "Workers" }, table),
    legend: kvLegend(),
    draw(workers, atS) {
      keyed(body, workers, (worker) => worker.id, row, (element, worker) => drawRow(element, worker, atS));
    },
  };
}

function row(worker) {
  const cell = (name, ...content) => h(`td.c-${name}`, { "data-label": COLUMNS[names.indexOf(name)] }, ...content);
  const names = ["name", "state", "running", "waiting", "rate", "kv", "prefix", "guesses", "up", "actions"];
  return h(
    "tr",
    { "data-worker": worker.id },
    cell("name", h("b"), h("span.dim")),
    cell("state", h("span.state")),
    cell("running"),
    cell("waiting"),
    cell("rate"),
    cell("kv", kvBar(), h("span")),
    cell("prefix"),
    cell("guesses"),
    cell("up"),
    cell(
      "actions",
      h("button.quiet.small", { type: "button", "data-action": "drain", onclick: () => drain(worker.id) }, "Drain"),
      h("button.quiet.small", { type: "button", "data-action": "flip", onclick: () => flip(worker.id, worker.role) }, "Flip"),
    ),
  );
}

function drawRow(element, worker, atS) {
  const [name, state, running, waiting, rate, kv, prefix, guesses, up, actions] = element.children;
  attribute(element, "data-role", worker.role);
  text(name.children[0], shortName(worker.id, worker.model));
  text(name.children[1], ` ${[worker.model, degree(worker)].filter(Boolean).join(" · ")}`);
  attribute(state.children[0], "data-state", worker.suspect ? "suspect" : worker.state);
  text(state.children[0], worker.suspect ? "silent" : worker.state);
  attribute(state.children[0], "title", worker.failure || null);
  text(running, count(worker.running));
  text(waiting, count(worker.waiting));
  text(rate, count(worker.role === "prefill" ? worker.rates.computed : worker.rates.generated));
  updateKvBar(kv.children[0], worker.kv);
  text(kv.children[1], kvShare(worker.kv));
  const { prefix_hits: hits, prefix_queries: queries } = worker.totals;
  text(prefix, queries ? percent(hits / queries) : "–");
  text(guesses, worker.role === "decode" ? guessed(worker) : "–");
  text(up, worker.started_s ? `${duration(atS - worker.started_s)} #${worker.incarnation}` : `#${worker.incarnation}`);
  for (const button of actions.children) button.disabled = worker.state !== "ready";
}

function guessed(worker) {
  const { drafted, accepted } = worker.totals;
  return drafted ? percent(accepted / drafted) : "–";
}

// -- one worker --------------------------------------------------------------------------------------------------------

export function workerDetails(worker, links, atS) {
  const facts = [
    ["State", worker.state + (worker.failure ? `: ${worker.failure}` : "")],
    ["Incarnation", `#${worker.incarnation}, pid ${worker.pid}`],
    ...(degree(worker) ? [["Ranks", `${degree(worker)}: pids ${[worker.pid, ...worker.rank_pids].join(", ")}`]] : []),
    ["Up", worker.started_s ? duration(atS - worker.started_s) : "–"],
    ["Address", worker.address || "–"],
    ["Engine", [worker.device, worker.dtype, worker.exact ? "exact" : "", `up to ${count(worker.max_model_tokens)} tokens`].filter(Boolean).join(", ")],
    ["Load", `${count(worker.running)} running, ${count(worker.waiting)} waiting, ${count(worker.queued_tokens)} prompt tokens to compute`],
    ["KV blocks", describeKv(worker.kv)],
    ["Tokens", `${count(worker.totals.computed)} computed, ${count(worker.totals.generated)} generated`],
    ["Served", `${count(worker.totals.served)} requests, ${count(worker.totals.preemptions)} preemptions`],
    ["Reports", worker.reporting ? "to this router, ten times a second" : "none to this router; figures are the manager's"],
  ];
  if (worker.totals.drafted) {
    const lately = worker.acceptance === undefined ? "" : `, ${percent(worker.acceptance)} lately`;
    facts.push(["Guesses", `${count(worker.totals.accepted)} of ${count(worker.totals.drafted)} right (${guessed(worker)}${lately})`]);
  }
  if (worker.step_ms) facts.push(["A step now", `${worker.step_ms} ms, predicted`]);
  const own = links.filter((link) => link.prefill === worker.id || link.decode === worker.id);
  const actions = [
    h("button.quiet", { type: "button", onclick: () => drain(worker.id) }, "Drain …"),
    h("button.quiet", { type: "button", onclick: () => flip(worker.id, worker.role) }, "Flip …"),
  ];
  showDetails(
    worker.id,
    worker.state === "ready" ? actions : [],
    h("dl.facts", {}, ...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    own.length
      ? h(
          "table.grid",
          {},
          h("thead", {}, h("tr", {}, ...["Link", "By", "Hand-offs", "Failed", "Sent"].map((name) => h("th", { scope: "col" }, name)))),
          h(
            "tbody",
            {},
            ...own.map((link) =>
              h(
                "tr",
                {},
                h("td", {}, link.prefill === worker.id ? `to ${shortName(link.decode, worker.model)}` : `from ${shortName(link.prefill, worker.model)}`),
                h("td", {}, link.transport || "–"),
                h("td.num", {}, count(link.transfers)),
                h("td.num", {}, count(link.failures)),
                h("td.num", {}, bytes(link.bytes)),
              ),
            ),
          ),
        )
      : null,
  );
}

// -- actions -----------------------------------------------------------------------------------------------------------

function drain(workerId) {
  confirmAction({
    title: `Drain ${workerId}?`,
    explain: "It takes nothing new, finishes what it has, and ends. Its pool puts another in its place.",
    button: "Drain",
    danger: true,
    name: "drain",
    body: () => ({ worker_id: workerId }),
  });
}

function flip(workerId, role) {
  const other = role === "prefill" ? "decode" : "prefill";
  confirmAction({
    title: `Make ${workerId} a ${other} worker?`,
    explain: `It drains, keeps its process and weights, and goes on in the ${other} pool under another name. Both pools' sizes change with it.`,
    button: `Flip to ${other}`,
    danger: true,
    name: "flip",
    body: () => ({ worker_id: workerId, role: other }),
  });
}

function amount(label, id, value) {
  return h("label.field", { for: id }, label, h("input", { id, type: "number", min: "0", max: "1024", step: "1", value, required: true }));
}

export function scale(name, model) {
  const fields = [
    amount("Prefill workers", "scale-prefill", model.desired.prefill),
    amount("Decode workers", "scale-decode", model.desired.decode),
  ];
  const number = (field) => Math.trunc(Number(field.querySelector("input").value));
  confirmAction({
    title: `Scale ${name}`,
    explain: "Workers that are too many drain before they end.",
    fields,
    button: "Scale",
    name: "scale",
    body: () => ({ model: name, prefill: number(fields[0]), decode: number(fields[1]) }),
  });
}

export function roll(name) {
  const select = h(
    "select",
    { id: "roll-role" },
    h("option", { value: "" }, "both pools"),
    h("option", { value: "prefill" }, "prefill"),
    h("option", { value: "decode" }, "decode"),
  );
  confirmAction({
    title: `Replace the workers of ${name}?`,
    explain: "One by one: first the new one comes up, then the old one drains. No request is lost.",
    fields: [h("label.field", { for: "roll-role" }, "Which", select)],
    button: "Roll",
    name: "roll",
    body: () => (select.value ? { model: name, role: select.value } : { model: name }),
  });
}
