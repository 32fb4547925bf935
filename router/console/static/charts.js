// The last quarter of an hour as curves, one small chart per question; one cursor for all of them.

import { h, text } from "./dom.js";
import { count, ms, percent } from "./format.js";

const { uPlot } = globalThis; // vendor/uPlot.iife.min.js, as it is published

const GOODPUT_S = 30; // a share over less says little
const HEIGHT = 132;
const SPANS = [
  [60, "1 min"],
  [300, "5 min"],
  [900, "15 min"],
];

const sync = uPlot.sync("pdserve");

const second = (point, value) => value / Math.max(point.length_s, 0.001);

const CHARTS = [
  {
    title: "Tokens per second",
    meanS: 5, // prompts count when they end
    format: count,
    lines: [
      ["generated", "decode", (point) => second(point, point.tokens)],
      ["prompt", "prefill", (point) => second(point, point.prompt_tokens)],
    ],
  },
  {
    title: "Requests per second",
    format: count,
    lines: [
      ["ended", "text", (point) => second(point, point.requests)],
      ["failed", "bad", (point) => second(point, point.failed)],
      ["in flight", "dim", (point) => point.in_flight],
    ],
  },
  {
    title: "Time to first token",
    format: ms,
    sparse: true,
    lines: [
      ["p50", "prefill", (point) => point.ttft_p50_ms],
      ["p99", "transfer", (point) => point.ttft_p99_ms],
    ],
  },
  {
    title: "Time per output token",
    format: ms,
    sparse: true,
    lines: [
      ["p50", "decode", (point) => point.tpot_p50_ms],
      ["p99", "transfer", (point) => point.tpot_p99_ms],
    ],
  },
  {
    title: "Seconds of workers, per second",
    meanS: 15,
    format: (value) => (value === null || value === undefined ? "–" : value.toFixed(2)),
    stacked: true,
    lines: [
      ["prefill", "prefill", (point) => second(point, point.cost_ms.prefill / 1000)],
      ["transfer", "transfer", (point) => second(point, point.cost_ms.transfer / 1000)],
      ["decode", "decode", (point) => second(point, point.cost_ms.decode / 1000)],
      ["wasted", "bad", (point) => second(point, point.cost_ms.wasted / 1000)],
    ],
  },
];

export function charts() {
  let spanS = 300;
  const buttons = SPANS.map(([seconds, label]) =>
    h("button", { type: "button", "aria-pressed": String(seconds === spanS), onclick: () => setSpan(seconds) }, label),
  );
  const grid = h("div.charts");
  const element = h(
    "section.card.wide",
    { "aria-label": "Over time" },
    h("p.spread", {}, h("h2", {}, "Over time"), h("div.segments", { role: "group", "aria-label": "Span" }, ...buttons)),
    grid,
  );
  let all = [];
  let last = null;
  let bands = "";

  function setSpan(seconds) {
    spanS = seconds;
    SPANS.forEach(([value], index) => buttons[index].setAttribute("aria-pressed", String(value === seconds)));
    if (last) draw(...last);
  }

  function build(promises) {
    for (const one of all) one.destroy();
    const goodput = {
      title: `SLO met, over ${GOODPUT_S} s`,
      format: percent,
      top: 1,
      sparse: true,
      lines: promises.map((name, index) => [name, ["decode", "prefill", "transfer"][index % 3], null, name]),
    };
    all = [...CHARTS, ...(promises.length ? [goodput] : [])].map((what) => chart(what));
    grid.replaceChildren(...all.map((one) => one.element));
  }

  function draw(series, promises, atS) {
    last = [series, promises, atS];
    if (promises.join() !== bands || !all.length) {
      bands = promises.join();
      build(promises);
    }
    const from = atS - spanS;
    const points = series.filter((point) => point.at_s >= from - GOODPUT_S);
    for (const one of all) one.draw(points, from, atS);
  }

  addEventListener("themechange", () => {
    bands = "\0";
    if (last) draw(...last);
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
      data = what.lines.map(([, , read, promise]) => {
        if (!read) return inside.map((_, index) => kept(before(points, first + index, GOODPUT_S), promise));
        if (what.meanS) return inside.map((_, index) => mean(before(points, first + index, what.meanS), read));
        return inside.map((point) => read(point) ?? null);
      });
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
      padding: [8, 6, 0, 0],
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

function mean(points, read) {
  return points.reduce((sum, point) => sum + read(point), 0) / points.length;
}

function kept(points, promise) {
  let met = 0;
  let missed = 0;
  for (const point of points) {
    const counts = point.slo[promise];
    if (counts) {
      met += counts[0];
      missed += counts[1];
    }
  }
  return met + missed ? met / (met + missed) : null;
}

function lastOf(values) {
  let index = values.length - 1;
  while (index > 0 && values[index] === null) index -= 1;
  return index;
}
