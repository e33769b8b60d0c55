/* Types for the comments in the scripts beside this file. No script is compiled. */

/** An array of jax-js, as far as it is used here. */
export interface Tensor {
  readonly ref: Tensor;
  readonly shape: number[];
  dispose(): void;
  data(): Promise<any>;
  reshape(shape: number[]): Tensor;
  add(other: Tensor | number): Tensor;
  sub(other: Tensor | number): Tensor;
  mul(other: Tensor | number): Tensor;
  div(other: Tensor | number): Tensor;
  greater(other: Tensor | number): Tensor;
}

export interface Architecture {
  layers: number;
  heads: number;
  width: number;
  eps: number;
  theta: number;
  vocabulary: string[]; // of each token id
  shapes: number[][]; // of the parameters, in torch's order
  weights: string; // float16, base64
}

export type Parts = Record<string, (...arrays: any[]) => Tensor>;

export interface PolicyBatch {
  x: Tensor; // one-hot tokens, [N, V]; N = R rows of L tokens
  target: Tensor; // one-hot next tokens, [N, V]; all 0 where there is no loss
  weights: Tensor; // of each token's loss, [N]
  advantages: Tensor; // [N]
  old: Tensor; // log-probs when sampled, [N]
  reference: Tensor; // log-probs of the reference, [N]
  low: Tensor; // 1 - epsilon
  high: Tensor; // 1 + epsilon
  beta: Tensor;
}

export interface ValueBatch {
  x: Tensor;
  weights: Tensor; // of each token's loss, [N]
  old: Tensor; // values when sampled
  returns: Tensor;
  range: Tensor; // cliprange_value
}

/** A completion: where it came from, and what is known of it; an entry a token. */
export interface Row {
  query: number; // its index in the step
  prompt: number[]; // token ids
  tokens: number[];
  text: string;
  texts?: string[]; // of the tokens, in recorded runs
  logprobs: number[];
  entropy: number[];
  count: number; // equal completions that this one stands for
  reward?: number;
  refLogprobs?: number[];
  newLogprobs?: number[];
  advantages?: number[];
  values?: number[];
  returns?: number[];
}

export interface Options {
  algorithm: "grpo" | "ppo";
  G: number;
  queries: number; // of a step
  rate: number;
  beta: number;
  epsilon: number;
  iterations: number;
  scale: string;
  loss: string;
  reward: string;
  lam: number;
  seed: number;
}

declare global {
  const jax: any;
}
