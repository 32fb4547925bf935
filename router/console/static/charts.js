// The last quarter of an hour as curves, one small chart per question; one cursor for all of them.

import { h, text } from "./dom.js";
import { count, ms, percent } from "./format.js";

const { uPlot } = globalThis; // vendor/uPlot.iife.min.js, as it is published

const LONG_S = 30; // a share over less says little
const HEIGHT = 132;
const SPANS = [
  [60, "1 min"],
  [300, "5 min"],
  [900, "15 min"],
];

const sync = uPlot.sync("pdserve");

// What a line says of the seconds up to one of them.
const sum = (points, read) => points.reduce((total, point) => total + read(point), 0);
const rate = (read) => (points) => sum(points, read) / Math.max(sum(points, (point) => point.length_s), 0.001);
const last = (read) => (points) => read(points.at(-1)) ?? null;
const perToken = (read) => (points) => {
  const tokens = sum(points, (point) => point.tokens);
  return tokens ? sum(points, read) / tokens : null;
};
const met = (point, promise) => point.slo[promise]?.[0] ?? 0;
const share = (promise) => (points) => {
  const promised = sum(points, (point) => met(point, promise) + (point.slo[promise]?.[1] ?? 0));
  return promised ? sum(points, (point) => met(point, promise)) / promised : null;
};

const ofCosts = (read, parts) => parts.map(([name, colour]) => [name, colour, read((point) => point.cost_ms[name] / 1000)]);
const PAID = [
  ["prefill", "prefill"],
  ["transfer", "transfer"],
  ["decode", "decode"],
  ["wasted", "bad"],
];

// `overS` are the seconds that one value is over; without it a second stands for itself.
const CHARTS = [
  {
    title: "Tokens per second",
    overS: 5, // prompts count when they end
    format: count,
    lines: [
      ["generated", "decode", rate((point) => point.tokens)],
      ["prompt", "prefill", rate((point) => point.prompt_tokens)],
    ],
  },
  {
    title: "Requests per second",
    format: count,
    lines: [
      ["ended", "text", rate((point) => point.requests)],
      ["failed", "bad", rate((point) => point.failed)],
      ["in flight", "dim", last((point) => point.in_flight)],
    ],
  },
  {
    title: "Time to first token",
    format: ms,
    sparse: true,
    lines: [
      ["p50", "prefill", last((point) => point.ttft_p50_ms)],
      ["p99", "transfer", last((point) => point.ttft_p99_ms)],
    ],
  },
  {
    title: "Time per output token",
    format: ms,
    sparse: true,
    lines: [
      ["p50", "decode", last((point) => point.tpot_p50_ms)],
      ["p99", "transfer", last((point) => point.tpot_p99_ms)],
    ],
  },
  {
    title: "Cost: seconds of workers, per second",
    overS: 15,
    format: fixed,
    stacked: true,
    lines: ofCosts(rate, [...PAID, ["saved", "good"]]), // on top: what it would have been without caches
  },
  {
    title: `Cost of 1,000 tokens in seconds of workers, over ${LONG_S} s`,
    overS: LONG_S,
    format: fixed,
    stacked: true,
    lines: ofCosts((read) => perToken((point) => 1000 * read(point)), PAID),
  },
];

const COLOURS = ["decode", "prefill", "transfer"];

// Per class of promises (`router.slo`).
function ofPromises(names) {
  const lines = (read) => names.map((name, index) => [name, COLOURS[index % COLOURS.length], read(name)]);
  return [
    {
      title: `Goodput: requests per second as promised, over ${LONG_S} s`,
      overS: LONG_S,
      format: count,
      lines: [...lines((name) => rate((point) => met(point, name))), ["ended", "dim", rate((point) => point.requests)]],
    },
    { title: `Promises kept, over ${LONG_S} s`, overS: LONG_S, format: percent, top: 1, sparse: true, lines: lines(share) },
  ];
}

function fixed(value) {
  return value === null || value === undefined ? "–" : value.toFixed(2);
}

export function charts() {
  let spanS = 300;
  const buttons = SPANS.map(([seconds, label]) =>
    h("button", { type: "button", "aria-pressed": String(seconds === spanS), onclick: () => setSpan(seconds) }, label),
  );
  const grid = h("div.charts");
  const unpromised = h("p.dim.none", {}, "Goodput is shown for what router.slo promises.");
  const element = h(
    "section.card.wide",
    { "aria-label": "Over time" },
    h("p.spread", {}, h("h2", {}, "Over time"), h("div.segments", { role: "group", "aria-label": "Span" }, ...buttons)),
    grid,
    unpromised,
  );
  let all = [];
  let drawn = null;
  let bands = "";

  function setSpan(seconds) {
    spanS = seconds;
    SPANS.forEach(([value], index) => buttons[index].setAttribute("aria-pressed", String(value === seconds)));
    if (drawn) draw(...drawn);
  }

  function build(promises) {
    for (const one of all) one.destroy();
    all = [...CHARTS, ...(promises.length ? ofPromises(promises) : [])].map((what) => chart(what));
    unpromised.hidden = promises.length > 0;
    grid.replaceChildren(...all.map((one) => one.element));
  }

  function draw(series, promises, atS) {
    drawn = [series, promises, atS];
    if (promises.join() !== bands || !all.length) {
      bands = promises.join();
      build(promises);
    }
    const from = atS - spanS;
    const points = series.filter((point) => point.at_s >= from - LONG_S);
    for (const one of all) one.draw(points, from, atS);
  }

  addEventListener("themechange", () => {
    bands = "\0";
    if (drawn) draw(...drawn);
  });
  return { element, draw };
}

function chart(what) {
  const place = h("div.plot");
  const figures = what.lines.map(([name, colour]) => h("span.figure", {}, h(`i.swatch.c-${colour}`), `${name} `, h("b", {}, "–")));
  const element = h("figure.chart", {}, h("figcaption", {}, h("span", {}, what.title), ...figures), place);
  let plot = null;
  let data = [];

  function show(index) {
    figures.forEach((figure, line) => {
      const values = data[line] ?? [];
      const at = index ?? lastOf(values);
      text(figure.lastChild, what.format(values[at] ?? null));
    });
  }

  const observer = new ResizeObserver(() => plot?.setSize({ width: place.clientWidth, height: HEIGHT }));
  observer.observe(place);

  return {
    element,
    destroy() {
      observer.disconnect();
      plot?.destroy();
    },
    draw(points, from, to) {
      const inside = points.filter((point) => point.at_s >= from);
      const times = inside.map((point) => point.at_s);
      const first = points.length - inside.length;
      data = what.lines.map(([, , read]) => inside.map((_, index) => read(before(points, first + index, what.overS ?? 0))));
      const shown = what.stacked ? stack(data) : data;
      plot ??= make(what, place, show);
      plot.batch(() => {
        plot.setData([times, ...shown], false);
        plot.setScale("x", { min: from, max: to });
        const highest = what.top ?? Math.max(0, ...shown.flat().filter((value) => value !== null)) * 1.08;
        plot.setScale("y", { min: 0, max: highest || 1 });
      });
      if (plot.cursor.idx === null || plot.cursor.idx === undefined) show(null);
    },
  };
}

function make(what, place, show) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const axis = { stroke: colour("dim"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const lines = what.lines.map(([label, name]) => ({
    label,
    stroke: colour(name),
    width: 1.5,
    spanGaps: Boolean(what.sparse),
    fill: what.stacked ? `${colour(name)}38` : undefined,
    points: { show: what.sparse ? undefined : false, size: 3.5, fill: colour(name) },
  }));
  return new uPlot(
    {
      width: place.clientWidth || 300,
      height: HEIGHT,
      padding: [8, 20, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: sync.key }, y: false, drag: { x: false, y: false }, points: { size: 5 } },
      scales: { x: { time: true, auto: false }, y: { auto: false } },
      axes: [
        { ...axis, size: 22, space: 70, values: [[1, "{HH}:{mm}:{ss}", null, null, null, null, null, null, 1]] },
        { ...axis, size: 52, space: 32, values: (_, ticks) => ticks.map((tick) => what.format(tick)) },
      ],
      series: [{}, ...lines],
      bands: what.stacked ? what.lines.slice(1).map((_, index) => ({ series: [index + 2, index + 1] })) : [],
      hooks: { setCursor: [(plot) => show(plot.cursor.idx ?? null)] },
    },
    [[], ...what.lines.map(() => [])],
    place,
  );
}

function stack(data) {
  let below = data[0]?.map(() => 0) ?? [];
  return data.map((values) => (below = values.map((value, index) => (value ?? 0) + below[index])));
}

// The point at an index and those of the seconds before it.
function before(points, index, lengthS) {
  let from = index;
  while (from > 0 && points[from - 1].at_s > points[index].at_s - lengthS) from -= 1;
  return points.slice(from, index + 1);
}

function lastOf(values) {
  let index = values.length - 1;
  while (index > 0 && values[index] === null) index -= 1;
  return index;
}
