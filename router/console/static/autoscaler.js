// What the autoscaler decided and why, and its mode. Asked for when somebody looks, not part of the live stream.

import { call } from "./api.js";
import { confirmAction, describe } from "./dialogs.js";
import { h } from "./dom.js";
import { clock, count } from "./format.js";

const MODES = [
  ["off", "Off"],
  ["dry_run", "Dry run"],
  ["on", "On"],
];
const EXPLAIN = {
  off: "The pools keep the sizes that they have.",
  dry_run: "It decides and says so, and changes nothing.",
  on: "It changes the pools' sizes and roles by itself.",
};
const REFRESH_MS = 10000;

export function autoscaler() {
  const body = h("div.autoscaler");
  const element = h("section.card", { "aria-label": "Autoscaler" }, h("h2", {}, "Autoscaler"), body);
  let asking = false;
  let askedAt = -Infinity;

  async function ask() {
    asking = true;
    askedAt = performance.now();
    try {
      show((await (await call("/admin/v1/autoscaler")).json()).models);
    } catch (error) {
      body.replaceChildren(h("p.dim", {}, describe(error)));
    } finally {
      asking = false;
    }
  }

  function show(models) {
    const parts = Object.entries(models).map(([name, model]) => one(name, model));
    body.replaceChildren(...(parts.length ? parts : [h("p.dim", {}, "No model is scaled by itself.")]));
  }

  function one(name, model) {
    const modes = h(
      "div.segments",
      { role: "group", "aria-label": `Autoscaler of ${name}` },
      ...MODES.map(([mode, label]) =>
        h("button", { type: "button", "aria-pressed": String(model.mode === mode), onclick: () => change(name, mode) }, label),
      ),
    );
    const pools = Object.entries(model.pools).map(([role, pool]) =>
      h(
        "p.pressure",
        {},
        h("span", {}, `${role} ${pool.ready}/${pool.desired}`),
        h("span.dim", {}, ` of ${pool.min}–${pool.max} · pressure ${pool.pressure.toFixed(2)}${pool.signal ? `: ${pool.signal}` : ""}`),
      ),
    );
    const decisions = model.decisions
      .slice(-6)
      .reverse()
      .map((decision) =>
        h(
          "li",
          {},
          h("time.dim", {}, clock(decision.at_s)),
          h("span", {}, `${decision.text || decision.action}${decision.performed || decision.action === "none" ? "" : " (dry run)"}`),
          h("span.dim", {}, decision.reason),
        ),
      );
    return h(
      "div",
      {},
      h("p.spread", {}, h("b", {}, name), modes),
      ...pools,
      decisions.length ? h("ul.decisions", {}, ...decisions) : h("p.dim", {}, `No decision yet; unused for ${count(Math.round(model.idle_s))} s.`),
    );
  }

  function change(name, mode) {
    const label = MODES.find(([value]) => value === mode)[1];
    const dialog = confirmAction({
      title: `Autoscaler of ${name}: ${label}?`,
      explain: EXPLAIN[mode],
      button: label,
      name: "autoscaler",
      body: () => ({ model: name, mode }),
    });
    dialog.addEventListener("close", ask);
  }

  return {
    element,
    draw(connected) {
      if (connected && !asking && performance.now() - askedAt > REFRESH_MS) ask();
    },
  };
}
