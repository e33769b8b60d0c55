/* Find out: six experiments, each with what there is to see. */

/** @typedef {import("./train.js").Train} Train */

/** Let the buttons set their experiment up. @param {Train} train */
export function bindExperiments(train) {
  for (const article of document.querySelectorAll(".experiment")) {
    const {
      options,
      change = "",
      pause,
    } = /** @type {HTMLElement} */ (article).dataset;
    article.querySelector("button").addEventListener("click", () => {
      const hint = ["h3", ".hint-text", "details"].map((part) =>
        article.querySelector(part).cloneNode(true),
      );
      train.prepare(JSON.parse(options), hint, change.split(" "), Number(pause ?? NaN));
    });
  }
}

/** The model is awake. */
export function enableExperiments() {
  for (const button of document.querySelectorAll(".experiment button")) {
    button.removeAttribute("disabled");
  }
}
