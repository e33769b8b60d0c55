/* One step of the figure: sample, judge, compare, update. */

import { AdamW } from "./adamw.js";
import { gae, groupAdvantages, whiten } from "./formulas.js";
import { Model, Network } from "./model.js";
import { distinct, likelyAnswers, LONGEST, sample, Tokenizer } from "./sampling.js";
import { drawQueries, parseQuery, randomFrom, REWARDS } from "./task.js";
import { fromBase64, fromHalves, splitParameters } from "./weights.js";

/** @typedef {import("../types").Row} Row */
/** @typedef {import("../types").Options} Options */
/** @typedef {import("../types").Architecture} Architecture */

const HELDOUT = 128; // held-out queries of an evaluation
const MAX_NORM = 1;
const VALUE_RATE = 1e-3;
const VALUE_RANGE = 0.2;

/** The scales and baselines that are compared where somebody asks. */
export const WAYS = {
  grpo: { scale: "group", baseline: "mean" },
  drGrpo: { scale: "none", baseline: "mean" },
  rloo: { scale: "none", baseline: "leave_one_out" },
};

/** How much the loss of each token of a row counts (loss_type of the library). */
const WEIGHTS = {
  grpo: (row, totals) => 1 / row.tokens.length / totals.rows,
  dapo: (row, totals) => 1 / totals.tokens,
  dr_grpo: (row, totals) => 1 / (totals.rows * LONGEST),
};

/**
 * @param {string} loss
 * @param {Row[]} rows
 * @returns {(row: Row) => number[]}
 */
export function tokenWeights(loss, rows) {
  const totals = { rows: 0, tokens: 0 };
  for (const row of rows) {
    totals.rows += row.count;
    totals.tokens += row.count * row.tokens.length;
  }
  return (row) => {
    const weight = row.count * WEIGHTS[loss](row, totals);
    return row.tokens.map(() => weight);
  };
}

/** k3 of each token; 0 or more. */
const klOf = (row) =>
  row.logprobs.map(
    (x, t) => Math.expm1(row.refLogprobs[t] - x) - row.refLogprobs[t] + x,
  );

/**
 * Mean over the tokens of all completions.
 * @param {Row[]} rows
 * @param {(row: Row) => number[]} numbersOf
 */
function tokenMean(rows, numbersOf) {
  let sum = 0;
  let count = 0;
  for (const row of rows) {
    for (const x of numbersOf(row)) sum += row.count * x;
    count += row.count * row.tokens.length;
  }
  return sum / count;
}

/** Mean over completions. */
const rowMean = (rows, numberOf) =>
  tokenMean(
    rows.map((row) => ({ ...row, tokens: [0] })),
    (row) => [numberOf(row)],
  );

export class Trainer {
  /** @param {Architecture} architecture */
  constructor(architecture) {
    this.architecture = architecture;
    this.network = new Network(architecture);
    this.tokenizer = new Tokenizer(architecture.vocabulary);
    const halves = new Uint16Array(fromBase64(architecture.weights).buffer);
    this.start = fromHalves(halves);
    this.reference = this.newModel();
    this.before = new Map(); // likely answers of the reference
    this.heldout = drawQueries(true, HELDOUT, randomFrom(0));
    this.reset();
  }

  /** A model with the weights from before training. */
  newModel() {
    const { shapes } = this.architecture;
    return new Model(this.network, splitParameters(this.start, shapes), shapes);
  }

  /** A value model: the same trunk, and a head of zeros. */
  newValueModel() {
    const { shapes, width } = this.architecture;
    const numbers = [...splitParameters(this.start, shapes)];
    numbers.push(new Float32Array(width), new Float32Array(1));
    return new Model(this.network, numbers, [...shapes, [1, width], [1]]);
  }

  /** Go back to before the first step. */
  reset() {
    this.policy?.dispose();
    this.value?.dispose();
    this.policy = this.newModel();
    this.optimizer = new AdamW(this.policy.numbers);
    this.value = null; // made when PPO asks for it
    this.valueOptimizer = null;
    this.steps = 0;
    this.valueSteps = 0;
  }

  needValue() {
    if (this.value) return;
    this.value = this.newValueModel();
    this.valueOptimizer = new AdamW(this.value.numbers);
  }

  /**
   * Draw answers of one query, and judge and compare them in four ways.
   * @param {{ prompt: string, G: number, temperature: number, seed: number,
   *   reward: string, lam: number }} how
   */
  async ask({ prompt, G, temperature, seed, reward, lam }) {
    const query = parseQuery(prompt);
    if (!query) throw new Error("not a sum");
    const random = randomFrom(seed);
    const how = { random, temperature };
    const rows = await sample(this.policy, this.tokenizer, [query.prompt], G, how);
    const rewards = rows.map((row) => REWARDS[reward](row.text, query));
    const advantages = {};
    for (const [name, { scale, baseline }] of Object.entries(WAYS)) {
      advantages[name] = await groupAdvantages(rewards, G, scale, baseline);
    }
    this.needValue();
    const guesses = await this.value.value(rows);
    const given = rows.map((row, i) => lastToken(row, rewards[i]));
    const ppo = await gae(given, guesses, 1, lam);
    rows.forEach((row, i) => {
      row.reward = rewards[i];
      row.values = guesses[i];
      row.advantages = ppo.advantages[i];
    });
    return { query, rows, advantages, valueSteps: this.valueSteps };
  }

  /**
   * Likely answers to a query: now, and before the first step.
   * @param {{ prompt: string }} how
   */
  async answers({ prompt }) {
    const query = parseQuery(prompt);
    if (!query) throw new Error("not a sum");
    const { tokenizer } = this;
    if (!this.before.has(query.prompt)) {
      const then = await likelyAnswers(this.reference, tokenizer, query.prompt);
      this.before.set(query.prompt, then);
    }
    const now = await likelyAnswers(this.policy, tokenizer, query.prompt);
    return { query, now, then: this.before.get(query.prompt) };
  }

  /** Share of held-out queries that the policy answers right, without chance. */
  async evaluate() {
    const prompts = this.heldout.map((query) => query.prompt);
    const rows = await sample(this.policy, this.tokenizer, prompts, 1);
    const right = rows.filter((row, i) => row.text === this.heldout[i].answer);
    return right.length / rows.length;
  }

  /** Sample a batch, and judge it. @param {Options} options */
  async rollout(options) {
    const random = randomFrom(1e6 * options.seed + this.steps);
    const queries = drawQueries(false, options.queries, random);
    const prompts = queries.map((query) => query.prompt);
    const G = options.algorithm === "grpo" ? options.G : 1;
    const all = await sample(this.policy, this.tokenizer, prompts, G, { random });
    const judge = REWARDS[options.reward];
    for (const row of all) row.reward = judge(row.text, queries[row.query]);
    return { queries, all, G };
  }

  /**
   * One step of GRPO or PPO; everything that the figure shows of it.
   * @param {Options} options
   */
  async step(options) {
    const { queries, all, G } = await this.rollout(options);
    const isPpo = options.algorithm === "ppo";
    let rows;
    if (isPpo) {
      rows = all;
      await this.scoreReference(rows);
      await this.compareWithValues(rows, options);
    } else {
      const rewards = all.map((row) => row.reward);
      const found = await groupAdvantages(rewards, G, options.scale, "mean");
      all.forEach((row, i) => {
        row.advantages = row.tokens.map(() => found[i]);
      });
      rows = distinct(all);
      await this.scoreReference(rows);
    }
    const update = await this.update(rows, options);
    this.steps += 1;
    const after = await this.policy.score(rows);
    rows.forEach((row, i) => {
      row.newLogprobs = after[i];
    });
    return {
      step: this.steps,
      queries,
      groups: groupsOf(rows, queries.length),
      metrics: { ...this.metricsOf(rows, options), ...update },
    };
  }

  /** Log-probs of the reference. @param {Row[]} rows */
  async scoreReference(rows) {
    const found = await this.reference.score(rows);
    rows.forEach((row, i) => {
      row.refLogprobs = found[i];
    });
  }

  /** PPO's way to an advantage. @param {Row[]} rows @param {Options} options */
  async compareWithValues(rows, { beta, lam }) {
    this.needValue();
    const guesses = await this.value.value(rows);
    const given = rows.map((row) => {
      const price = row.logprobs.map((x, t) => -beta * (x - row.refLogprobs[t]));
      price[price.length - 1] += row.reward;
      return price;
    });
    const { advantages, returns } = await gae(given, guesses, 1, lam);
    const white = await whiten(advantages);
    rows.forEach((row, i) => {
      row.values = guesses[i];
      row.returns = returns[i];
      row.advantages = white[i];
    });
  }

  /**
   * The gradient steps: of the policy, and in PPO of the value model.
   * @param {Row[]} rows
   * @param {Options} options
   */
  async update(rows, options) {
    const isPpo = options.algorithm === "ppo";
    const weights = tokenWeights(options.loss, rows);
    const beta = isPpo ? 0 : options.beta; // PPO has it in the reward
    const choice = { epsilon: options.epsilon, beta };
    // what has neither an advantage nor a price has no gradient
    const teaching = isPpo || beta > 0 ? rows : rows.filter((row) => row.advantages[0]);
    const result = { loss: 0, valueLoss: 0 };
    for (let i = 0; i < options.iterations; i++) {
      const found = await this.policy.policyGradient(teaching, weights, choice);
      if (isPpo) result.valueLoss += await this.updateValue(rows);
      this.optimizer.step(found.gradients, options.rate, MAX_NORM);
      this.policy.upload();
      result.loss += found.loss;
    }
    result.loss /= options.iterations;
    result.valueLoss /= options.iterations;
    return result;
  }

  /** @param {Row[]} rows */
  async updateValue(rows) {
    const weights = tokenWeights("dapo", rows);
    const found = await this.value.valueGradient(rows, weights, VALUE_RANGE);
    this.valueOptimizer.step(found.gradients, VALUE_RATE, MAX_NORM);
    this.value.upload();
    this.valueSteps += 1;
    return found.loss;
  }

  /** @param {Row[]} rows @param {Options} options */
  metricsOf(rows, { epsilon, algorithm }) {
    const rho = (row) => row.newLogprobs.map((x, t) => Math.exp(x - row.logprobs[t]));
    const outside = (row) => rho(row).map((x) => Number(Math.abs(x - 1) > epsilon));
    const metrics = {
      reward: rowMean(rows, (row) => row.reward),
      length: rowMean(rows, (row) => row.text.length),
      kl: tokenMean(rows, klOf),
      entropy: tokenMean(rows, (row) => row.entropy),
      outside: tokenMean(rows, outside),
    };
    if (algorithm === "grpo") metrics.equal = shareOfEqualGroups(rows);
    return metrics;
  }
}

/** A reward for each token: that of the answer, at its last one. */
const lastToken = (row, reward) =>
  row.tokens.map((_, t) => (t === row.tokens.length - 1 ? reward : 0));

/** @param {Row[]} rows @param {number} B @returns {Row[][]} */
function groupsOf(rows, B) {
  const groups = Array.from({ length: B }, () => []);
  for (const row of rows) groups[row.query].push(row);
  return groups;
}

/** Groups whose rewards are all the same: they teach nothing. @param {Row[]} rows */
function shareOfEqualGroups(rows) {
  const seen = new Map();
  for (const { query, reward } of rows) {
    if (!seen.has(query)) seen.set(query, new Set());
    seen.get(query).add(reward);
  }
  const groups = [...seen.values()];
  return groups.filter((rewards) => rewards.size === 1).length / groups.length;
}
