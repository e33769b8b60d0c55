/* Curves and bars. */

import { chapter } from "./chapters.js";
import { el, percent, svg } from "./dom.js";

const W = 200;
const H = 80;

/**
 * A curve, and perhaps a second one beside it.
 * @param {{ key: string, name: string, help: string, format: (x: number) => string,
 *   highest?: number, series: [number, number][], other?: [number, number][],
 *   last?: number, at?: number }} what - points are (step, number)
 */
export function curve(what) {
  const { key, name, help, format, series, other = [], at } = what;
  const all = [...series, ...other];
  const last = Math.max(what.last ?? 10, ...all.map(([x]) => x));
  const highest = what.highest ?? Math.max(0.01, ...all.map(([, y]) => 1.15 * y));
  const x = (step) => (W * step) / last;
  const y = (number) => H - (H * Math.min(number, highest)) / highest;
  const path = (points, kind) => {
    const d = points.map(
      ([s, n], i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(n).toFixed(1)}`,
    );
    const alone = points.length === 1; // a dot
    return svg("path", {
      d: d.join("") + (alone ? "h.01" : ""),
      class: alone ? `${kind} alone` : kind,
      "stroke-linecap": "round",
    });
  };
  const shapes = [0, H / 2, H].map((level) =>
    svg("path", { d: `M0 ${level}H${W}`, class: "grid" }),
  );
  if (at) shapes.push(svg("path", { d: `M${x(at)} 0V${H}`, class: "at" }));
  if (other.length) shapes.push(path(other, "then"));
  if (series.length) shapes.push(path(series, "now"));
  const tick = (where, words) => el("span", { class: where }, words);
  const value = series.length ? format(atStep(series, at)) : "–";
  const beside = other.length ? ` / ${format(atStep(other, at))}` : "";
  const label = `${name}: ${value}${beside}, over ${series.length} points`;
  const picture = { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none" };
  return el(
    "div",
    { class: "curve" },
    el(
      "div",
      { class: "name" },
      chapter(name, key),
      el("span", { class: "value" }, value + beside),
    ),
    el(
      "div",
      { class: "plot" },
      el(
        "div",
        { class: "ticks", "aria-hidden": "true" },
        tick("highest", all.length ? format(highest) : ""),
        tick("zero", "0"),
        tick("first", "step 0"),
        tick("last", String(last)),
      ),
      svg("svg", { ...picture, role: "img", "aria-label": label }, ...shapes),
    ),
    help ? el("small", {}, help) : null,
  );
}

/** The number at a step, or the newest one before it; without a step the newest. */
function atStep(series, at) {
  const before = at === undefined ? series : series.filter(([step]) => step <= at);
  return (before.at(-1) ?? series[0])[1];
}

/**
 * How likely each answer is now, and was before the first step.
 * @param {{ text: string, p: number }[]} now
 * @param {{ text: string, p: number }[]} then
 * @param {string} right
 */
export function beforeAndAfter(now, then, right) {
  const before = new Map(then.map(({ text, p }) => [text, p]));
  const after = new Map(now.map(({ text, p }) => [text, p]));
  const texts = [...new Set([...after.keys(), ...before.keys()])];
  const most = (text) => Math.max(before.get(text) ?? 0, after.get(text) ?? 0);
  texts.sort((a, b) => most(b) - most(a));
  const rows = texts.slice(0, 6).map((text) => {
    const [p, q] = [after.get(text) ?? 0, before.get(text) ?? 0];
    const words = `${percent(q, 1)} → ${percent(p, 1)}`;
    const bar = (kind, share) =>
      el("div", { class: kind, style: `width:${100 * share}%` });
    return el(
      "div",
      { class: "answer" },
      el("code", {}, text || "(empty)", text === right ? " ✓" : ""),
      el(
        "div",
        { class: "bars", "aria-hidden": "true" },
        bar("then", q),
        bar("now", p),
      ),
      el("span", {}, words),
    );
  });
  const key = el(
    "p",
    { class: "help" },
    el("span", { class: "key then" }),
    "before the first step",
    el("span", { class: "key now" }),
    "now",
  );
  return el("div", {}, el("div", { class: "answers" }, ...rows), key);
}
