// The page: which view is shown, whether what it shows is fresh, the key, the colours.

import { key } from "./api.js";
import { showCluster } from "./cluster.js";
import { askForKey } from "./dialogs.js";
import { attribute, text } from "./dom.js";
import { duration } from "./format.js";
import { follow, reconnect } from "./live.js";
import { showPlayground } from "./playground.js";
import { showRequests } from "./requests.js";
import { changed, onChange, state } from "./state.js";

const VIEWS = { cluster: showCluster, requests: showRequests, playground: showPlayground };
const THEMES = ["auto", "light", "dark"];

const element = (id) => document.getElementById(id);

// -- views -------------------------------------------------------------------------------------------------------------

const shown = {};

function go() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const view = VIEWS[name] ? name : "cluster";
  for (const other of Object.keys(VIEWS)) element(`view-${other}`).hidden = other !== view;
  for (const link of document.querySelectorAll(".tabs a")) {
    attribute(link, "aria-current", link.dataset.view === view ? "page" : null);
  }
  shown[view] ??= VIEWS[view](element(`view-${view}`));
  shown[view].visit?.(rest.join("/"));
  document.title = view === "cluster" ? "pdserve" : `${view[0].toUpperCase()}${view.slice(1)} – pdserve`;
  current = view;
  changed();
}

let current = "cluster";
addEventListener("hashchange", go);

onChange((now) => {
  frame(now);
  shown[current]?.draw(now);
});

// -- frame -------------------------------------------------------------------------------------------------------------

let freshAt = performance.now();
let lastAtS = 0;

function frame(now) {
  if (now.atS !== lastAtS) {
    lastAtS = now.atS;
    freshAt = performance.now();
  }
  const { connection, picture } = now;
  const oldS = (performance.now() - freshAt) / 1000;
  const label = connection.is === "live" ? "live" : connection.is === "locked" ? "locked" : connection.text;
  text(element("connection"), label);
  attribute(element("connection"), "data-is", connection.is);
  const stale = connection.is !== "live" && picture !== null;
  document.body.classList.toggle("stale", stale);
  notice(now, stale, oldS);
  element("key").hidden = connection.is !== "locked" && !key.get() && !picture?.router.authenticates;
  if (picture) {
    text(element("cluster-name"), picture.cluster.name);
    text(element("foot"), `pdserve ${picture.cluster.version} · router up ${duration(now.atS - picture.router.started_s)}`);
  }
}

function notice(now, stale, oldS) {
  const { connection, picture } = now;
  let said = "";
  if (connection.is === "locked") said = `${connection.text}. An administrator's key opens this page.`;
  else if (stale) said = `${connection.text}. What you see is ${duration(oldS)} old.`;
  else if (picture && !picture.cluster.manager_connected)
    said = `The pool manager is away for ${duration(picture.cluster.manager_away_s)}. Serving goes on; workers are shown as it last knew them.`;
  else if (picture?.router.draining) said = "This router is being drained: it finishes what it has and takes nothing new.";
  const place = element("notice");
  place.hidden = !said;
  text(place, said);
}

setInterval(() => state.connection.is !== "live" && changed(), 1000);

// -- key and colours ---------------------------------------------------------------------------------------------------

element("key").addEventListener("click", async () => {
  const given = await askForKey(key.get());
  if (given === null) return;
  key.set(given);
  reconnect();
});

let asked = false;
onChange((now) => {
  if (now.connection.is === "locked" && !asked) {
    asked = true;
    element("key").click();
  }
  if (now.connection.is === "live") asked = false;
});

function paint(theme) {
  attribute(document.documentElement, "data-theme", theme === "auto" ? null : theme);
  text(element("theme"), `◐ ${theme}`);
  attribute(element("theme"), "aria-label", `Colours: ${theme}. Change`);
  dispatchEvent(new Event("themechange"));
}

let theme = THEMES.includes(localStorage.getItem("pdserve-theme")) ? localStorage.getItem("pdserve-theme") : "auto";
paint(theme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themechange")));
element("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  localStorage.setItem("pdserve-theme", theme);
  paint(theme);
});

go();
follow();
