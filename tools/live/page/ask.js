/* Ask: one question, a group of answers, four ways to an advantage. */

import { chapter } from "./chapters.js";
import { byId, calm, el, fixed, mean, percent, signed, wait } from "./dom.js";
import { wordsOf } from "./options.js";
import { tokensOf } from "./tokens.js";

const SLIDERS = { "ask-G": "answers", "ask-T": "temperature", "ask-seed": "dice" };

const frame = {
  class: "frame",
  tabindex: "0",
  role: "region",
  "aria-label": "Answers and their advantages",
};

export class Ask {
  /** @param {any} app */
  constructor(app) {
    this.app = app;
    this.token = 0;
    byId("prompt").addEventListener("input", (event) => {
      app.set({ prompt: event.target.value });
    });
    for (const [id, key] of Object.entries(SLIDERS)) {
      byId(id).addEventListener("input", (event) => {
        app.set({ [key]: Number(event.target.value) });
        this.fill();
      });
      byId(id).addEventListener("change", () => this.go());
    }
    byId("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.go();
    });
  }

  /** Show what is set. */
  fill() {
    const { state } = this.app;
    if (byId("prompt").value !== state.prompt) byId("prompt").value = state.prompt;
    for (const [id, key] of Object.entries(SLIDERS)) {
      byId(id).value = state[key];
      state[key] = Number(byId(id).value); // within its range
      byId(`${id}-out`).textContent = String(state[key]);
    }
  }

  async go() {
    this.token += 1;
    const token = this.token;
    const { state, client } = this.app;
    const how = {
      prompt: state.prompt,
      G: state.answers,
      temperature: state.temperature,
      seed: state.dice,
      reward: state.reward,
      lam: state.lam,
    };
    let result;
    try {
      result = await client.call("ask", how);
    } catch (error) {
      const sum = String(error).includes("not a sum");
      byId("ask-says").textContent = sum
        ? "Please type a sum of two numbers with up to three digits, such as 47+85="
        : String(error);
      return;
    }
    if (token !== this.token) return;
    byId("ask-says").textContent = "";
    byId("ask-why").replaceChildren();
    const longest = Math.max(...result.rows.map((row) => row.tokens.length));
    const first = calm() ? longest : 1;
    for (let shown = first; shown <= longest && token === this.token; shown++) {
      const done = shown === longest;
      byId("ask-table").replaceChildren(...this.table(result, shown, done));
      if (!done) await wait(220);
    }
    if (token !== this.token) return;
    byId("ask-says").textContent = sentence(result);
    byId("ask-why").replaceChildren(why(result));
  }

  table({ rows, advantages, query }, shown, done) {
    const head = [
      el("th", {}, chapter("answer, token by token", "answers")),
      el("th", {}, "how likely"),
      el("th", {}, chapter("reward", "reward")),
      el("th", {}, chapter("GRPO", "group")),
      el("th", {}, chapter("Dr. GRPO", "group")),
      el("th", {}, chapter("RLOO", "group")),
      el("th", { class: "left" }, chapter("PPO, a token each", "gae")),
    ];
    const lines = rows.map((row, i) => {
      const logprob = row.logprobs.reduce((sum, x) => sum + x, 0);
      const cells = done
        ? [
            el("td", {}, percent(Math.exp(logprob), 1)),
            el("td", {}, fixed(row.reward, row.reward % 1 ? 2 : 0)),
            el("td", { class: "sign" }, signed(advantages.grpo[i])),
            el("td", {}, signed(advantages.drGrpo[i])),
            el("td", {}, signed(advantages.rloo[i])),
            el(
              "td",
              { class: "left" },
              row.advantages.map((x) => signed(x)).join("  "),
            ),
          ]
        : Array.from({ length: 6 }, () => el("td", {}, "·"));
      const tokens = tokensOf(row, this.app.vocabulary, "probability", shown);
      return el("tr", {}, el("td", {}, tokens), ...cells);
    });
    const caption = el(
      "p",
      { class: "help" },
      `${query.prompt} has the answer ${query.answer}. The model: ` +
        `${this.app.modelNow()}. Reward: ` +
        `${wordsOf("reward", this.app.state.reward)}. Under each token: how likely ` +
        "it was; beside it the whole answer, all of its tokens multiplied.",
    );
    const table = el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...head)),
      el("tbody", {}, ...lines),
    );
    return [caption, el("div", frame, table)];
  }
}

/** What there is to see, in words. */
function sentence({ rows, query, advantages }) {
  const rewards = rows.map((row) => row.reward);
  const right = rows.filter((row) => row.text === query.answer).length;
  const start = `${right} of ${rows.length} answers are right.`;
  if (rewards.every((r) => r === rewards[0])) {
    return (
      `${start} All have the same reward, so none is better than the others: ` +
      "every advantage is 0, and this group would teach nothing."
    );
  }
  const best = rewards.indexOf(Math.max(...rewards));
  const worst = rewards.indexOf(Math.min(...rewards));
  return (
    `${start} The group's mean reward is ${fixed(mean(rewards))}: that is what ` +
    "each answer is compared with. Above it the advantage is positive " +
    `(${signed(advantages.grpo[best])} in GRPO) and the answer would become ` +
    `likelier; below it, negative (${signed(advantages.grpo[worst])}).`
  );
}

/** The four columns by hand, for the first answer. */
function why({ rows, advantages, valueSteps }) {
  const r = rows.map((row) => row.reward);
  const m = mean(r);
  const squares = r.reduce((sum, x) => sum + (x - m) ** 2, 0);
  const std = Math.sqrt(squares / (r.length - 1));
  const others = (m * r.length - r[0]) / (r.length - 1);
  const card = (name, address, words, sum) =>
    el(
      "div",
      {},
      el("h3", {}, chapter(name, address)),
      el("p", {}, words),
      el("p", {}, el("code", {}, sum)),
    );
  const same = r.every((x) => x === r[0]);
  const scaled = same
    ? "all rewards are equal: 0"
    : `(${fixed(r[0], 3)} − ${fixed(m, 3)}) / ${fixed(std, 3)} = ` +
      signed(advantages.grpo[0]);
  const taught = valueSteps
    ? `It has learnt from ${valueSteps} steps of PPO.`
    : "It has not learnt anything yet (train with PPO first): it guesses 0 " +
      "everywhere, so all that is rewarded looks like a surprise.";
  return el(
    "div",
    { class: "why" },
    card(
      "GRPO",
      "group",
      "The reward, less the mean of the group, divided by the group's spread " +
        "(its standard deviation). First answer:",
      scaled,
    ),
    card(
      "Dr. GRPO",
      "group",
      "The same without the division, so that easy and hard questions keep their " +
        "weight.",
      `${fixed(r[0], 3)} − ${fixed(m, 3)} = ${signed(advantages.drGrpo[0], 3)}`,
    ),
    card(
      "RLOO",
      "group",
      "The reward, less the mean of the other answers: its own is left out.",
      same
        ? "all rewards are equal: 0"
        : `${fixed(r[0], 3)} − ${fixed(others, 3)} = ` + signed(advantages.rloo[0], 3),
    ),
    card(
      "PPO",
      "gae",
      "No group: a second model, the value model, guesses before each token how " +
        `the answer will end, and each token is compared with that guess. ${taught}`,
      "guesses before the first answer's tokens: " +
        `${rows[0].values.map((x) => fixed(x)).join(", ")}`,
    ),
  );
}
