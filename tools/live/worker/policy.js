/* The policy: a Llama of four layers, as transformers computes it.
 *
 * The same lines serve twice. To sample and to score, each small part is compiled by
 * itself: compiled as a whole, the pass would compute norms and activations again
 * inside the products that read them, and take four times as long. The gradient wants
 * the whole: there the parts are plain, inside one compiled function. */

import { jit, nn, np, tensor } from "./arrays.js";

/** @typedef {import("../types").Tensor} Tensor */
/** @typedef {import("../types").Architecture} Architecture */
/** @typedef {import("../types").Parts} Parts */
/** @typedef {{ cos: Tensor, sin: Tensor, mask: Tensor }} Positions */

const PER_LAYER = 9; // q, k, v, o, gate, up, down, norm, norm

/**
 * The parts of the forward pass. R rows of L tokens stand below each other, N = R L,
 * with D numbers a token: [N, D].
 * @param {Architecture} model
 * @param {number} L - tokens of a row
 * @returns {Parts}
 */
export function plainParts(model, L) {
  const H = model.heads;
  const D = model.width;
  return {
    /** The table's row of each token; [N, V] one-hot -> [N, D]. */
    embed(x, table) {
      return np.matmul(x, table);
    },
    /** RMSNorm; [N, D] -> [N, D]. */
    norm(x, gain) {
      const square = np.mean(x.ref.mul(x.ref), -1, { keepdims: true });
      const scale = np.reciprocal(np.sqrt(square.add(model.eps)));
      return x.mul(scale).mul(gain);
    },
    /** A linear layer without bias; [N, D] -> [N, E]. */
    linear(x, weight) {
      return np.matmul(x, np.transpose(weight));
    },
    /** Cut into heads; [N, D] -> [R, H, L, D / H]. */
    split(x) {
      const heads = x.reshape([x.shape[0] / L, L, H, D / H]);
      return np.transpose(heads, [0, 2, 1, 3]);
    },
    /** The same, each pair of numbers turned by its position (RoPE). */
    turn(x, cos, sin) {
      const [a, b] = np.split(x.reshape([x.shape[0] / L, L, H, D / H]), 2, -1);
      const left = a.ref.mul(cos.ref).sub(b.ref.mul(sin.ref));
      const right = b.mul(cos).add(a.mul(sin));
      return np.transpose(np.concatenate([left, right], -1), [0, 2, 1, 3]);
    },
    /** Products of queries and keys; -> [R, H, L, L]. */
    match(q, k) {
      return np.matmul(q, np.transpose(k, [0, 1, 3, 2]));
    },
    /** Softmax over the tokens up to each one. */
    attend(scores, mask) {
      const scale = (D / H) ** -0.5;
      return nn.softmax(scores.mul(scale).add(mask), -1);
    },
    /** Add up the values of the tokens attended to; -> [R, H, L, D / H]. */
    mix(attention, v) {
      return np.matmul(attention, v);
    },
    /** Put the heads together; -> [N, D]. */
    join(x) {
      const N = x.shape[0] * L;
      return np.transpose(x, [0, 2, 1, 3]).reshape([N, D]);
    },
    /** SwiGLU. */
    gate(a, b) {
      return nn.silu(a).mul(b);
    },
    add(a, b) {
      return a.add(b);
    },
    logSoftmax(x) {
      return nn.logSoftmax(x, -1);
    },
  };
}

/** Each part compiled by itself. @param {Parts} parts @returns {Parts} */
export function compiledParts(parts) {
  const entries = Object.entries(parts);
  return Object.fromEntries(entries.map(([name, part]) => [name, jit(part)]));
}

/**
 * Angles of RoPE, and what hides the tokens to come. Rows are padded on the right, and
 * no token looks to the right: padding needs no mask of its own.
 * @param {Architecture} model
 * @param {number} L
 * @returns {Positions}
 */
export function positionsOf(model, L) {
  const half = model.width / model.heads / 2;
  const cos = new Float32Array(L * half);
  const sin = new Float32Array(L * half);
  const mask = new Float32Array(L * L);
  for (let t = 0; t < L; t++) {
    for (let i = 0; i < half; i++) {
      const angle = t / model.theta ** (i / half);
      cos[t * half + i] = Math.cos(angle);
      sin[t * half + i] = Math.sin(angle);
    }
    mask.fill(-1e9, t * L + t + 1, (t + 1) * L);
  }
  const shape = [1, L, 1, half];
  return {
    cos: tensor(cos, shape),
    sin: tensor(sin, shape),
    mask: tensor(mask, [1, 1, L, L]),
  };
}

/**
 * The last layer's states, [N, D]. Consumes the parameters and `x`.
 * @param {Parts} parts
 * @param {Architecture} model
 * @param {Tensor[]} parameters
 * @param {Tensor} x - one-hot tokens, [N, V]
 * @param {Positions} at
 * @returns {Tensor}
 */
export function trunk(parts, model, parameters, x, at) {
  const [table, ...layers] = parameters;
  let h = parts.embed(x, table);
  for (let layer = 0; layer < model.layers; layer++) {
    const start = layer * PER_LAYER;
    const own = layers.slice(start, start + PER_LAYER);
    const [wq, wk, wv, wo, wGate, wUp, wDown, before, between] = own;

    const a = parts.norm(h.ref, before);
    const q = parts.turn(parts.linear(a.ref, wq), at.cos.ref, at.sin.ref);
    const k = parts.turn(parts.linear(a.ref, wk), at.cos.ref, at.sin.ref);
    const v = parts.split(parts.linear(a, wv));
    const attention = parts.attend(parts.match(q, k), at.mask.ref);
    h = parts.add(h, parts.linear(parts.join(parts.mix(attention, v)), wo));

    const b = parts.norm(h.ref, between);
    const gated = parts.gate(parts.linear(b.ref, wGate), parts.linear(b, wUp));
    h = parts.add(h, parts.linear(gated, wDown));
  }
  return parts.norm(h, layers[model.layers * PER_LAYER]);
}

/**
 * Log-probabilities of every next token, [N, V]; the last table is the first one.
 * @param {Parts} parts
 * @param {Architecture} model
 * @param {Tensor[]} parameters
 * @param {Tensor} x
 * @param {Positions} at
 * @returns {Tensor}
 */
export function logprobs(parts, model, parameters, x, at) {
  const table = parameters[0].ref;
  const states = trunk(parts, model, parameters, x, at);
  return parts.logSoftmax(parts.linear(states, table));
}

/**
 * The value before each next token, [N]; two parameters more than the trunk.
 * @param {Parts} parts
 * @param {Architecture} model
 * @param {Tensor[]} parameters - of the trunk, then weight [1, D] and bias [1]
 * @param {Tensor} x
 * @param {Positions} at
 * @returns {Tensor}
 */
export function values(parts, model, parameters, x, at) {
  const [weight, bias] = parameters.slice(-2);
  const states = trunk(parts, model, parameters.slice(0, -2), x, at);
  return parts.add(parts.linear(states, weight), bias).reshape([-1]);
}
