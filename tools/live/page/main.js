/* The page: its parts, its state, its address. */

import { Ask } from "./ask.js";
import { Client } from "./client.js";
import { byId } from "./dom.js";
import { bindExperiments, enableExperiments } from "./find.js";
import { Replay } from "./replay.js";
import { DEFAULTS, parseHash, toHash } from "./state.js";
import { READY, Train } from "./train.js";

const VIEWS = ["train", "ask", "replay", "find"];
const text = (id) => byId(id).textContent;

const policy = JSON.parse(text("policy"));

const app = {
  client: new Client(text("worker")),
  state: parseHash(location.hash),
  defaults: DEFAULTS,
  vocabulary: policy.vocabulary,
  figures: JSON.parse(text("figures")),
  runs: JSON.parse(text("runs")),
  ready: false,

  /** @param {Record<string, any>} patch */
  set(patch) {
    Object.assign(app.state, patch);
    remember();
  },

  /** @param {string} sentence */
  say(sentence) {
    byId("status").textContent = sentence;
  },

  /** The address of what is shown; options are those of the first step. */
  address() {
    return location.href.split("#")[0] + toHash({ ...app.state, ...train?.initial });
  },

  /** Which model it is that answers. */
  modelNow() {
    if (!train.steps) return "as it is before training";
    return `as it is after ${train.steps} ${train.steps === 1 ? "step" : "steps"}`;
  },

  /** @param {string} view */
  open(view) {
    app.set({ view: VIEWS.includes(view) ? view : "train" });
    for (const name of VIEWS) {
      const chosen = name === app.state.view;
      byId(name).hidden = !chosen;
      byId(`tab-${name}`).setAttribute("aria-selected", String(chosen));
      byId(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    }
    byId("status").hidden = app.ready && app.state.view !== "train";
    if (app.state.view === "replay") replay.show();
  },
};

/** Write the state into the address, where the page may. */
function remember() {
  try {
    history.replaceState(null, "", app.address());
  } catch {
    /* a page inside another one has no address of its own */
  }
}

/** Arrow keys move between tabs, as readers of the screen expect. */
function moveTabs(event) {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!move) return;
  const i = VIEWS.indexOf(app.state.view) + move + VIEWS.length;
  app.open(VIEWS[i % VIEWS.length]);
  byId(`tab-${app.state.view}`).focus();
}

/** @type {Train} */
let train;
train = new Train(app);
const ask = new Ask(app);
const replay = new Replay(app);
bindExperiments(train);

for (const name of VIEWS) {
  byId(`tab-${name}`).addEventListener("click", () => app.open(name));
  byId(`tab-${name}`).addEventListener("keydown", moveTabs);
}
app.open(app.state.view);
ask.fill();
train.figure.show(app.state.algorithm);
train.show();

/** Wake the model, and go where the address says. */
async function start() {
  const link = /** @type {any} */ ({ ...app.state });
  await app.client.call("start", policy);
  await train.measure();
  app.ready = true;
  byId("ask-go").disabled = false;
  enableExperiments();
  app.say(READY);
  app.open(app.state.view);
  train.show();
  if (link.steps) await train.goTo(link);
  if (app.state.view === "ask") await ask.go();
}

/* Another link in the same window. */
addEventListener("hashchange", () => location.reload());

globalThis.live = app.client; // for the tests
start().catch((error) =>
  app.say(`This browser could not start the model: ${error.message}`),
);
