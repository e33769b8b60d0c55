/* Replay: recorded runs of the library, one or two, step by step. */

import { curve } from "./charts.js";
import { byId, chapter, el, fixed, percent } from "./dom.js";
import { groupTable } from "./tokens.js";

const digits = (n) => (x) => fixed(x, n);

/** @typedef {{ key: string, name: string, address: string,
 *   format: (x: number) => string, highest?: number }} Shown */

/** @type {Shown[]} */
const NUMBERS = [
  {
    key: "reward",
    name: "Mean reward",
    address: "figure/reward.html",
    format: digits(3),
    highest: 1,
  },
  {
    key: "kl",
    name: "KL to the reference",
    address: "figure/reference.html",
    format: digits(4),
  },
  {
    key: "entropy",
    name: "Entropy",
    address: "figure/policy.html",
    format: digits(3),
  },
  {
    key: "length",
    name: "Length, tokens",
    address: "figure/sampling.html",
    format: digits(2),
  },
  {
    key: "norm",
    name: "Norm of the gradient",
    address: "figure/update.html",
    format: digits(2),
  },
  {
    key: "equal",
    name: "Groups of equal rewards",
    address: "figure/group.html",
    format: percent,
  },
];

/** @type {Shown} */
const ACCURACY = {
  key: "accuracy",
  name: "Held-out accuracy",
  address: "figure/task.html",
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
    const set = (key) => (event) => {
      app.set({ [key]: Number(event.target.value) });
      this.show();
    };
    byId("run-a").addEventListener("change", set("run"));
    byId("run-b").addEventListener("change", set("against"));
    byId("run-step").addEventListener("input", set("at"));
  }

  show() {
    const { state, runs } = this.app;
    if (!runs.length) {
      byId("replayed").replaceChildren(
        el("p", {}, "No runs are recorded in this page."),
      );
      return;
    }
    const run = runs[state.run] ?? runs[0];
    const other = runs[state.against];
    const last = Math.max(run.steps, other?.steps ?? 0);
    const step = Math.min(state.at, last);
    byId("run-a").value = String(runs.indexOf(run));
    byId("run-b").value = String(other ? state.against : -1);
    byId("run-step").max = String(last);
    byId("run-step").value = String(step);
    byId("run-step-out").textContent = `${step} of ${last}`;
    const both = other ? [run, other] : [run];
    byId("replayed").replaceChildren(
      el("div", { class: "curves" }, ...this.curves(run, other, step)),
      this.numbers(both, step),
      el("div", { class: "two" }, ...both.map((one) => this.group(one, step))),
    );
  }

  curves(run, other, step) {
    const help = other ? `${run.name} (full line) / ${other.name} (dashed)` : "";
    return CURVES.map(({ key, ...shown }) => {
      const series = pointsOf(run, key);
      return curve({ ...shown, help, series, other: pointsOf(other, key), at: step });
    });
  }

  /** The numbers of a step, each with its chapter. */
  numbers(both, step) {
    const known = NUMBERS.filter(({ key }) => both.some((run) => run.metrics[key]));
    const lines = known.map(({ key, name, address, format }) => {
      const cells = both.map((run) => {
        const x = run.metrics[key]?.[step - 1];
        return el("td", {}, x === undefined || x === null ? "–" : format(x));
      });
      return el("tr", {}, el("td", {}, chapter(name, address)), ...cells);
    });
    const head = el(
      "tr",
      {},
      el("th", {}, `step ${step}`),
      ...both.map((run) => el("th", {}, run.name)),
    );
    return el(
      "div",
      {
        class: "frame",
        tabindex: "0",
        role: "region",
        "aria-label": "Numbers of this step",
      },
      el("table", {}, el("thead", {}, head), el("tbody", {}, ...lines)),
    );
  }

  /** The newest recorded group at a step. */
  group(run, step) {
    const found =
      run.groups.filter((group) => group.step <= step).at(-1) ?? run.groups[0];
    const table = groupTable(
      found.rows,
      this.app.vocabulary,
      "advantage",
      run.algorithm === "ppo",
    );
    return el(
      "div",
      {},
      el("h3", {}, `${run.name}: a group of step ${found.step}`),
      el("p", { class: "help" }, found.query),
      el(
        "div",
        {
          class: "frame",
          tabindex: "0",
          role: "region",
          "aria-label": `Answers of ${run.name}`,
        },
        table,
      ),
    );
  }
}
