/* The settings: each with a line that says what it does. */

const numbers = (...list) => list.map((x) => [x, String(x).replace("-", "−")]);

export const FIELDS = [
  {
    key: "algorithm",
    label: "Algorithm",
    help:
      "GRPO compares answers with each other; PPO with the guess of a second " +
      "model.",
    choices: [
      ["grpo", "GRPO"],
      ["ppo", "PPO"],
    ],
  },
  {
    key: "reward",
    label: "Reward",
    help:
      "What counts as good. Nothing else tells the model what is wanted. 1 − length " +
      "/ 16: shorter is better.",
    choices: [
      ["accuracy", "1 for the right answer"],
      ["brevity", "1 − length / 16"],
      ["constant", "1 for every answer"],
    ],
  },
  {
    key: "G",
    label: "Group size G",
    only: "grpo",
    help: "Answers to each question, which are compared with each other.",
    choices: numbers(2, 4, 8, 16),
  },
  {
    key: "rate",
    label: "Learning rate",
    help: "How far one step moves the weights.",
    choices: [
      [1e-5, "0.00001"],
      [3e-5, "0.00003"],
      [1e-4, "0.0001"],
      [3e-4, "0.0003"],
      [1e-3, "0.001 (× 10)"],
    ],
  },
  {
    key: "beta",
    label: "β, price of the KL",
    help: "What it costs to move away from the model from before training. 0: nothing.",
    choices: numbers(0, 0.01, 0.04, 0.1, 0.3, 1),
  },
  {
    key: "epsilon",
    label: "ε, clip",
    help:
      "How much likelier or less likely a token may get before that pays no " +
      "more. Felt only with several updates a batch.",
    choices: numbers(0.05, 0.1, 0.2, 0.5),
  },
  {
    key: "iterations",
    label: "Updates a batch",
    help: "Gradient steps on the same answers.",
    choices: numbers(1, 2, 4),
  },
  {
    key: "scale",
    label: "Scale of rewards",
    only: "grpo",
    help: "What the distance from the group's mean is divided by.",
    choices: [
      ["group", "the group's spread"],
      ["batch", "the batch's spread"],
      ["none", "nothing (Dr. GRPO)"],
    ],
  },
  {
    key: "loss",
    label: "Loss type",
    help: "How the losses of tokens become one number.",
    choices: [
      ["grpo", "each answer counts the same"],
      ["dapo", "each token counts the same"],
      ["dr_grpo", "divided by a fixed length"],
    ],
  },
  {
    key: "lam",
    label: "λ of GAE",
    only: "ppo",
    help: "0: trust the value model's guesses. 1: trust the reward alone.",
    choices: numbers(0, 0.5, 0.95, 1),
  },
  {
    key: "seed",
    label: "Seed",
    help: "Other questions, other dice.",
    choices: numbers(0, 1, 2, 3, 4),
  },
];

/** @param {string} key @param {any} value */
export function wordsOf(key, value) {
  const field = FIELDS.find((other) => other.key === key);
  const found = field.choices.find(([choice]) => choice === value);
  return found ? found[1] : String(value);
}
