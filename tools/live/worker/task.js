/* The task: sums of two numbers with two digits. As in the library, a checksum of the
 * query decides whether it is held out: those are never trained on. */

/** @typedef {{ prompt: string, answer: string, heldout: boolean }} Query */

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

/** CRC-32, as zlib's. @param {string} text - ASCII */
export function crc32(text) {
  let crc = 0xffffffff;
  for (const character of text) {
    crc = (crc >>> 8) ^ TABLE[(crc ^ character.charCodeAt(0)) & 255];
  }
  return (crc ^ 0xffffffff) >>> 0;
}

/** @param {number} a @param {number} b @returns {Query} */
export function sumQuery(a, b) {
  const key = `${Math.min(a, b)}+${Math.max(a, b)}`; // both orders: one question
  const heldout = crc32(key) % 5 === 0;
  return { prompt: `${a}+${b}=`, answer: String(a + b), heldout };
}

/** What a person typed; null: no sum. @param {string} text @returns {Query | null} */
export function parseQuery(text) {
  const found = /^\s*(\d{1,3})\s*\+\s*(\d{1,3})\s*=?\s*$/.exec(text);
  return found && sumQuery(Number(found[1]), Number(found[2]));
}

/**
 * Different queries of one side.
 * @param {boolean} heldout
 * @param {number} n
 * @param {() => number} random
 */
export function drawQueries(heldout, n, random) {
  const drawn = new Map();
  const number = () => 10 + Math.floor(90 * random());
  while (drawn.size < n) {
    const query = sumQuery(number(), number());
    if (query.heldout === heldout) drawn.set(query.prompt, query);
  }
  return [...drawn.values()];
}

/** Numbers in [0, 1) from a seed (mulberry32). @param {number} seed */
export function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
  };
}

/**
 * What an answer is worth; `accuracy` and `brevity` are those of the library.
 * @type {Record<string, (text: string, query: Query) => number>}
 */
export const REWARDS = {
  accuracy: (text, query) => Number(text === query.answer),
  brevity: (text) => Math.max(0, 1 - text.length / 16),
  constant: () => 1,
};
