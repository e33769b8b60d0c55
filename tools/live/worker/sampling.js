/* q -> o: completions drawn from the policy, token by token. */

/** @typedef {import("../types").Row} Row */
/** @typedef {import("./model.js").Model} Model */

export const EOS = 1;
export const LONGEST = 5; // tokens of a completion, the end included
const SPECIAL = 3; // ids below it are no text: padding, end, unknown

/** The characters of the vocabulary, both ways. */
export class Tokenizer {
  /** @param {string[]} vocabulary */
  constructor(vocabulary) {
    this.vocabulary = vocabulary;
    this.ids = new Map(vocabulary.map((token, id) => [token, id]));
  }

  /** @param {string} text */
  encode(text) {
    return [...text].map((character) => this.ids.get(character) ?? 2);
  }

  /** @param {number[]} tokens */
  decode(tokens) {
    const text = tokens.filter((id) => id >= SPECIAL);
    return text.map((id) => this.vocabulary[id]).join("");
  }
}

/**
 * Log-probabilities at another temperature.
 * @param {Float32Array} logprobs
 * @param {number} temperature
 */
function heated(logprobs, temperature) {
  if (temperature === 1) return logprobs;
  const scaled = logprobs.map((x) => x / temperature);
  const highest = Math.max(...scaled);
  const sum = scaled.reduce((total, x) => total + Math.exp(x - highest), 0);
  return scaled.map((x) => x - highest - Math.log(sum));
}

/** Draw an index; what rounding leaves over goes to the likeliest. */
function draw(logprobs, random) {
  let left = random();
  for (let id = 0; id < logprobs.length; id++) {
    left -= Math.exp(logprobs[id]);
    if (left < 0) return id;
  }
  return likeliest(logprobs);
}

const likeliest = (logprobs) => logprobs.indexOf(Math.max(...logprobs));

/** Nats. @param {Float32Array} logprobs */
const entropyOf = (logprobs) => -logprobs.reduce((sum, x) => sum + Math.exp(x) * x, 0);

/** @returns {Row} */
const emptyRow = (query, prompt) => ({
  query,
  prompt,
  tokens: [],
  text: "",
  logprobs: [],
  entropy: [],
  count: 1,
});

/**
 * Draw G completions of each prompt. Equal beginnings are computed once.
 * @param {Model} policy
 * @param {Tokenizer} tokenizer
 * @param {string[]} prompts
 * @param {number} G
 * @param {{ random?: () => number, temperature?: number }} how - no `random`: greedy
 * @returns {Promise<Row[]>} groups contiguous
 */
export async function sample(policy, tokenizer, prompts, G, how = {}) {
  const { random, temperature = 1 } = how;
  const rows = prompts.flatMap((prompt, query) => {
    const ids = tokenizer.encode(prompt);
    return Array.from({ length: G }, () => emptyRow(query, ids));
  });
  let open = rows;
  for (let t = 0; t < LONGEST && open.length; t++) {
    const beginnings = new Map();
    for (const row of open) {
      const ids = [...row.prompt, ...row.tokens];
      beginnings.set(ids.join(), ids);
    }
    const next = await policy.next([...beginnings.values()]);
    const found = new Map([...beginnings.keys()].map((key, i) => [key, next[i]]));
    for (const row of open) {
      const key = [...row.prompt, ...row.tokens].join();
      const logprobs = heated(found.get(key), temperature);
      const id = random ? draw(logprobs, random) : likeliest(logprobs);
      row.tokens.push(id);
      row.logprobs.push(logprobs[id]);
      row.entropy.push(entropyOf(logprobs));
    }
    open = open.filter((row) => row.tokens.at(-1) !== EOS);
  }
  for (const row of rows) row.text = tokenizer.decode(row.tokens);
  return rows;
}

/**
 * Leave equal completions of one query out, and count them.
 * @param {Row[]} rows
 * @returns {Row[]}
 */
export function distinct(rows) {
  const found = new Map();
  for (const row of rows) {
    const key = `${row.query}:${row.tokens.join()}`;
    if (found.has(key)) found.get(key).count += 1;
    else found.set(key, { ...row, count: 1 });
  }
  return [...found.values()];
}

/**
 * The likely answers to a prompt, with their probabilities, from likeliest on.
 * @param {Model} policy
 * @param {Tokenizer} tokenizer
 * @param {string} prompt
 * @param {number} least - beginnings less likely than this are not followed
 */
export async function likelyAnswers(policy, tokenizer, prompt, least = 0.004) {
  const ids = tokenizer.encode(prompt);
  const answers = new Map();
  let open = [{ tokens: [], p: 1 }];
  for (let t = 0; t < LONGEST && open.length; t++) {
    const next = await policy.next(open.map(({ tokens }) => [...ids, ...tokens]));
    const longer = [];
    open.forEach(({ tokens, p }, i) => {
      next[i].forEach((logprob, id) => {
        const q = p * Math.exp(logprob);
        if (q < least) return;
        const ended = id === EOS || t === LONGEST - 1;
        const text = tokenizer.decode([...tokens, id]);
        if (ended) answers.set(text, (answers.get(text) ?? 0) + q);
        else longer.push({ tokens: [...tokens, id], p: q });
      });
    });
    open = longer;
  }
  const list = [...answers].map(([text, p]) => ({ text, p }));
  return list.sort((a, b) => b.p - a.p);
}
