/* Train: step by step, or as it runs. */

import { beforeAndAfter, curve } from "./charts.js";
import { byId, calm, el, fixed, percent, wait } from "./dom.js";
import { Figure } from "./figure.js";
import { FIELDS, wordsOf } from "./options.js";
import { stagesOf, summaryOf } from "./stages.js";
import { NEW_START, OPTIONS, optionsOf, parseChanges } from "./state.js";
import { COLOURS, fillColours, groupTable, mixedGroup } from "./tokens.js";

const EVERY = 10; // steps between evaluations
const PAUSE = { slow: 1100, fast: 0 }; // milliseconds a box
const BREATH = 30; // milliseconds between two steps, for the page to be drawn
export const READY = "Ready: the model from before training. Press Step, or Play.";
const RUNNING = "It trains. Pause, to look at a step.";

/** @type {{ key: string, name: string, help: string, format: (x: number) => string,
 *   highest?: number }[]} */
const CURVES = [
  {
    key: "reward",
    name: "Reward",
    help: "Mean over the answers of a step. What training pushes up.",
    format: fixed,
    highest: 1,
  },
  {
    key: "accuracy",
    name: "Held-out accuracy",
    help:
      "Likeliest answers to 128 questions that are never trained on, every ten steps: " +
      "how many are right.",
    format: percent,
    highest: 1,
  },
  {
    key: "kl",
    name: "KL",
    help:
      "Distance from the model before training, a token, before the step's update. β " +
      "keeps it small.",
    format: (x) => fixed(x, 3),
  },
  {
    key: "entropy",
    name: "Entropy",
    help: "How undecided the model is, on the questions of the step.",
    format: (x) => fixed(x, 3),
  },
];

export class Train {
  /** @param {any} app */
  constructor(app) {
    this.app = app;
    this.figure = new Figure(byId("figure"), app.figures);
    this.intro = byId("caption").textContent;
    this.playing = false;
    this.looping = false;
    this.busy = false;
    this.walking = false;
    this.suggested = []; // settings that the hint asks to change
    this.pauseAt = NaN; // the step after which Play pauses
    this.clear();
    this.makeFields();
    byId("step").addEventListener("click", () =>
      this.busy ? this.figure.hurry() : this.one(),
    );
    byId("speed").addEventListener("change", () => {
      this.chosen = true;
    });
    byId("play").addEventListener("click", () => this.toggle());
    byId("reset").addEventListener("click", () => this.reset());
    byId("link").addEventListener("click", () => this.copyLink());
    byId("group").addEventListener("change", (event) => {
      app.set({ group: Number(event.target.value) });
      this.showGroup();
      this.fillFigure(0);
    });
    fillColours("colour");
    byId("colour").addEventListener("change", (event) => {
      app.set({ colour: event.target.value });
      this.showGroup();
    });
    byId("watched").addEventListener("change", (event) => {
      app.set({ watched: event.target.value });
      this.showWatched();
    });
  }

  /** Forget what the steps have shown. */
  clear() {
    this.series = Object.fromEntries(CURVES.map(({ key }) => [key, []]));
    this.steps = 0;
    this.begun = 0; // steps whose options are settled: one more while a step runs
    this.result = null;
    this.initial = null; // the options of the first step
  }

  /** The group that is shown: the one that was chosen, or one with something to see. */
  get group() {
    const { group } = this.app.state;
    const { groups } = this.result;
    return group in groups ? group : mixedGroup(groups);
  }

  makeFields() {
    const fields = FIELDS.map(({ key, label, help, choices, only }) => {
      const id = `option-${key}`;
      const options = choices.map(([value, words]) =>
        el("option", { value: String(value) }, words),
      );
      const select = el("select", { id, "aria-describedby": `${id}-help` }, ...options);
      select.addEventListener("change", () => {
        this.change(key, choices[byId(id).selectedIndex][0]);
      });
      return el(
        "div",
        { class: "field", "data-only": only },
        el("label", { for: id }, label),
        select,
        el("small", { id: `${id}-help` }, help),
      );
    });
    byId("options").append(...fields);
    byId("options").addEventListener("submit", (event) => event.preventDefault());
  }

  /** One setting changes: at once, or with a new start where it has to be one. */
  change(key, value) {
    const { app } = this;
    const patch = { [key]: value };
    if (key === "algorithm") patch.loss = value === "ppo" ? "dapo" : "grpo";
    const anew = NEW_START.includes(key);
    if (!anew && this.begun) {
      const changes = app.state.changes ? `${app.state.changes};` : "";
      patch.changes = `${changes}${this.begun}:${key}=${value}`;
    }
    app.set(patch);
    this.fill();
    if (!anew && this.steps)
      this.app.say(`Set. It holds from step ${this.begun + 1} on.`);
    if (!this.suggested.includes(key)) this.hideHint();
    if (anew) this.reset();
  }

  /** The hint of an experiment that is not set up any more. */
  hideHint() {
    byId("hint").hidden = true;
  }

  /** Show what is set. */
  fill() {
    const { state } = this.app;
    for (const { key, choices, only } of FIELDS) {
      const select = byId(`option-${key}`);
      select.selectedIndex = choices.findIndex(([value]) => value === state[key]);
      select.closest(".field").hidden = Boolean(only) && only !== state.algorithm;
    }
    byId("summary").textContent = this.summary();
    byId("colour").value = state.colour;
    byId("watched").value = state.watched;
    byId("count").textContent = String(this.steps);
    byId("play").textContent = this.playing ? "Pause" : "Play";
    byId("play").setAttribute("aria-pressed", String(this.playing));
    byId("reset").disabled = !this.app.ready || (this.busy && !this.playing);
    byId("step").disabled = !this.app.ready || (this.busy && !this.walking);
    byId("step").textContent = this.walking ? "Skip" : "Step";
    byId("play").disabled = !this.app.ready || (this.busy && !this.playing);
  }

  summary() {
    const { state } = this.app;
    const size = state.algorithm === "grpo" ? `, G = ${state.G}` : "";
    return (
      `${wordsOf("algorithm", state.algorithm)}${size}, ` +
      `reward ${wordsOf("reward", state.reward)}, β = ${state.beta}, learning rate ` +
      `${wordsOf("rate", state.rate)}`
    );
  }

  /**
   * Do one thing at a time, and say what went wrong.
   * @param {() => Promise<void>} work
   */
  async alone(work) {
    while (this.busy) await wait(20);
    this.busy = true;
    this.fill();
    try {
      await work();
    } catch (error) {
      this.playing = false;
      this.app.say(String(error));
    }
    this.busy = false;
    this.show();
  }

  /** Back to the first model. */
  async reset() {
    this.playing = false;
    await this.alone(async () => {
      this.clear();
      this.app.set({ steps: 0, changes: "", group: -1 });
      this.figure.show(this.app.state.algorithm);
      byId("caption").textContent = this.intro;
      byId("group").replaceChildren();
      this.show();
      await this.app.client.call("reset");
      await this.measure();
      this.app.say(READY);
    });
  }

  /** Accuracy, and the question that is watched. */
  async measure() {
    this.series.accuracy.push([this.steps, await this.app.client.call("evaluate")]);
    await this.showWatched();
  }

  async one() {
    await this.alone(async () => {
      if (!this.playing) this.app.say(`Step ${this.steps + 1} is being computed …`);
      await this.take(PAUSE[byId("speed").value]);
    });
  }

  /** Play, or pause. */
  async toggle() {
    this.playing = !this.playing;
    if (!this.chosen) byId("speed").value = "fast"; // box by box is for single steps
    if (this.playing) this.app.say(RUNNING);
    this.fill();
    if (this.looping) return;
    this.looping = true;
    while (this.playing) {
      await this.one();
      if (this.steps === this.pauseAt) this.playing = false;
      await wait(BREATH);
    }
    this.looping = false;
    this.sumUp();
    this.fill();
  }

  /** Say what the last step has brought. */
  sumUp() {
    if (this.result) this.app.say(summaryOf(this.result, this.used));
  }

  /** One step, shown box by box with a pause, or at once. @param {number} pause */
  async take(pause) {
    const { app } = this;
    const patch = this.planned?.get(this.steps);
    if (patch) app.set(patch);
    const options = optionsOf(app.state);
    this.initial ??= options;
    this.begun = this.steps + 1;
    this.showGroup();
    this.result = await app.client.call("step", options);
    this.used = options;
    this.steps = this.result.step;
    for (const key of ["reward", "kl", "entropy"]) {
      this.series[key].push([this.steps, this.result.metrics[key]]);
    }
    app.set({ steps: this.steps, group: -1 });
    this.fillGroups();
    this.walking = pause > 0 && !calm();
    if (this.walking) app.say(`Step ${this.steps}, box by box.`);
    this.show();
    await this.fillFigure(pause);
    this.walking = false;
    if (this.steps % EVERY === 0) await this.measure();
    else await this.showWatched();
    if (!this.playing || pause) this.sumUp();
    this.show();
  }

  /**
   * Run to a step, as a link asks for.
   * @param {{ steps: number, changes: string, group: number }} link
   */
  async goTo({ steps, changes, group }) {
    await this.alone(async () => {
      this.planned = parseChanges(changes);
      while (this.steps < steps) {
        this.app.say(`Going to step ${steps} of the link: ${this.steps + 1} …`);
        await this.take(0);
      }
      this.planned = null;
      this.app.set({ group });
      byId("group").value = String(this.group);
      await this.fillFigure(0);
      this.sumUp();
    });
  }

  /** @param {number} pause */
  fillFigure(pause) {
    if (!this.result) return this.figure.show(this.app.state.algorithm);
    const stages = stagesOf(this.result, this.group, this.used);
    const say = (sentence) => {
      byId("caption").textContent = sentence;
    };
    const compared = stages.find(
      ({ boxes }) => boxes[0] === "group" || boxes[0] === "gae",
    );
    return this.figure.run(stages, pause, say).then(() => say(compared.says));
  }

  show() {
    this.fill();
    this.showCurves();
    this.showGroup();
  }

  showCurves() {
    const curves = CURVES.map((shown) =>
      curve({ ...shown, series: this.series[shown.key] }),
    );
    byId("curves").replaceChildren(...curves);
  }

  async showWatched() {
    const place = byId("before-after");
    try {
      const { query, now, then } = await this.app.client.call("answers", {
        prompt: this.app.state.watched,
      });
      const side = query.heldout
        ? "held out: never trained on"
        : "may come up in training";
      place.replaceChildren(
        el("p", { class: "help" }, `${query.prompt}${query.answer} (${side})`),
        beforeAndAfter(now, then, query.answer),
      );
    } catch (error) {
      if (!String(error).includes("not a sum")) throw error;
      place.replaceChildren(
        el("p", { class: "help" }, "Please type a sum, such as 47+85="),
      );
    }
  }

  fillGroups() {
    const { queries, groups } = this.result;
    const options = queries.map((query, i) => {
      const count = (rows) => rows.reduce((sum, row) => sum + row.count, 0);
      const right = count(groups[i].filter((row) => row.text === query.answer));
      const words = `${right} of ${count(groups[i])} right`;
      return el("option", { value: String(i) }, `${query.prompt} (${words})`);
    });
    byId("group").replaceChildren(...options);
    byId("group").value = String(this.group);
  }

  showGroup() {
    const colour = byId("colour").value;
    byId("legend").textContent = COLOURS[colour].help;
    const isPpo = this.app.state.algorithm === "ppo";
    byId("group-help").textContent = isPpo
      ? "PPO has one answer to each question, so there is no group; each token has " +
        "an advantage of its own."
      : "All answers to one question. They share a baseline, the mean of their " +
        "rewards, because it is the same question: what is left says which answer " +
        "was better, not whether the question was easy.";
    if (!this.result) {
      const words = this.begun ? "The first step is being computed …" : "No step yet.";
      byId("answers").replaceChildren(el("p", { class: "help" }, words));
      return;
    }
    const rows = this.result.groups[this.group];
    byId("answers").replaceChildren(
      groupTable(rows, this.app.vocabulary, colour, this.used.algorithm === "ppo"),
    );
  }

  async copyLink() {
    const address = this.app.address();
    try {
      await navigator.clipboard.writeText(address);
      this.app.say("The link is copied: whoever opens it sees this step.");
    } catch {
      this.app.say(`The link to this step: ${address}`);
    }
  }

  /**
   * Set something up and start anew.
   * @param {Record<string, any>} options
   * @param {Node[]} hint - what to do, and what there is to see
   * @param {string[]} suggested - the settings that it asks to change
   * @param {number} pauseAt - the step after which Play pauses, or NaN
   */
  async prepare(options, hint, suggested, pauseAt) {
    const defaults = this.app.defaults;
    const fresh = Object.fromEntries(OPTIONS.map((key) => [key, defaults[key]]));
    this.app.set({ ...fresh, ...options });
    this.suggested = suggested;
    this.pauseAt = pauseAt;
    const close = { type: "button", class: "plain", onclick: () => this.hideHint() };
    byId("hint").replaceChildren(...hint, el("button", close, "Close"));
    byId("hint").hidden = false;
    this.app.open("train");
    await this.reset();
    byId("play").focus();
  }
}
