// Questions to the person in front of the page. Each dialog exists while it is open.

import { ApiError, act } from "./api.js";
import { h, text } from "./dom.js";

function open(title, ...content) {
  const heading = h("h2", { id: "dialog-title" }, title);
  const dialog = h("dialog.dialog", { "aria-labelledby": "dialog-title" }, heading, ...content);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

function onEnter(input, act) {
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      act();
    }
  });
}

// Resolves with the key as typed ("" forgets it), or null.
export function askForKey(known) {
  return new Promise((resolve) => {
    let answer = null;
    const input = h("input.wide", { id: "key-input", type: "password", autocomplete: "off", spellcheck: "false" });
    input.value = known;
    const done = () => {
      answer = input.value.trim();
      dialog.close();
    };
    onEnter(input, done);
    const dialog = open(
      "API key",
      h("p.dim", {}, "Of a tenant with admin: true. It is kept in this tab only, and forgotten with it."),
      h("label.field", { for: "key-input" }, "Key", input),
      h(
        "div.buttons",
        {},
        h("button.quiet", { type: "button", onclick: () => dialog.close() }, "Cancel"),
        h("button.primary", { type: "button", onclick: done }, "Use this key"),
      ),
    );
    dialog.addEventListener("close", () => resolve(answer));
    input.focus();
  });
}

// Shows what an action will do, performs it on confirmation, and says what the router said.
export function confirmAction({ title, explain, fields = [], button, danger = false, name, body }) {
  const said = h("p.said", { role: "alert" });
  const go = h(danger ? "button.danger" : "button.primary", { type: "button" }, button);
  const cancel = h("button.quiet", { type: "button", onclick: () => dialog.close() }, "Cancel");
  const perform = async () => {
    go.disabled = true;
    said.className = "said";
    text(said, "asking the pool manager …");
    try {
      await act(name, body());
      dialog.close();
    } catch (error) {
      said.className = "said bad";
      text(said, describe(error));
      go.disabled = false;
    }
  };
  go.addEventListener("click", perform);
  for (const field of fields) {
    for (const input of field.querySelectorAll("input")) onEnter(input, perform);
  }
  const dialog = open(title, h("p", {}, explain), ...fields, said, h("div.buttons", {}, cancel, go));
  (fields[0]?.querySelector("input, select") ?? cancel).focus();
  return dialog;
}

export function describe(error) {
  if (error instanceof ApiError) {
    const where = error.param ? ` (${error.param})` : "";
    return `${error.code || error.status}: ${error.message}${where}`;
  }
  return error.name === "AbortError" ? "cancelled" : "the router cannot be reached";
}

// `actions` are buttons beside the one that closes.
export function showDetails(title, actions, ...content) {
  const close = h("button.quiet", { type: "button", onclick: () => dialog.close() }, "Close");
  const dialog = open(title, ...content.filter(Boolean), h("div.buttons", {}, ...actions, close));
  close.focus();
  return dialog;
}
