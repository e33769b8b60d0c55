/* Where each number is computed: the chapter, and the function in it. */

import { el } from "./dom.js";

export const CHAPTERS = {
  answers: "figure/sampling.html#sample",
  length: "figure/sampling.html#sample",
  reward: "figure/reward.html#accuracy_reward",
  group: "figure/group.html#group_advantages",
  equal: "figure/group.html#has_variance",
  value: "figure/value.html#predict_values",
  gae: "figure/gae.html#gae",
  kl: "figure/reference.html#kl",
  entropy: "figure/policy.html#token_logprobs",
  norm: "figure/update.html#gradient_step",
  accuracy: "run/training.html#evaluate",
};

/**
 * A link to the chapter of a number.
 * @param {string} words
 * @param {string} key - a name in CHAPTERS
 */
export const chapter = (words, key) =>
  el("a", { href: CHAPTERS[key], target: "_blank" }, words);
