/* What the reader has set, and the address that says it. */

import { FIELDS } from "./options.js";
import { COLOURS } from "./tokens.js";

/** @typedef {import("../types").Options} Options */

const LONGEST = 500; // steps that a link may ask for

/** @type {Record<string, any>} */
export const DEFAULTS = {
  view: "train",
  // training
  algorithm: "grpo",
  G: 16,
  reward: "accuracy",
  rate: 1e-4,
  beta: 0.01,
  epsilon: 0.2,
  iterations: 1,
  scale: "group",
  loss: "grpo",
  lam: 0.95,
  seed: 0,
  steps: 0,
  changes: "", // of options after the first step: "12:beta=0;20:rate=0.001"
  group: -1, // the one that the page chooses
  watched: "47+85=",
  colour: "advantage",
  // asking
  prompt: "47+85=",
  answers: 8,
  temperature: 1,
  dice: 0,
  // replay
  run: 0,
  against: -1,
  at: 1,
  asked: "", // the question that is shown
};

/** The options of a step. */
export const OPTIONS = [
  "algorithm",
  "G",
  "reward",
  "rate",
  "beta",
  "epsilon",
  "iterations",
  "scale",
  "loss",
  "lam",
  "seed",
];

/** Those that are not changed on the way. */
export const NEW_START = ["algorithm", "seed"];

/** @param {Record<string, any>} state @returns {Options} */
export function optionsOf(state) {
  /** @type {any} */
  const options = Object.fromEntries(OPTIONS.map((key) => [key, state[key]]));
  return { ...options, queries: state.algorithm === "ppo" ? 64 : 16 };
}

/** What there is to choose from. @type {Record<string, any[]>} */
const CHOICES = { colour: Object.keys(COLOURS) };
for (const { key, choices } of FIELDS) CHOICES[key] = choices.map(([value]) => value);

/** A text as a value of the same kind as the default; the default if it is none. */
function read(key, text) {
  const value = typeof DEFAULTS[key] === "number" ? Number(text) : text;
  const allowed = CHOICES[key]?.includes(value) ?? !Number.isNaN(value);
  return allowed ? value : DEFAULTS[key];
}

/** @param {string} hash - with its # or without */
export function parseHash(hash) {
  const state = { ...DEFAULTS };
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (key in DEFAULTS) state[key] = read(key, text);
  }
  state.steps = Math.min(Math.max(state.steps, 0), LONGEST);
  return state;
}

/** Only what differs from the defaults. @param {Record<string, any>} state */
export function toHash(state) {
  const entries = Object.entries(state);
  const other = entries.filter(
    ([key, value]) => key in DEFAULTS && value !== DEFAULTS[key],
  );
  const text = new URLSearchParams(other.map(([key, value]) => [key, String(value)]));
  return other.length ? `#${text}` : "";
}

/**
 * What was changed on the way, by step.
 * @param {string} text
 * @returns {Map<number, Record<string, any>>}
 */
export function parseChanges(text) {
  const changes = new Map();
  for (const part of text.split(";").filter(Boolean)) {
    const [step, rest] = part.split(":");
    const [key, value] = (rest ?? "").split("=");
    if (!OPTIONS.includes(key) || NEW_START.includes(key)) continue;
    const found = changes.get(Number(step)) ?? {};
    changes.set(Number(step), { ...found, [key]: read(key, value) });
  }
  return changes;
}
