/* Replay: recorded runs of the library, one or two, step by step. */

import { curve } from "./charts.js";
import { byId, chapter, el, fixed, percent } from "./dom.js";
import { groupTable } from "./tokens.js";

const SHOWN = [
  ["reward", "Mean reward", "figure/reward.html", (x) => fixed(x, 3)],
  ["kl", "KL to the reference", "figure/reference.html", (x) => fixed(x, 4)],
  ["entropy", "Entropy", "figure/policy.html", (x) => fixed(x, 3)],
  ["length", "Length, tokens", "figure/sampling.html", (x) => fixed(x, 2)],
  ["norm", "Norm of the gradient", "figure/update.html", (x) => fixed(x, 2)],
  ["equal", "Groups of equal rewards", "figure/group.html", percent],
];

export class Replay {
  /** @param {any} app */
  constructor(app) {
    this.app = app;
    const names = app.runs.map(({ name }, i) => el("option", { value: String(i) }, name));
    byId("run-a").append(...names);
    byId("run-b").append(el("option", { value: "-1" }, "nothing"), ...names.map((name) => name.cloneNode(true)));
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
      byId("replayed").replaceChildren(el("p", {}, "No runs are recorded in this page."));
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
    const points = (one, key) => (one?.metrics[key] ?? []).map((y, i) => [i + 1, y]);
    const shown = [...SHOWN.slice(0, 3), ["accuracy", "Held-out accuracy", "figure/task.html", percent]];
    return shown.map(([key, name, address, format]) => {
      const of = (one) => (key === "accuracy" ? (one?.accuracy ?? []) : points(one, key));
      const highest = key === "reward" || key === "accuracy" ? 1 : undefined;
      const help = other ? `${run.name} (full line) / ${other.name} (dashed)` : "";
      return curve({ name, help, address, format, highest, series: of(run), other: of(other), at: step });
    });
  }

  /** The numbers of a step, each with its chapter. */
  numbers(both, step) {
    const lines = SHOWN.filter(([key]) => both.some((run) => run.metrics[key])).map(([key, name, address, format]) =>
      el(
        "tr",
        {},
        el("td", {}, chapter(name, address)),
        ...both.map((run) => {
          const x = run.metrics[key]?.[step - 1];
          return el("td", {}, x === undefined || x === null ? "–" : format(x));
        }),
      ),
    );
    const head = el("tr", {}, el("th", {}, `step ${step}`), ...both.map((run) => el("th", {}, run.name)));
    return el("div", { class: "frame", tabindex: "0", role: "region", "aria-label": "Numbers of this step" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...lines)));
  }

  /** The newest recorded group at a step. */
  group(run, step) {
    const found = run.groups.filter((group) => group.step <= step).at(-1) ?? run.groups[0];
    const table = groupTable(found.rows, this.app.vocabulary, "advantage", run.algorithm === "ppo");
    return el(
      "div",
      {},
      el("h3", {}, `${run.name}: a group of step ${found.step}`),
      el("p", { class: "help" }, found.query),
      el("div", { class: "frame", tabindex: "0", role: "region", "aria-label": `Answers of ${run.name}` }, table),
    );
  }
}
