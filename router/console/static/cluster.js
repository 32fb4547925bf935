// The first view: figures, the picture, workers, curves, caches, autoscaler, events.

import { autoscaler } from "./autoscaler.js";
import { cachePanel } from "./cache_panel.js";
import { charts } from "./charts.js";
import { attribute, h, keyed, text } from "./dom.js";
import { flow } from "./flow.js";
import { clock, count, ms, percent } from "./format.js";
import { roll, scale, workerDetails, workersTable } from "./workers.js";

const RECENT_S = 60;

export function showCluster(view) {
  let now = null;
  let chosen = ""; // model; "" = all
  const figures = kpis();
  const models = h("div.models");
  const picture = flow((id) => {
    const worker = now?.picture.workers[id];
    if (worker) workerDetails({ ...worker, id }, Object.values(now.picture.links), now.atS);
  });
  const table = workersTable();
  const curves = charts();
  const cache = cachePanel();
  const scaler = autoscaler();
  const events = eventList();
  const routers = routerList();
  view.append(
    figures.element,
    h("section.card.wide", { "aria-label": "Pools" }, models, picture.element, table.legend),
    h("section.card.wide", { "aria-label": "All workers" }, h("h2", {}, "Workers"), table.element),
    curves.element,
    h("div.columns", {}, events.element, h("div.stack", {}, cache.element, scaler.element, routers.element)),
  );

  return {
    draw(state) {
      now = state;
      const { picture: cluster } = state;
      if (!cluster) return;
      const names = Object.keys(cluster.models);
      if (chosen && !names.includes(chosen)) chosen = "";
      drawModels(models, cluster, names, chosen, (name) => {
        chosen = name;
        this.draw(state);
      });
      const workers = Object.entries(cluster.workers)
        .map(([id, worker]) => ({ ...worker, id }))
        .filter((worker) => !chosen || worker.model === chosen)
        .sort((a, b) => (a.role === b.role ? a.id.localeCompare(b.id, undefined, { numeric: true }) : a.role === "prefill" ? -1 : 1));
      const ids = new Set(workers.map((worker) => worker.id));
      const links = Object.values(cluster.links).filter((link) => ids.has(link.prefill) && ids.has(link.decode));
      figures.draw(state);
      picture.draw(workers, links, poolFigures(cluster, workers, chosen), state.atS);
      table.draw(workers, state.atS);
      curves.draw(state.series, Object.keys(cluster.router.promises), state.atS);
      cache.draw(cluster.cache);
      scaler.draw(state.connection.is === "live" && cluster.cluster.manager_connected);
      events.draw(state.events);
      routers.draw(cluster.routers);
    },
  };
}

function poolFigures(cluster, workers, chosen) {
  const models = Object.entries(cluster.models).filter(([name]) => !chosen || name === chosen);
  const flights = Object.entries(cluster.router.in_flight).filter(([name]) => !chosen || name === chosen);
  const queued = Object.values(cluster.queue).filter((one) => !chosen || one.model === chosen);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const pool = (role, rate) => ({
    ready: sum(models.map(([, model]) => model.ready[role])),
    desired: sum(models.map(([, model]) => model.desired[role])),
    rate: sum(workers.filter((worker) => worker.role === role).map((worker) => worker.rates[rate])),
  });
  return {
    prefill: pool("prefill", "computed"),
    decode: pool("decode", "generated"),
    inFlight: sum(flights.map(([, value]) => value)),
    waiting: sum(queued.map((one) => one.requests)),
  };
}

// -- models ------------------------------------------------------------------------------------------------------------

function drawModels(place, cluster, names, chosen, choose) {
  const shown = names.length > 1 ? ["", ...names] : names;
  keyed(
    place,
    shown,
    (name) => name,
    (name) =>
      h(
        "div.model",
        {},
        h("button.model-name", { type: "button", onclick: () => choose(name) }, name || "all models"),
        name ? h("span.dim") : null,
        name ? h("button.quiet.small", { type: "button", "data-action": "scale", onclick: (event) => scale(name, event.target.model) }, "Scale") : null,
        name ? h("button.quiet.small", { type: "button", "data-action": "roll", onclick: () => roll(name) }, "Roll") : null,
      ),
    (element, name) => {
      const [button, said, scaling] = element.children;
      button.disabled = names.length === 1;
      attribute(button, "aria-pressed", names.length > 1 ? String(name === chosen) : null);
      if (!name) return;
      const model = cluster.models[name];
      scaling.model = model;
      text(said, model.asleep ? "asleep" : `${count(model.max_model_tokens)} tokens`);
    },
  );
}

// -- figures -----------------------------------------------------------------------------------------------------------

function kpis() {
  const names = ["Tokens/s", "Requests/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "SLO met", "Failed"];
  const cells = names.map((name) => h("div.kpi", {}, h("dt", {}, name), h("dd")));
  const element = h("dl.kpis", { "aria-label": `The last ${RECENT_S} seconds` }, ...cells);
  return {
    element,
    draw(state) {
      const recent = state.series.filter((point) => point.at_s >= state.atS - RECENT_S);
      const last = recent.slice(-5);
      const seconds = (points) => points.reduce((sum, point) => sum + point.length_s, 0) || 1;
      const sum = (points, read) => points.reduce((total, point) => total + read(point), 0);
      const ended = state.requests.filter((record) => record.started_at_s + record.total_ms / 1000 >= state.atS - RECENT_S);
      const quantile = (name, share) => {
        const values = ended.map((record) => record[name]).filter((value) => value !== null).sort((a, b) => a - b);
        return values.length ? values[Math.min(values.length - 1, Math.floor(share * values.length))] : null;
      };
      const met = sum(recent, (point) => Object.values(point.slo).reduce((total, [good]) => total + good, 0));
      const promised = sum(recent, (point) => Object.values(point.slo).reduce((total, [good, bad]) => total + good + bad, 0));
      const failed = sum(recent, (point) => point.failed);
      const values = [
        count(Math.round((10 * sum(last, (point) => point.tokens)) / seconds(last)) / 10),
        count(Math.round((10 * sum(recent, (point) => point.requests)) / seconds(recent)) / 10),
        ms(quantile("ttft_ms", 0.5)),
        ms(quantile("ttft_ms", 0.99)),
        ms(quantile("tpot_ms", 0.5)),
        ms(quantile("tpot_ms", 0.99)),
        promised ? percent(met / promised) : "–",
        count(failed),
      ];
      cells.forEach((cell, index) => text(cell.lastChild, values[index]));
      attribute(cells.at(-1), "data-bad", failed > 0);
    },
  };
}

// -- events, routers ---------------------------------------------------------------------------------------------------

const BAD = new Set(["lost", "killed", "given_up"]);
const GOOD = new Set(["ready", "restarted"]);

function eventList() {
  const list = h("ol.events", { tabindex: "0", "aria-label": "What happened to the pools, the latest first" });
  const none = h("p.dim.none", {}, "Nothing has happened yet.");
  const element = h("section.card", { "aria-label": "Events" }, h("h2", {}, "Events"), list, none);
  return {
    element,
    draw(events) {
      none.hidden = events.length > 0;
      keyed(
        list,
        events.slice(-60).reverse(),
        (event) => event.sequence,
        (event) =>
          h(
            "li",
            {},
            h("time.dim", { datetime: new Date(event.at_s * 1000).toISOString() }, clock(event.at_s)),
            h("span.kind", { "data-kind": BAD.has(event.kind) ? "bad" : GOOD.has(event.kind) ? "good" : "plain" }, event.kind.replace("_", " ")),
            h("span.event-text", { title: event.text }, h("b", {}, event.worker || event.model), " ", event.text),
          ),
      );
    },
  };
}

function routerList() {
  const list = h("ul.routers");
  const element = h("section.card", { "aria-label": "Routers" }, h("h2", {}, "Routers"), list);
  return {
    element,
    draw(routers) {
      keyed(
        list,
        Object.entries(routers),
        ([id]) => id,
        ([, router]) => h("li", {}, h("b", {}, router.http), h("span.dim", {}, ` gRPC ${router.grpc} · pid ${router.pid}${router.this ? " · this one" : ""}`)),
      );
    },
  };
}
