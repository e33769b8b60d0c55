/* Elements, numbers and words. */

/** @param {string} id @returns {any} */
export const byId = (id) => document.getElementById(id);

/**
 * An element: `el("p", { class: "help" }, "text", child)`.
 * @param {string} name
 * @param {Record<string, any>} [attributes] - `onclick` and the like are handlers
 * @param {...(Node | string | null)} children
 */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  setAll(element, attributes);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** The same for SVG. @returns {any} */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  setAll(element, attributes);
  element.append(...children);
  return element;
}

function setAll(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
}

/** Numbers with a real minus sign. @param {number} x @param {number} digits */
export function fixed(x, digits = 2) {
  const text = x.toFixed(digits);
  return Number(text) === 0 ? (0).toFixed(digits) : text.replace("-", "−");
}

/** With its sign, 0 without one. */
export const signed = (x, digits = 2) =>
  Number(x.toFixed(digits)) > 0 ? `+${fixed(x, digits)}` : fixed(x, digits);

export const percent = (x, digits = 0) => `${fixed(100 * x, digits)} %`;

export const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export const wait = (ms) => new Promise((done) => setTimeout(done, ms));
