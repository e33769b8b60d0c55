/* Replay: recorded runs of the library, one or two, step by step. */

import { chapter } from "./chapters.js";
import { curve } from "./charts.js";
import { byId, el, fixed, percent } from "./dom.js";
import { COLOURS, fillColours, groupTable, mixedGroup } from "./tokens.js";

const digits = (n) => (x) => fixed(x, n);

/** @typedef {{ key: string, name: string, format: (x: number) => string,
 *   highest?: number }} Shown */

/** @type {Shown[]} */
const NUMBERS = [
  { key: "reward", name: "Mean reward", format: digits(3), highest: 1 },
  { key: "kl", name: "KL", format: digits(4) },
  { key: "entropy", name: "Entropy", format: digits(3) },
  { key: "length", name: "Length, tokens", format: digits(2) },
  { key: "norm", name: "Norm of the gradient", format: digits(2) },
  { key: "equal", name: "Groups of equal rewards", format: percent },
];

/** @type {Shown} */
const ACCURACY = {
  key: "accuracy",
  name: "Held-out accuracy",
  format: percent,
  highest: 1,
};

/** What is drawn as a curve. */
const CURVES = [...NUMBERS.slice(0, 3), ACCURACY];

/** The points of a curve. @param {any} run @param {string} key */
function pointsOf(run, key) {
  if (!run) return [];
  if (key === "accuracy") return run.accuracy;
  return (run.metrics[key] ?? []).map((y, i) => [i + 1, y]);
}

/** The groups of the newest recorded step at or before this one. */
function groupsAt(run, step) {
  const recorded = run.groups.filter((group) => group.step <= step);
  const newest = recorded.at(-1)?.step;
  return recorded.filter((group) => group.step === newest);
}

/** The group of a question; where there is none, one whose rewards differ. */
function groupOf(groups, question) {
  const found = groups.find(({ query }) => query === question);
  return found ?? groups[mixedGroup(groups.map(({ rows }) => rows))];
}

/** A table or a row of tokens may be wider than the page. */
const frame = (label, table) =>
  el(
    "div",
    { class: "frame", tabindex: "0", role: "region", "aria-label": label },
    table,
  );

export class Replay {
  /** @param {any} app */
  constructor(app) {
    this.app = app;
    const names = app.runs.map(({ name }, i) =>
      el("option", { value: String(i) }, name),
    );
    byId("run-a").append(...names);
    byId("run-b").append(
      el("option", { value: "-1" }, "nothing"),
      ...names.map((name) => name.cloneNode(true)),
    );
    fillColours("run-colour");
    this.bind("run-a", "run", Number);
    this.bind("run-b", "against", Number);
    this.bind("run-step", "at", Number);
    this.bind("run-question", "asked", String);
    this.bind("run-colour", "colour", String);
  }

  /** What is chosen here is a part of the state. */
  bind(id, key, read) {
    byId(id).addEventListener("input", (event) => {
      this.app.set({ [key]: read(event.target.value) });
      this.show();
    });
  }

  show() {
    const { state, runs } = this.app;
    if (!runs.length) {
      const none = el("p", {}, "No runs are recorded in this page.");
      byId("replayed").replaceChildren(none);
      return;
    }
    const run = runs[state.run] ?? runs[0];
    const other = runs[state.against];
    const both = other ? [run, other] : [run];
    const last = Math.max(...both.map(({ steps }) => steps));
    const step = Math.max(1, Math.min(state.at, last));
    this.fill(run, other, step, last);
    byId("replayed").replaceChildren(
      el("div", { class: "curves" }, ...this.curves(run, other, step)),
      this.numbers(both, step),
      el("div", { class: "two" }, ...both.map((one) => this.group(one, step))),
      el("p", { class: "help" }, COLOURS[state.colour].help),
    );
  }

  /** Show what is chosen. */
  fill(run, other, step, last) {
    const { state, runs } = this.app;
    byId("run-a").value = String(runs.indexOf(run));
    byId("run-b").value = String(other ? state.against : -1);
    byId("run-step").max = String(last);
    byId("run-step").value = String(step);
    byId("run-step-out").textContent = `${step} of ${last}`;
    byId("run-colour").value = state.colour;
    const groups = groupsAt(run, step);
    const questions = groups.map(({ query }) => el("option", { value: query }, query));
    byId("run-question").replaceChildren(...questions);
    byId("run-question").value = groupOf(groups, state.asked).query;
  }

  curves(run, other, step) {
    const help = other ? `${run.name} (full line) / ${other.name} (dashed)` : "";
    return CURVES.map((shown) => {
      const series = pointsOf(run, shown.key);
      const beside = pointsOf(other, shown.key);
      return curve({ ...shown, help, series, other: beside, at: step });
    });
  }

  /** The numbers of a step, each with its chapter. */
  numbers(both, step) {
    const known = NUMBERS.filter(({ key }) => both.some((run) => run.metrics[key]));
    const lines = known.map(({ key, name, format }) => {
      const cells = both.map((run) => {
        const x = run.metrics[key]?.[step - 1];
        return el("td", {}, x === undefined || x === null ? "–" : format(x));
      });
      return el("tr", {}, el("td", {}, chapter(name, key)), ...cells);
    });
    const names = both.map((run) => el("th", {}, run.name));
    const head = el("tr", {}, el("th", {}, `step ${step}`), ...names);
    const table = el("table", {}, el("thead", {}, head), el("tbody", {}, ...lines));
    return frame("Numbers of this step", table);
  }

  /** The answers to the question that is chosen. */
  group(run, step) {
    const { state, vocabulary } = this.app;
    const found = groupOf(groupsAt(run, step), state.asked);
    const isPpo = run.algorithm === "ppo";
    const table = groupTable(found.rows, vocabulary, state.colour, isPpo);
    return el(
      "div",
      {},
      el("h3", {}, `${run.name}: a group of step ${found.step}`),
      el("p", { class: "help" }, found.query),
      frame(`Answers of ${run.name}`, table),
    );
  }
}
