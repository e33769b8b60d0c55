/* What the page may ask of the worker: one message, one answer. */

import { startArrays } from "./arrays.js";
import { AdamW } from "./adamw.js";
import { gae, groupAdvantages, whiten } from "./formulas.js";
import { crc32 } from "./task.js";
import { tokenWeights, Trainer } from "./trainer.js";

/** @type {Trainer} */
let trainer;

const CALLS = {
  async start(architecture) {
    const device = await startArrays();
    trainer = new Trainer(architecture);
    return device;
  },
  ask: (how) => trainer.ask(how),
  answers: (how) => trainer.answers(how),
  step: (options) => trainer.step(options),
  evaluate: () => trainer.evaluate(),
  reset: () => trainer.reset(),

  /* For the tests, which compare with the library. */
  crc32: (texts) => texts.map(crc32),
  groupAdvantages: ({ rewards, G, scale, baseline }) =>
    groupAdvantages(rewards, G, scale, baseline),
  gae: ({ rewards, values, gamma, lam }) => gae(rewards, values, gamma, lam),
  whiten: (rows) => whiten(rows),
  score: (rows) => trainer.policy.score(rows),
  policyGradient: ({ rows, loss, epsilon, beta }) =>
    trainer.policy.policyGradient(rows, tokenWeights(loss, rows), { epsilon, beta }),
  async valueGradient({ rows, head, range }) {
    trainer.needValue();
    trainer.value.numbers.at(-2).set(head);
    trainer.value.upload();
    const found = await trainer.value.value(rows);
    const gradient = await trainer.value.valueGradient(
      rows,
      tokenWeights("dapo", rows),
      range,
    );
    return { values: found, ...gradient };
  },
  adamw({ parameters, gradients, rate, maxNorm }) {
    const numbers = [Float32Array.from(parameters)];
    const optimizer = new AdamW(numbers);
    for (const g of gradients) optimizer.step([Float32Array.from(g)], rate, maxNorm);
    return numbers[0];
  },
};

async function answer({ id, call, argument }) {
  try {
    postMessage({ id, result: await CALLS[call](argument) });
  } catch (error) {
    postMessage({ id, error: String(error) });
  }
}

/* One call after the other: nobody asks a model in the middle of its update. */
let last = Promise.resolve();
onmessage = ({ data }) => {
  last = last.then(() => answer(data));
};
