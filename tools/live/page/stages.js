/* A step as a walk through the figure: which boxes light up, what stands in them, and
 * a sentence. */

import { fixed, mean, percent, signed } from "./dom.js";
import { byCount } from "./tokens.js";

const lines = (rows, of) => byCount(rows).map(of);
const timesOf = ({ count }) => (count > 1 ? ` ×${count}` : "");
const spread = (r) => {
  const m = mean(r);
  return Math.sqrt(r.reduce((sum, x) => sum + (x - m) ** 2, 0) / (r.length - 1));
};

/**
 * @param {any} result - of the worker's `step`
 * @param {number} group - which one is shown
 * @param {any} options
 */
export function stagesOf(result, group, options) {
  const rows = result.groups[group];
  const query = result.queries[group];
  const which = options.algorithm === "ppo" ? ppoStages : grpoStages;
  return which(rows, query, result, options);
}

/** What the first answer's reward is divided by, in a sum that a reader can check. */
function scaled(rows, m, s, scale) {
  const [{ reward, advantages }] = byCount(rows);
  const start = `Reward ${fixed(reward)} less ${fixed(m)}`;
  const end = `the advantage ${signed(advantages[0] ?? 0)}.`;
  if (scale === "none") return `${start} is ${end}`;
  if (scale === "batch") return `${start}, divided by the batch's spread, is ${end}`;
  return `${start}, divided by ${fixed(s)}, is ${end}`;
}

function grpoStages(rows, query, { metrics, queries }, { G, beta, scale }) {
  const rewards = rows.flatMap((row) => Array(row.count).fill(row.reward));
  const m = mean(rewards);
  const s = spread(rewards);
  const same = rewards.every((r) => r === rewards[0]);
  const comparison = same
    ? `all ${G} rewards are ${fixed(m)}: nothing to compare, so every advantage is 0.`
    : `the mean of these ${G} rewards is ${fixed(m)}, their spread ${fixed(s)}. ` +
      scaled(rows, m, s, scale);
  return [
    {
      boxes: ["q"],
      values: { q: [query.prompt] },
      says: `${queries.length} questions go in. Here is one of them: ${query.prompt}`,
    },
    {
      boxes: ["policy"],
      says: `The policy, the model that is trained, answers it ${G} times, with dice.`,
    },
    {
      boxes: ["o"],
      values: { o: lines(rows, (row) => (row.text || "(empty)") + timesOf(row)) },
      says: `Together the ${G} answers are a group; equal ones stand here once.`,
    },
    {
      boxes: ["reference", "kl"],
      values: { kl: [fixed(metrics.kl, 3)] },
      says:
        "The reference is the model from before training. The KL says how far the " +
        `policy has moved from it: ${fixed(metrics.kl, 3)} a token.`,
    },
    {
      boxes: ["reward", "r"],
      values: { r: lines(rows, (row) => fixed(row.reward, row.reward % 1 ? 2 : 0)) },
      says: "Each answer gets its reward, here by a rule.",
    },
    { boxes: ["group"], says: `${query.prompt} Group computation: ${comparison}` },
    {
      boxes: ["A"],
      values: { A: lines(rows, (row) => signed(row.advantages[0] ?? 0)) },
      says: same
        ? "Advantage 0: no answer is better than its group, none is changed."
        : "Reward less mean, divided by the spread: the advantage of each answer.",
    },
    {
      boxes: ["objective"],
      says:
        `The objective adds all of it up, and β = ${beta} times the KL: the loss ` +
        `is ${fixed(metrics.loss, 4)}.`,
    },
    {
      boxes: ["update", "policy"],
      says:
        "The update moves the weights a little: positive advantages become " +
        "likelier, negative ones less likely.",
    },
  ];
}

function ppoStages(rows, query, { metrics, queries }, { beta, lam }) {
  const row = rows[0];
  const each = (of) => row.tokens.map((_, t) => of(t));
  return [
    {
      boxes: ["q"],
      values: { q: [query.prompt] },
      says: `${queries.length} questions go in. Here is one of them: ${query.prompt}`,
    },
    {
      boxes: ["policy"],
      says: "The policy, the model that is trained, answers it once.",
    },
    {
      boxes: ["o"],
      values: { o: [row.text || "(empty)"] },
      says: `Its answer: ${row.text || "nothing"}. PPO looks at each of its tokens.`,
    },
    {
      boxes: ["reference", "kl"],
      values: { kl: each((t) => signed(row.logprobs[t] - row.refLogprobs[t])) },
      says:
        "How far has the policy moved from the model before training, at each " +
        "token?",
    },
    {
      boxes: ["reward", "r"],
      values: { r: [fixed(row.reward, row.reward % 1 ? 2 : 0)] },
      says: `The answer gets its reward: ${fixed(row.reward)}.`,
    },
    {
      boxes: ["value", "v"],
      values: { v: each((t) => fixed(row.values[t])) },
      says:
        "A second model, the value model, has guessed before each token how the " +
        "answer will end. GRPO does without it.",
    },
    {
      boxes: ["plus"],
      says: `At + the KL is taken off the reward, at a price of β = ${beta}.`,
    },
    {
      boxes: ["gae"],
      says:
        `${query.prompt}${row.text} GAE compares the reward ${fixed(row.reward)} ` +
        `with the guesses ${row.values.map((x) => fixed(x)).join(", ")} (λ = ` +
        `${lam}). What comes out is brought to mean 0 and spread 1 over all tokens ` +
        "of the step: the advantages.",
    },
    {
      boxes: ["A"],
      values: { A: each((t) => signed(row.advantages[t])) },
      says:
        "The advantages: one a token, brought to mean 0 and spread 1 over all " +
        "tokens of the step.",
    },
    {
      boxes: ["objective"],
      says:
        "The objective makes one number of it: the loss is " +
        `${fixed(metrics.loss, 4)}.`,
    },
    {
      boxes: ["update", "policy", "value"],
      says:
        "The update moves the policy, and the value model learns to guess better " +
        `(its loss: ${fixed(metrics.valueLoss, 3)}).`,
    },
  ];
}

/** The step in a sentence. @param {any} result @param {any} options */
export function summaryOf({ step, metrics, queries }, options) {
  const answers = queries.length * (options.algorithm === "grpo" ? options.G : 1);
  const sentences = [
    `Step ${step}: mean reward ${fixed(metrics.reward)} over ${answers} ` +
      `answers, KL ${fixed(metrics.kl, 3)}.`,
  ];
  if (options.reward === "brevity") {
    sentences.push(`An answer has ${fixed(metrics.length, 1)} digits on average.`);
  }
  if (options.iterations > 1) {
    const share = percent(metrics.outside, 1);
    sentences.push(`${share} of the tokens moved farther than ε = ${options.epsilon}.`);
  }
  if (options.algorithm === "grpo") {
    const equal = Math.round(metrics.equal * queries.length);
    sentences.push(
      `In ${equal} of ${queries.length} groups (${percent(metrics.equal)}) all ` +
        "rewards were equal: there is nothing to compare in those.",
    );
  }
  return sentences.join(" ");
}
