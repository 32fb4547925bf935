// A chat with the cluster that shows its own time: each token as it came, and the waterfall of this very request.

import { call, events } from "./api.js";
import { describe } from "./dialogs.js";
import { attribute, h, s, text } from "./dom.js";
import { count, ms } from "./format.js";
import { facts, waterfall } from "./waterfall.js";

const SLOW = 2.5; // a gap so many times the median stands out

function field(label, id, input, hint) {
  return h("label.field", { for: id }, h("span", {}, label), input, hint ? h("span.dim.hint", {}, hint) : null);
}

function numberInput(id, more) {
  return h("input", { id, type: "number", inputmode: "decimal", ...more });
}

export function showPlayground(view) {
  const model = h("select", { id: "pg-model" });
  const temperature = numberInput("pg-temperature", { min: 0, max: 2, step: 0.1, value: 0.7 });
  const seed = numberInput("pg-seed", { step: 1, placeholder: "random" });
  const longest = numberInput("pg-max", { min: 1, step: 1, value: 256 });
  const schema = h("textarea", { id: "pg-schema", rows: 4, spellcheck: "false", placeholder: '{"type": "object", …}' });
  const system = h("textarea", { id: "pg-system", rows: 2, placeholder: "none" });
  const fresh = h("input", { id: "pg-fresh", type: "checkbox", checked: true });
  const prompt = h("textarea", { id: "pg-prompt", rows: 3, placeholder: "Say something. Enter sends, Shift+Enter breaks the line." });
  const send = h("button.primary", { type: "button", id: "pg-send" }, "Send");
  const stop = h("button.danger", { type: "button", id: "pg-stop", hidden: true }, "Stop");
  const clear = h("button.quiet", { type: "button" }, "New chat");
  const log = h("div.chat", { role: "log", "aria-label": "Conversation" });
  const timing = timingPanel();

  let messages = [];
  let running = null; // AbortController

  view.append(
    h(
      "div.playground",
      {},
      h(
        "section.card.talk",
        { "aria-label": "Chat" },
        log,
        h("label.hidden", { for: "pg-prompt" }, "Message"),
        prompt,
        h("div.buttons", {}, clear, stop, send),
      ),
      h(
        "div.stack",
        {},
        timing.element,
        h(
          "details.card.settings",
          { open: matchMedia("(min-width: 900px)").matches },
          h("summary", {}, h("h2", {}, "Settings")),
          h(
            "div.fields",
            {},
            field("Model", "pg-model", model),
            field("Temperature", "pg-temperature", temperature),
            field("Seed", "pg-seed", seed),
            field("Most tokens", "pg-max", longest),
          ),
          field("System prompt", "pg-system", system),
          field("JSON schema", "pg-schema", schema, "The answer will be JSON of this form."),
          h("label.check", { for: "pg-fresh" }, fresh, "Always compute, never answer from the cache"),
        ),
      ),
    ),
  );
  empty();

  function empty() {
    log.replaceChildren(h("p.dim", {}, "Each token is coloured by how long it took. What it cost is shown beside it."));
  }

  function body() {
    const asked = {
      model: model.value,
      messages: system.value.trim() ? [{ role: "system", content: system.value.trim() }, ...messages] : messages,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      pdserve_timings: true,
    };
    if (temperature.value !== "") asked.temperature = Number(temperature.value);
    if (seed.value !== "") asked.seed = Math.trunc(Number(seed.value));
    if (longest.value !== "") asked.max_tokens = Math.trunc(Number(longest.value));
    if (schema.value.trim()) {
      asked.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: JSON.parse(schema.value) } };
    }
    return asked;
  }

  async function ask() {
    const said = prompt.value.trim();
    if (running || !said) return;
    if (!messages.length) log.replaceChildren();
    messages.push({ role: "user", content: said });
    log.append(h("p.said-by-user", {}, said));
    const answer = h("p.answer", { "aria-busy": "true" });
    const note = h("p.note.dim");
    log.append(answer, note);
    let asked;
    try {
      asked = body();
    } catch {
      fail(note, answer, "The JSON schema is not JSON.");
      return;
    }
    prompt.value = "";
    running = new AbortController();
    send.disabled = true;
    stop.hidden = false;
    stop.focus();
    const clocked = timing.begin();
    let whole = "";
    let ended = "";
    try {
      const response = await call("/v1/chat/completions", {
        body: asked,
        signal: running.signal,
        extra: fresh.checked ? { "x-cache": "bypass" } : {},
      });
      clocked.cache = response.headers.get("x-cache") ?? "";
      for await (const data of events(response)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(`${chunk.error.code}: ${chunk.error.message}`);
        const delta = chunk.choices[0]?.delta.content ?? "";
        const arrived = clocked.chunk(chunk);
        if (delta) {
          whole += delta;
          answer.append(piece(delta, arrived));
          log.scrollTop = log.scrollHeight;
        }
        ended = chunk.choices[0]?.finish_reason ?? ended;
      }
      text(note, clocked.summary(ended));
    } catch (error) {
      const stopped = running.signal.aborted;
      text(note, stopped ? `stopped. ${clocked.summary("")}` : error.constructor === Error ? error.message : describe(error));
      note.classList.toggle("bad", !stopped);
    } finally {
      clocked.end();
      if (whole) messages.push({ role: "assistant", content: whole });
      else messages.pop();
      running = null;
      answer.removeAttribute("aria-busy");
      send.disabled = false;
      stop.hidden = true;
      prompt.focus();
    }
  }

  function fail(note, answer, message) {
    messages.pop();
    answer.remove();
    note.classList.add("bad");
    text(note, message);
  }

  send.addEventListener("click", ask);
  stop.addEventListener("click", () => running?.abort());
  clear.addEventListener("click", () => {
    running?.abort();
    messages = [];
    empty();
    prompt.focus();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
    if (event.key === "Escape") running?.abort();
  });
  addEventListener("keydown", (event) => event.key === "Escape" && !view.hidden && running?.abort());

  return {
    draw(state) {
      const names = state.picture ? Object.keys(state.picture.models) : [];
      if (names.join() !== [...model.options].map((option) => option.value).join()) {
        const before = model.value;
        model.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
        if (names.includes(before)) model.value = before;
      }
    },
    visit() {
      timing.redraw();
    },
  };
}

function piece(delta, arrived) {
  const span = h("span.token", {}, delta);
  if (arrived.gap !== null) {
    attribute(span, "title", `+${ms(arrived.gap)}${arrived.tokens > 1 ? `, ${arrived.tokens} tokens` : ""}`);
    attribute(span, "data-slow", arrived.slow);
  }
  return span;
}

// -- time --------------------------------------------------------------------------------------------------------------

function timingPanel() {
  const strip = h("div.strip");
  const figures = h("dl.figures");
  const picture = h("div.picture");
  const element = h("section.card.timing", { "aria-label": "Where the time went" }, h("h2", {}, "Where the time went"), strip, figures, picture);
  let last = null;
  const redraw = () => last?.draw();
  new ResizeObserver(redraw).observe(element);
  picture.append(h("p.dim", {}, "Send something, and see each millisecond."));

  return {
    element,
    redraw,
    begin() {
      last = new Clocked(strip, figures, picture);
      last.draw();
      return last;
    },
  };
}

class Clocked {
  constructor(strip, figures, picture) {
    this.places = { strip, figures, picture };
    this.beganMs = performance.now();
    this.arrivals = []; // {at, gap, tokens}
    this.tokens = 0;
    this.timings = null;
    this.usage = null;
    this.endedMs = null;
    this.cache = "";
  }

  chunk(chunk) {
    const at = performance.now() - this.beganMs;
    this.timings = chunk.timings ?? this.timings;
    this.usage = chunk.usage ?? this.usage;
    const tokens = (chunk.usage?.completion_tokens ?? this.tokens) - this.tokens;
    this.tokens += tokens;
    if (!chunk.choices.length || (!tokens && this.arrivals.length)) return { gap: null, tokens, slow: false };
    const before = this.arrivals.at(-1);
    const arrival = { at, gap: before ? at - before.at : null, tokens };
    arrival.slow = arrival.gap !== null && this.arrivals.length > 4 && arrival.gap > SLOW * this.median();
    this.arrivals.push(arrival);
    this.later();
    return arrival;
  }

  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  end() {
    this.endedMs = performance.now() - this.beganMs;
    this.draw();
  }

  gaps() {
    return this.arrivals.map((one) => one.gap).filter((gap) => gap !== null).sort((a, b) => a - b);
  }

  median() {
    const gaps = this.gaps();
    return gaps.length ? gaps[Math.floor(gaps.length / 2)] : 0;
  }

  summary(ended) {
    const lastAt = this.arrivals.at(-1)?.at ?? 0;
    const first = this.arrivals[0]?.at ?? 0;
    const rate = this.tokens > 1 && lastAt > first ? ((this.tokens - 1) * 1000) / (lastAt - first) : 0;
    const parts = [`${count(this.tokens)} tokens`];
    if (first) parts.push(`first after ${ms(first)}`);
    if (rate) parts.push(`then ${count(Math.round(rate))} tokens/s`);
    if (ended && ended !== "stop") parts.push(`ended by ${ended}`);
    if (this.cache && this.cache !== "bypass" && this.cache !== "miss") parts.push(this.cache);
    return parts.join(", ");
  }

  draw() {
    this.drawStrip();
    this.drawFigures();
    this.drawPicture();
  }

  // Time from left to right: the wait for the first token, then one mark per arrival, as high as it brought tokens.
  drawStrip() {
    const { strip } = this.places;
    const width = Math.max(200, strip.clientWidth);
    const height = 64;
    const until = Math.max(this.endedMs ?? 0, this.arrivals.at(-1)?.at ?? 0, 50);
    const x = (at) => (width * at) / until;
    const first = this.arrivals[0]?.at ?? (this.endedMs ?? until);
    const most = Math.max(1, ...this.arrivals.map((one) => one.tokens));
    const marks = this.arrivals.map((one) => {
      const size = 14 + (26 * Math.max(1, one.tokens)) / most;
      return s("rect.mark-token", { x: Math.min(width - 2, x(one.at)), y: 46 - size, width: 1.6, height: size, "data-slow": one.slow ? "true" : "false" });
    });
    strip.replaceChildren(
      s(
        "svg.tokens",
        { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Tokens over time: ${this.summary("")}` },
        s("rect.wait", { x: 0, y: 6, width: Math.max(0, x(first)), height: 40 }),
        s("path.base", { d: `M0 46.5H${width}` }),
        ...marks,
        s("text.tick", { x: 0, y: 60 }, "0"),
        s("text.tick", { x: width, y: 60, "text-anchor": "end" }, ms(until)),
        this.arrivals.length && x(first) > 60 && x(first) < width - 110
          ? s("text.tick", { x: x(first), y: 60, "text-anchor": "middle" }, `first ${ms(first)}`)
          : null,
      ),
    );
  }

  drawFigures() {
    const gaps = this.gaps();
    const at = (share) => (gaps.length ? gaps[Math.min(gaps.length - 1, Math.floor(share * gaps.length))] : null);
    const found = [
      ["First token", ms(this.arrivals[0]?.at ?? null)],
      ["Gap p50", ms(at(0.5))],
      ["Gap p99", ms(at(0.99))],
      ["Tokens", count(this.tokens)],
    ];
    this.places.figures.replaceChildren(...found.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }

  drawPicture() {
    const { picture } = this.places;
    const told = this.timings;
    if (!told) {
      picture.replaceChildren(h("p.dim", {}, this.endedMs === null ? "The router's account comes with the last token." : "The router's account did not come: the answer was broken off."));
      return;
    }
    const request = {
      stages: Object.entries(told.stages_ms),
      ttft_ms: told.ttft_ms,
      total_ms: told.total_ms,
      tpot_ms: this.tokens > 1 ? told.tpot_ms : null,
      transfer_hidden_ms: told.transfer_hidden_ms,
      transport: told.transport ?? "",
      transfer_bytes: told.transfer_bytes,
      prefill_worker: told.prefill_worker ?? "",
      decode_worker: told.decode_worker ?? "",
      migrated_to: [],
      prompt_tokens: this.usage?.prompt_tokens ?? 0,
      completion_tokens: this.usage?.completion_tokens ?? 0,
      cached_tokens: told.cached_tokens,
      retries: told.retries,
      cache: told.cache ?? "",
    };
    const drawn = [waterfall(request, Math.max(240, picture.clientWidth))];
    const network = this.arrivals.length ? this.arrivals[0].at - told.ttft_ms : 0;
    drawn.push(
      h(
        "dl.facts",
        {},
        ...[...facts(request), ["Seen here", `first token ${ms(Math.max(0, network))} after the router had it`]].flatMap(([name, value]) => [
          h("dt", {}, name),
          h("dd", {}, value),
        ]),
      ),
    );
    picture.replaceChildren(...drawn);
  }
}
