// The last requests, those in progress first; one of them at length.

import { ApiError, call } from "./api.js";
import { describe as describeError } from "./dialogs.js";
import { attribute, h, keyed, text } from "./dom.js";
import { clock, count, ms, shortName } from "./format.js";
import { facts, waterfall, waterfallLine } from "./waterfall.js";

const CLIENT_LEFT = 499;
const MOST_ROWS = 200;
const COLUMNS = ["Began", "Request", "Outcome", "Cache", "Tokens", "TTFT", "TPOT", "Total", "Where the time went"];
const OUTCOMES = [
  ["", "all"],
  ["ok", "ok"],
  ["failed", "failed"],
  ["cancelled", "cancelled"],
];

const serials = new WeakMap();
let serial = 0;

function serialOf(record) {
  if (!serials.has(record)) serials.set(record, (serial += 1));
  return serials.get(record);
}

function outcomeOf(record) {
  if (record.status === 200) return ["ok", "ok"];
  if (record.status === CLIENT_LEFT) return ["cancelled", "client left"];
  return ["failed", record.error || String(record.status)];
}

export function showRequests(view) {
  let outcome = "";
  let wanted = "";
  let chosen = null;
  let now = null;

  const buttons = OUTCOMES.map(([value, label]) =>
    h("button", { type: "button", "aria-pressed": String(value === outcome), onclick: () => filter(value) }, label),
  );
  const search = h("input", {
    type: "search",
    size: 28,
    "aria-label": "Filter by id, model, worker or tenant",
    placeholder: "id, model, worker, tenant",
    oninput: () => {
      wanted = search.value.trim().toLowerCase();
      draw(now);
    },
  });
  const running = h("tbody");
  const body = h("tbody");
  const none = h("p.dim.none", {}, "No request has ended yet.");
  const table = h(
    "table.grid.requests",
    {},
    h("thead", {}, h("tr", {}, ...COLUMNS.map((name) => h("th", { scope: "col" }, name)))),
    running,
    body,
  );
  const detail = h("section.card.detail", { "aria-label": "Request", "aria-live": "polite", hidden: true });
  view.append(
    detail,
    h(
      "section.card.wide",
      {},
      h("p.spread", {}, h("h2", {}, "Requests"), h("span.row", {}, search, h("span.segments", { role: "group", "aria-label": "Outcome" }, ...buttons))),
      h("div.scroll", { tabindex: "0", role: "region", "aria-label": "Requests" }, table),
      none,
    ),
  );
  new ResizeObserver(() => chosen && drawDetail()).observe(view);

  function filter(value) {
    outcome = value;
    OUTCOMES.forEach(([other], index) => buttons[index].setAttribute("aria-pressed", String(other === value)));
    draw(now);
  }

  function fits(record) {
    if (outcome && outcomeOf(record)[0] !== outcome) return false;
    const where = [record.id, record.model, record.tenant, record.prefill_worker, record.decode_worker];
    return !wanted || where.some((value) => value?.toLowerCase().includes(wanted));
  }

  function choose(record) {
    chosen = record;
    history.replaceState(null, "", `#requests/${encodeURIComponent(record.id)}`);
    drawDetail();
    draw(now);
    scrollTo({ top: 0 });
  }

  function drawDetail() {
    const record = chosen;
    const [is, said] = outcomeOf(record);
    const width = Math.min(1400, Math.max(260, view.clientWidth - 44));
    const close = () => {
      chosen = null;
      detail.hidden = true;
      history.replaceState(null, "", "#requests");
      draw(now);
    };
    const more = [
      ["Model", record.model || "–"],
      ["Tenant", [record.tenant || "–", record.band].filter(Boolean).join(", ")],
      ["Endpoint", record.endpoint],
      ...facts(record),
      ["Cost", `${ms(Object.entries(record.cost_ms).reduce((sum, [part, value]) => (part === "saved" ? sum : sum + value), 0))} of workers${record.cost_ms.saved ? `, ${ms(record.cost_ms.saved)} saved` : ""}`],
    ];
    if (record.slo) more.push(["Promise", `${record.slo}: ${record.slo_met === null ? "does not count" : record.slo_met ? "kept" : "missed"}`]);
    if (record.trace_id) more.push(["Trace", record.trace_id]);
    detail.hidden = false;
    detail.replaceChildren(
      h("p.spread", {}, h("h2", {}, record.id, " ", h("span.chip", { "data-is": is }, said)), h("button.quiet.small", { type: "button", onclick: close }, "Close")),
      waterfall(record, width),
      h("dl.facts", {}, ...more.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    );
  }

  function draw(state) {
    now = state;
    if (!state?.picture) return;
    keyed(running, outcome ? [] : state.active.filter(fits), (one) => `${one.id} ${one.started_at_s}`, activeRow, drawActive);
    const records = state.requests.filter(fits).slice(0, MOST_ROWS);
    none.hidden = records.length > 0 || state.active.length > 0;
    text(none, state.requests.length ? "None fits." : "No request has ended yet.");
    keyed(
      body,
      records,
      serialOf,
      (record) => row(record, () => choose(record)),
      (element, record) => attribute(element, "aria-selected", record === chosen ? "true" : null),
    );
  }

  async function visit(rest) {
    if (!rest || rest === encodeURIComponent(chosen?.id ?? "")) return;
    try {
      chosen = await (await call(`/admin/v1/requests/${rest}`)).json();
      drawDetail();
    } catch (error) {
      const gone = error instanceof ApiError && error.status === 404;
      detail.hidden = false;
      detail.replaceChildren(h("p.dim", {}, gone ? "This request is not remembered any more." : describeError(error)));
    }
  }

  return { draw, visit };
}

function cells(values) {
  return values.map((value, index) => h(`td${index > 3 && index < 8 ? ".num" : ""}`, { "data-label": COLUMNS[index] }, value));
}

function row(record, onChoose) {
  const [is, said] = outcomeOf(record);
  const name = h("button.link", { type: "button", onclick: onChoose, title: record.id }, record.id.length > 12 ? `${record.id.slice(0, 12)}…` : record.id);
  return h(
    "tr",
    { onclick: (event) => event.target.closest("button") || onChoose() },
    ...cells([
      clock(record.started_at_s),
      [name, h("span.dim", {}, ` ${record.model}`)],
      h("span.chip", { "data-is": is }, said),
      record.cache || "–",
      tokens(record.prompt_tokens, record.cached_tokens, record.completion_tokens),
      ms(record.ttft_ms),
      ms(record.tpot_ms),
      ms(record.total_ms),
      [waterfallLine(record), h("span.dim.way", {}, way(record))],
    ]),
  );
}

function tokens(prompt, cached, generated) {
  return `${count(prompt)}${cached ? ` (${count(cached)})` : ""} → ${count(generated)}`;
}

function way(record) {
  const short = (id) => shortName(id, record.model);
  if (!record.decode_worker) return "";
  const from = record.prefill_worker ? `${short(record.prefill_worker)} → ` : "";
  const on = record.migrated_to.map((id) => ` → ${short(id)}`).join("");
  return `${from}${short(record.decode_worker)}${on}`;
}

function activeRow() {
  return h("tr.active", {}, ...cells(["", "", h("span.chip", { "data-is": "running" }, "running"), "", "", "", "", "", ""]));
}

function drawActive(element, request) {
  const [began, name, , , generated, ttft, , total, where] = element.children;
  text(began, clock(request.started_at_s));
  text(name, `${request.id.length > 12 ? `${request.id.slice(0, 12)}…` : request.id} ${request.model}`);
  text(generated, `${count(request.prompt_tokens)} → ${count(request.completion_tokens)}`);
  text(ttft, ms(request.ttft_ms));
  text(total, ms(request.age_ms));
  text(where, request.decode_worker ? shortName(request.decode_worker, request.model) : "waiting");
}
