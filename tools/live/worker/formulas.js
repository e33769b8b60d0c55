/* The formulas of the figure, in the arrays of jax-js: advantages in float64, as in
 * the library, losses in float32, with a gradient. */

import { dispose, np, tensor } from "./arrays.js";
import { logprobs, plainParts, positionsOf, values } from "./policy.js";

/** @typedef {import("../types").Tensor} Tensor */
/** @typedef {import("../types").Architecture} Architecture */

const EPS = 1e-4; // added to the standard deviation of rewards
const LARGEST = 20; // of log rho and of d in k3: e^20 = 4.9e8

/** Sum of squares over the degrees of freedom, rooted; over one axis. */
const deviation = (distances, axis, degrees) => {
  const squares = np.sum(distances.ref.mul(distances), axis, { keepdims: true });
  return np.sqrt(squares.mul(1 / degrees));
};

/**
 * Compare each completion with its group (DeepSeekMath 2402.03300, sec. 4.1.2).
 * @param {number[]} rewards - [N], groups contiguous
 * @param {number} G - completions of a group
 * @param {string} scale - scale_rewards: "group", "batch" or "none"
 * @param {string} baseline - "mean" or "leave_one_out"
 * @returns {Promise<Float64Array>} [N]
 */
export async function groupAdvantages(rewards, G, scale, baseline) {
  const B = rewards.length / G;
  const r = tensor(new Float64Array(rewards), [B, G]);
  const mean = np.mean(r.ref, 1, { keepdims: true });
  let distance = r.ref.sub(mean.ref);
  let divisor = np.ones([B, 1], { dtype: np.float64 });
  if (scale === "group") {
    divisor.dispose();
    divisor = deviation(distance.ref, 1, G - 1).add(EPS);
  } else if (scale === "batch") {
    divisor.dispose();
    const all = r.ref.reshape([1, B * G]);
    const apart = all.ref.sub(np.mean(all, 1, { keepdims: true }));
    divisor = deviation(apart, 1, B * G - 1).add(EPS);
  }
  if (baseline === "leave_one_out") {
    const others = mean.ref.add(mean.ref.sub(r.ref).mul(1 / (G - 1)));
    distance.dispose();
    distance = r.ref.sub(others);
  }
  mean.dispose();
  const highest = np.max(r.ref, 1, { keepdims: true });
  const varies = highest.greater(np.min(r, 1, { keepdims: true }));
  return np.where(varies, distance.div(divisor), 0).data();
}

/**
 * Generalised advantage estimation (Schulman et al. 2016, 1506.02438, eq. 16).
 * @param {number[][]} rewards - [N, T] per token, KL included; rows may be shorter
 * @param {number[][]} guesses - [N, T], V before each token
 * @param {number} gamma
 * @param {number} lam
 * @returns {Promise<{ advantages: number[][], returns: number[][] }>}
 */
export async function gae(rewards, guesses, gamma, lam) {
  const N = rewards.length;
  const T = Math.max(...rewards.map((row) => row.length));
  const r = columnsOf(rewards, T);
  const v = columnsOf(guesses, T);
  const real = columnsOf(
    rewards.map((row) => row.map(() => 1)),
    T,
  );
  const found = [];
  let advantage = np.zeros([N], { dtype: np.float64 });
  let next = np.zeros([N], { dtype: np.float64 });
  for (let t = T - 1; t >= 0; t--) {
    const delta = r[t].add(next.mul(gamma)).sub(v[t].ref);
    advantage = delta.add(advantage.mul(gamma * lam)).mul(real[t]);
    found[t] = advantage.ref;
    next = v[t];
  }
  dispose([advantage, next]);
  const columns = [];
  for (const column of found) columns.push(await column.data());
  const advantages = rewards.map((row, i) => row.map((_, t) => columns[t][i]));
  const returns = advantages.map((row, i) => row.map((A, t) => A + guesses[i][t]));
  return { advantages, returns };
}

/** Columns of rows that may be shorter than T; 0 beyond. */
function columnsOf(rows, T) {
  return Array.from({ length: T }, (_, t) =>
    tensor(new Float64Array(rows.map((row) => row[t] ?? 0)), [rows.length]),
  );
}

/**
 * Shift to mean 0 and scale to standard deviation 1, over all tokens.
 * @param {number[][]} rows
 * @returns {Promise<number[][]>}
 */
export async function whiten(rows) {
  const flat = new Float64Array(rows.flat());
  const same = flat.every((x) => x === flat[0]);
  const x = tensor(flat, [1, flat.length]);
  const distance = x.ref.sub(np.mean(x, 1, { keepdims: true }));
  const std = deviation(distance.ref, 1, Math.max(1, flat.length - 1)).add(1e-8);
  const white = await distance.div(std).data();
  if (same) white.fill(0);
  let i = 0;
  return rows.map((row) => row.map(() => white[i++]));
}

/**
 * The loss of the policy, in the shape of all of GRPO's and PPO's variants: a weight
 * for each token, times the clipped surrogate (PPO 1707.06347, eq. 7) and the price of
 * the KL (k3; DeepSeekMath 2402.03300, eq. 3 and 4).
 * @param {Architecture} model
 * @param {number} L - tokens of a row
 * @param {Tensor[]} parameters
 * @param {import("../types").PolicyBatch} batch - [N] each, x and target [N, V]
 * @returns {Tensor} one number
 */
export function policyLoss(model, L, parameters, batch) {
  const at = positionsOf(model, L);
  const all = logprobs(plainParts(model, L), model, parameters, batch.x, at);
  dispose(at);
  const lp = np.sum(all.mul(batch.target), -1);

  const rho = np.exp(np.minimum(lp.ref.sub(batch.old), LARGEST));
  const clipped = np.clip(rho.ref, batch.low, batch.high);
  const A = batch.advantages;
  const gain = np.minimum(rho.mul(A.ref), clipped.mul(A));

  const d = np.minimum(batch.reference.sub(lp), LARGEST);
  const k3 = np.expm1(d.ref).sub(d);
  return np.sum(batch.weights.mul(k3.mul(batch.beta).sub(gain)));
}

/**
 * The clipped loss of the value model (PPO2; InstructGPT 2203.02155).
 * @param {Architecture} model
 * @param {number} L - tokens of a row
 * @param {Tensor[]} parameters
 * @param {import("../types").ValueBatch} batch
 * @returns {Tensor} one number
 */
export function valueLoss(model, L, parameters, batch) {
  const at = positionsOf(model, L);
  const v = values(plainParts(model, L), model, parameters, batch.x, at);
  dispose(at);
  const lowest = batch.old.ref.sub(batch.range.ref);
  const highest = batch.old.add(batch.range);
  const clipped = np.clip(v.ref, lowest, highest);
  const error = v.sub(batch.returns.ref);
  const clippedError = clipped.sub(batch.returns);
  const worse = np.maximum(error.ref.mul(error), clippedError.ref.mul(clippedError));
  return np.sum(batch.weights.mul(worse)).mul(0.5);
}
