/* Find out: six experiments, each with what there is to see. */

/** @typedef {import("./train.js").Train} Train */

/** Let the buttons set their experiment up. @param {Train} train */
export function bindExperiments(train) {
  for (const article of document.querySelectorAll(".experiment")) {
    const { options } = /** @type {HTMLElement} */ (article).dataset;
    const hint = article.querySelector(".hint-text").textContent.trim();
    const button = article.querySelector("button");
    button.addEventListener("click", () => train.prepare(JSON.parse(options), hint));
  }
}

/** The model is awake. */
export function enableExperiments() {
  for (const button of document.querySelectorAll(".experiment button")) {
    button.removeAttribute("disabled");
  }
}
