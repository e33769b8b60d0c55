/* Find out: six experiments, each with what there is to see. */

import { byId, el } from "./dom.js";

const EXPERIMENTS = [
  {
    question: "Why do the answers of one group share a baseline?",
    options: {},
    hint: "Press Step, and look at “A group of this step”. Then choose other questions there, easy and hard ones.",
    seen: "Some questions are easy and some are hard. A reward of 1 for an easy one is nothing special; for a hard one it is. What an answer should be compared with is therefore what this model gets on this very question. GRPO measures it: it answers the question G times and takes the mean of the rewards. All answers of the group share it, because they answer the same question. What is left, reward less mean, says which answer was better, not whether the question was easy.",
  },
  {
    question: "What does an advantage of 0 mean?",
    options: {},
    hint: "Press Step. Under “A group of this step”, choose a question whose rewards do not differ.",
    seen: "An advantage says how much better an answer was than expected. 0 means exactly as good as expected: the reward tells neither to make it likelier nor less likely. It does not mean that the answer is wrong: if all answers of a group are right, all have advantage 0.",
  },
  {
    question: "Why do equal rewards teach nothing?",
    options: { reward: "format" },
    hint: "Here any number gets reward 1, and the model writes nothing but numbers. Press Play, wait ten steps, and press Pause.",
    seen: "In (nearly) every group all rewards are 1, their mean is 1, and every advantage is 0. There is nothing to compare, so nothing to learn: accuracy stays where it was. The same happens where all answers are wrong. It is the differences within a group that teach, which is why questions that are much too easy or much too hard are wasted.",
  },
  {
    question: "What does β do?",
    options: { reward: "brevity", beta: 0, rate: 3e-4 },
    hint: "A reward that can be hacked: shorter answers get more, right or wrong. β = 0, so moving away costs nothing. Press Play for thirty steps. Then set β = 1 in the settings, Reset, and Play again.",
    seen: "With β = 0 the model finds out that no answer is the shortest answer. The reward rises, the KL explodes and the accuracy falls to 0: it does what is rewarded, not what was meant. β is the price of moving away from the model before training (the reference). With a high β the model stays near it: less reward, and it can still add. β too high, and it cannot learn anything at all.",
  },
  {
    question: "What does PPO need that GRPO does not?",
    options: { algorithm: "ppo", loss: "dapo" },
    hint: "Choose the speed “box by box” and press Step. Look for the second yellow box: the value model. Play on, and watch its guesses v under “A group of this step”.",
    seen: "A second model that has to be trained: the value model. PPO has one answer to each question and so no group to compare it with. The value model guesses before each token how the answer will end, and the advantage of each token is what came, compared with what was guessed. At first it guesses 0 everywhere; it has to learn alongside the policy. It costs memory and time as the policy does. GRPO asks several times in its place.",
  },
  {
    question: "What breaks with a high learning rate, or with G = 2?",
    options: { rate: 1e-3 },
    hint: "The learning rate is ten times as high as it should be. Press Play. Then set the learning rate back to 0.0001, G = 2, Reset, and Play again.",
    seen: "Ten times as fast is not ten times as good: each step is right for a small neighbourhood only, and leaves it. The KL jumps, and the accuracy shakes or breaks down. With G = 2 the baseline is the mean of two rewards: often both are equal, and the group teaches nothing. Learning is slower and more shaky.",
  },
];

/** @param {any} train */
export function showExperiments(train) {
  const cards = EXPERIMENTS.map(({ question, options, hint, seen }, i) =>
    el(
      "div",
      { class: "experiment" },
      el("h3", {}, `${i + 1}. ${question}`),
      el("p", {}, hint),
      el("button", { type: "button", onclick: () => train.prepare(options, hint) }, "Set it up"),
      el("details", {}, el("summary", {}, "What you have seen"), el("p", {}, seen)),
    ),
  );
  byId("experiments").replaceChildren(...cards);
}
