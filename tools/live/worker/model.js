/* A model with its weights: numbers for the optimiser, arrays for everything else. */

import { dispose, jit, scalar, tensor, valueAndGrad } from "./arrays.js";
import { policyLoss, valueLoss } from "./formulas.js";
import { compiledParts, logprobs, plainParts, positionsOf, values } from "./policy.js";

/** @typedef {import("../types").Tensor} Tensor */
/** @typedef {import("../types").Architecture} Architecture */
/** @typedef {import("../types").Row} Row */

/* A number of rows that has been compiled costs nothing; a new one does. */
const SIZES = [1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512];

/** Rows to compute where n are wanted. @param {number} n */
export function paddedSize(n) {
  return SIZES.find((size) => size >= n) ?? 128 * Math.ceil(n / 128);
}

/**
 * Token ids as one-hot rows, [R, L, V]; all 0 where `rows` has none.
 * @param {(number | undefined)[][]} rows
 * @param {number} R
 * @param {number} L
 * @param {number} V
 */
function oneHot(rows, R, L, V) {
  const data = new Float32Array(R * L * V);
  rows.forEach((row, i) => {
    row.slice(0, L).forEach((id, t) => {
      if (id !== undefined) data[(i * L + t) * V + id] = 1;
    });
  });
  return tensor(data, [R, L, V]);
}

/** The tokens that a model reads of a row; the last one is only a target. */
const inputsOf = (row) => [...row.prompt, ...row.tokens].slice(0, -1);

/** Where the first token of a completion is predicted. */
const startOf = (row) => row.prompt.length - 1;

/** The widest row. @param {number[][]} rows */
const widthOf = (rows) => Math.max(...rows.map((row) => row.length));

/** Both ways through one architecture, shared by all models of it. */
export class Network {
  /** @param {Architecture} model */
  constructor(model) {
    this.model = model;
    this.vocabularySize = model.vocabulary.length;
    this.plain = plainParts(model);
    this.compiled = compiledParts(this.plain);
    this.positions = new Map();
    this.policyGradient = jit(
      valueAndGrad((parameters, batch) =>
        policyLoss(this.plain, model, parameters, batch),
      ),
    );
    this.valueGradient = jit(
      valueAndGrad((parameters, batch) =>
        valueLoss(this.plain, model, parameters, batch),
      ),
    );
  }

  /** @param {number} L */
  positionsFor(L) {
    if (!this.positions.has(L)) this.positions.set(L, positionsOf(this.model, L));
    return this.positions.get(L);
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
   * Run one of the two heads over rows of token ids.
   * @param {typeof logprobs} head
   * @param {number[][]} rows
   */
  async run(head, rows) {
    const { compiled, model, vocabularySize } = this.network;
    const L = widthOf(rows);
    const x = oneHot(rows, paddedSize(rows.length), L, vocabularySize);
    const at = this.network.positionsFor(L);
    return { L, data: await head(compiled, model, this.refs(), x, at).data() };
  }

  /**
   * Log-probabilities of the token after each row.
   * @param {number[][]} rows
   * @returns {Promise<Float32Array[]>}
   */
  async next(rows) {
    const V = this.network.vocabularySize;
    const { L, data } = await this.run(logprobs, rows);
    return rows.map((row, i) => {
      const start = (i * L + row.length - 1) * V;
      return data.slice(start, start + V);
    });
  }

  /**
   * Log-probability of each token of the completions.
   * @param {Row[]} rows
   * @returns {Promise<number[][]>}
   */
  async score(rows) {
    const V = this.network.vocabularySize;
    const { L, data } = await this.run(logprobs, rows.map(inputsOf));
    return rows.map((row, i) =>
      row.tokens.map((id, t) => data[(i * L + startOf(row) + t) * V + id]),
    );
  }

  /**
   * The value before each token of the completions.
   * @param {Row[]} rows
   * @returns {Promise<number[][]>}
   */
  async value(rows) {
    const { L, data } = await this.run(values, rows.map(inputsOf));
    return rows.map((row, i) => row.tokens.map((_, t) => data[i * L + startOf(row) + t]));
  }

  /**
   * Lay numbers of tokens out as [R, L], 0 elsewhere.
   * @param {Row[]} rows
   * @param {(row: Row) => number[]} numbersOf
   * @param {number} R
   * @param {number} L
   */
  layOut(rows, numbersOf, R, L) {
    const data = new Float32Array(R * L);
    rows.forEach((row, i) => data.set(numbersOf(row), i * L + startOf(row)));
    return tensor(data, [R, L]);
  }

  /**
   * The policy's loss, and its gradient.
   * @param {Row[]} rows - with advantages and log-probs
   * @param {(row: Row) => number[]} weightsOf - of each token's loss
   * @param {{ epsilon: number, beta: number }} options
   */
  async policyGradient(rows, weightsOf, { epsilon, beta }) {
    const inputs = rows.map(inputsOf);
    const [R, L] = [paddedSize(rows.length), widthOf(inputs)];
    const V = this.network.vocabularySize;
    const targets = rows.map((row) => [...Array(startOf(row)), ...row.tokens]);
    const put = (numbersOf) => this.layOut(rows, numbersOf, R, L);
    const batch = {
      x: oneHot(inputs, R, L, V),
      target: oneHot(targets, R, L, V),
      weights: put(weightsOf),
      advantages: put((row) => row.advantages),
      old: put((row) => row.logprobs),
      reference: put((row) => row.refLogprobs),
      low: scalar(1 - epsilon),
      high: scalar(1 + epsilon),
      beta: scalar(beta),
    };
    return download(this.network.policyGradient(this.refs(), batch));
  }

  /**
   * The value model's loss, and its gradient.
   * @param {Row[]} rows - with values and returns
   * @param {(row: Row) => number[]} weightsOf
   * @param {number} range - cliprange_value
   */
  async valueGradient(rows, weightsOf, range) {
    const inputs = rows.map(inputsOf);
    const [R, L] = [paddedSize(rows.length), widthOf(inputs)];
    const put = (numbersOf) => this.layOut(rows, numbersOf, R, L);
    const batch = {
      x: oneHot(inputs, R, L, this.network.vocabularySize),
      weights: put(weightsOf),
      old: put((row) => row.values),
      returns: put((row) => row.returns),
      range: scalar(range),
    };
    return download(this.network.valueGradient(this.refs(), batch));
  }
}

/** A loss and its gradient as numbers. @param {[Tensor, Tensor[]]} result */
async function download([loss, gradient]) {
  const gradients = [];
  for (const part of gradient) gradients.push(await part.data());
  return { loss: (await loss.data())[0], gradients };
}
