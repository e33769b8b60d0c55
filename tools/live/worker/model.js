/* A model with its weights: numbers for the optimiser, arrays for everything else. */

import { dispose, jit, scalar, tensor, valueAndGrad } from "./arrays.js";
import { policyLoss, valueLoss } from "./formulas.js";
import { compiledParts, logprobs, plainParts, positionsOf, values } from "./policy.js";

/** @typedef {import("../types").Tensor} Tensor */
/** @typedef {import("../types").Architecture} Architecture */
/** @typedef {import("../types").Row} Row */

/* Each number of rows, and each width, has to be compiled once, which takes a second:
 * so there are few of them, and what is larger is computed in pieces. */
const SIZES = [16, 32, 64];
const WIDTH = 10; // the tokens read of "12+34=" and an answer

/** Rows to compute where n are wanted. @param {number} n */
const paddedSize = (n) => SIZES.find((size) => size >= n) ?? SIZES.at(-1);

/** Tokens of a row to compute. @param {number[][]} rows */
const paddedWidth = (rows) => Math.max(WIDTH, ...rows.map((row) => row.length));

/**
 * Rows in pieces of the largest size.
 * @template T
 * @param {T[]} rows
 */
function piecesOf(rows) {
  const size = SIZES.at(-1);
  const count = Math.ceil(rows.length / size);
  return Array.from({ length: count }, (_, i) => rows.slice(i * size, (i + 1) * size));
}

/**
 * Token ids as one-hot rows, [R L, V]; all 0 where `rows` has none.
 * @param {(number | undefined)[][]} rows
 * @param {number} R
 * @param {number} L
 * @param {number} V
 */
function oneHot(rows, R, L, V) {
  const data = new Float32Array(R * L * V);
  rows.forEach((row, i) => {
    row.forEach((id, t) => {
      if (id !== undefined && t < L) data[(i * L + t) * V + id] = 1;
    });
  });
  return tensor(data, [R * L, V]);
}

/** The tokens that a model reads of a row; the last one is only a target. */
const inputsOf = (row) => [...row.prompt, ...row.tokens].slice(0, -1);

/** Where the first token of a completion is predicted. */
const startOf = (row) => row.prompt.length - 1;

/** What is compiled for one architecture, shared by all models of it. */
export class Network {
  /** @param {Architecture} model */
  constructor(model) {
    this.model = model;
    this.vocabularySize = model.vocabulary.length;
    this.found = new Map();
  }

  /** What belongs to rows of L tokens. @param {number} L */
  of(L) {
    if (!this.found.has(L)) this.found.set(L, this.make(L));
    return this.found.get(L);
  }

  /** @param {number} L */
  make(L) {
    const { model } = this;
    const gradientOf = (loss) =>
      jit(valueAndGrad((parameters, batch) => loss(model, L, parameters, batch)));
    return {
      parts: compiledParts(plainParts(model, L)),
      positions: positionsOf(model, L),
      policyGradient: gradientOf(policyLoss),
      valueGradient: gradientOf(valueLoss),
    };
  }
}

export class Model {
  /**
   * @param {Network} network
   * @param {Float32Array[]} numbers - kept and changed in place
   * @param {number[][]} shapes
   */
  constructor(network, numbers, shapes) {
    this.network = network;
    this.numbers = numbers;
    this.shapes = shapes;
    this.upload();
  }

  /** Make arrays of the numbers. */
  upload() {
    this.dispose();
    this.parameters = this.numbers.map((x, i) => tensor(x.slice(), this.shapes[i]));
  }

  dispose() {
    if (this.parameters) dispose(this.parameters);
    this.parameters = null;
  }

  refs() {
    return this.parameters.map((parameter) => parameter.ref);
  }

  /**
   * Run one of the two heads over rows of token ids; `size` numbers for each token.
   * @param {typeof logprobs} head
   * @param {number[][]} rows
   * @param {number} size
   * @returns {Promise<Float32Array[]>} of each row, [L size]
   */
  async run(head, rows, size) {
    const { model, vocabularySize } = this.network;
    const L = paddedWidth(rows);
    const { parts, positions } = this.network.of(L);
    const results = [];
    for (const piece of piecesOf(rows)) {
      const x = oneHot(piece, paddedSize(piece.length), L, vocabularySize);
      const data = await head(parts, model, this.refs(), x, positions).data();
      piece.forEach((_, i) =>
        results.push(data.slice(i * L * size, (i + 1) * L * size)),
      );
    }
    return results;
  }

  /**
   * Log-probabilities of the token after each row.
   * @param {number[][]} rows
   * @returns {Promise<Float32Array[]>}
   */
  async next(rows) {
    const V = this.network.vocabularySize;
    const found = await this.run(logprobs, rows, V);
    return rows.map((row, i) => found[i].slice((row.length - 1) * V, row.length * V));
  }

  /**
   * Log-probability of each token of the completions.
   * @param {Row[]} rows
   * @returns {Promise<number[][]>}
   */
  async score(rows) {
    const V = this.network.vocabularySize;
    const found = await this.run(logprobs, rows.map(inputsOf), V);
    return rows.map((row, i) =>
      row.tokens.map((id, t) => found[i][(startOf(row) + t) * V + id]),
    );
  }

  /**
   * The value before each token of the completions.
   * @param {Row[]} rows
   * @returns {Promise<number[][]>}
   */
  async value(rows) {
    const found = await this.run(values, rows.map(inputsOf), 1);
    return rows.map((row, i) => row.tokens.map((_, t) => found[i][startOf(row) + t]));
  }

  /**
   * The policy's loss, and its gradient.
   * @param {Row[]} rows - with advantages and log-probs
   * @param {(row: Row) => number[]} weightsOf - of each token's loss
   * @param {{ epsilon: number, beta: number }} options
   */
  policyGradient(rows, weightsOf, { epsilon, beta }) {
    return this.gradient("policyGradient", rows, (layOut, oneHotTargets) => ({
      target: oneHotTargets(),
      weights: layOut(weightsOf),
      advantages: layOut((row) => row.advantages),
      old: layOut((row) => row.logprobs),
      reference: layOut((row) => row.refLogprobs),
      low: scalar(1 - epsilon),
      high: scalar(1 + epsilon),
      beta: scalar(beta),
    }));
  }

  /**
   * The value model's loss, and its gradient.
   * @param {Row[]} rows - with values and returns
   * @param {(row: Row) => number[]} weightsOf
   * @param {number} range - cliprange_value
   */
  valueGradient(rows, weightsOf, range) {
    return this.gradient("valueGradient", rows, (layOut) => ({
      weights: layOut(weightsOf),
      old: layOut((row) => row.values),
      returns: layOut((row) => row.returns),
      range: scalar(range),
    }));
  }

  /**
   * A loss and its gradient. Weights of tokens are shares of the whole step, so those
   * of pieces add up.
   * @param {"policyGradient" | "valueGradient"} which
   * @param {Row[]} rows
   * @param {(layOut: Function, oneHotTargets: Function) => object} batchOf
   */
  async gradient(which, rows, batchOf) {
    const V = this.network.vocabularySize;
    const L = paddedWidth(rows.map(inputsOf));
    const result = { loss: 0, gradients: this.numbers.map((x) => x.slice().fill(0)) };
    for (const piece of piecesOf(rows)) {
      const R = paddedSize(piece.length);
      const layOut = (numbersOf) => {
        const data = new Float32Array(R * L);
        piece.forEach((row, i) => data.set(numbersOf(row), i * L + startOf(row)));
        return tensor(data, [R * L]);
      };
      const oneHotTargets = () => {
        const targets = piece.map((row) => [...Array(startOf(row)), ...row.tokens]);
        return oneHot(targets, R, L, V);
      };
      const x = oneHot(piece.map(inputsOf), R, L, V);
      const batch = { x, ...batchOf(layOut, oneHotTargets) };
      const [loss, gradient] = this.network.of(L)[which](this.refs(), batch);
      result.loss += (await loss.data())[0];
      for (const [k, part] of gradient.entries()) {
        const numbers = await part.data();
        const sum = result.gradients[k];
        for (let i = 0; i < sum.length; i++) sum[i] += numbers[i];
      }
    }
    return result;
  }
}
