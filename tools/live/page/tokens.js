/* Answers as rows of tokens, coloured by one of their numbers. */

import { chapter } from "./chapters.js";
import { byId, el, fixed, percent, signed } from "./dom.js";

/** @typedef {import("../types").Row} Row */

const END = "⏎";

/** What a token can be coloured by: its number, in words, and its colour. */
export const COLOURS = {
  advantage: {
    label: "advantage A",
    help:
      "Green: better than expected, will become likelier. Red: worse, will " +
      "become less likely. No colour: 0.",
    of: (row, t) => row.advantages?.[t],
    write: (x) => signed(x),
    paint: (x) => diverging(x / 2),
  },
  rho: {
    label: "ρ, change by this step",
    help:
      "ρ: how many times likelier a token is after this step than before it. " +
      "Green: likelier. Red: less likely. Other answers of the step move a token, too.",
    of: (row, t) => row.newLogprobs && Math.exp(row.newLogprobs[t] - row.logprobs[t]),
    write: (x) => `×${fixed(x)}`,
    paint: (x) => diverging(3 * Math.log(x)),
  },
  kl: {
    label: "KL to the reference",
    help:
      "KL: how far the policy has moved from the model before training, at this " +
      "token. The stronger, the farther.",
    of: (row, t) => row.refLogprobs && k3(row.refLogprobs[t] - row.logprobs[t]),
    write: (x) => fixed(x),
    paint: (x) => `rgba(var(--far), ${Math.min(0.6, 2 * x).toFixed(3)})`,
  },
  probability: {
    label: "probability",
    help: "How likely each token was when it was drawn. The stronger, the surer.",
    of: (row, t) => Math.exp(row.logprobs[t]),
    write: (x) => percent(x),
    paint: (x) => `rgba(var(--far), ${(0.45 * x).toFixed(3)})`,
  },
};

/** Let a list choose among them. @param {string} id */
export function fillColours(id) {
  const options = Object.entries(COLOURS).map(([key, { label }]) =>
    el("option", { value: key }, label),
  );
  byId(id).append(...options);
}

/** Different answers, the most frequent first. @param {Row[]} rows */
export const byCount = (rows) => [...rows].sort((a, b) => b.count - a.count);

/** The first group with different rewards; else the first one. @param {Row[][]} groups */
export function mixedGroup(groups) {
  const differs = (rows) => rows.some((row) => row.reward !== rows[0].reward);
  return Math.max(0, groups.findIndex(differs));
}

const k3 = (d) => Math.expm1(Math.min(d, 20)) - d;

/** Blanks and ends of lines as something to see. @param {string} text */
const visible = (text) => text.replace(/\n/g, "↵").replace(/^ +$/, "␣");

/** Green above 0, red below, none at 0. */
function diverging(x) {
  const strength = Math.min(0.5, 0.5 * Math.abs(x)).toFixed(3);
  return `rgba(var(--${x > 0 ? "good" : "bad"}), ${strength})`;
}

/**
 * @param {Row} row
 * @param {string[]} vocabulary
 * @param {string} colour - a name in COLOURS
 * @param {number} [shown] - tokens; the last one appears
 */
export function tokensOf(row, vocabulary, colour, shown = Infinity) {
  const { label, of, write, paint } = COLOURS[colour];
  const tokens = row.tokens.slice(0, shown).map((id, t) => {
    const x = of(row, t);
    const text = id === 1 ? END : visible(row.texts?.[t] ?? vocabulary[id]);
    const words = x === undefined ? "" : write(x);
    const style = x === undefined ? null : `background:${paint(x)}`;
    const kind = t === shown - 1 ? "token new" : "token";
    const title = `${id === 1 ? "end of the answer" : text}: ${label} ${words}`;
    return el(
      "span",
      { class: kind, style, title },
      el("b", {}, text),
      el("i", {}, words),
    );
  });
  return el("span", { class: "tokens" }, ...tokens);
}

/**
 * The answers of one group.
 * @param {Row[]} rows
 * @param {string[]} vocabulary
 * @param {string} colour
 * @param {boolean} isPpo
 */
export function groupTable(rows, vocabulary, colour, isPpo) {
  const head = el(
    "tr",
    {},
    el("th", {}, chapter("answer, token by token", "answers")),
    rows.some((row) => row.count > 1) ? el("th", {}, "times") : null,
    el("th", {}, chapter("reward r", "reward")),
    isPpo ? el("th", { class: "left" }, chapter("guesses v", "value")) : null,
    isPpo
      ? el("th", { class: "left" }, chapter("advantages A", "gae"))
      : el("th", {}, chapter("advantage A", "group")),
  );
  const many = rows.some((row) => row.count > 1);
  const lines = byCount(rows).map((row) =>
    el(
      "tr",
      {},
      el("td", {}, tokensOf(row, vocabulary, colour)),
      many ? el("td", {}, String(row.count)) : null,
      el("td", {}, fixed(row.reward)),
      isPpo
        ? el("td", { class: "left" }, row.values.map((x) => fixed(x)).join("  "))
        : null,
      isPpo
        ? el("td", { class: "left" }, row.advantages.map((x) => signed(x)).join("  "))
        : el("td", { class: "sign" }, signed(row.advantages[0] ?? 0)),
    ),
  );
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...lines));
}
