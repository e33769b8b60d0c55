/* The arrays of jax-js. Every function there consumes its arguments, so that memory
 * is freed as in a language without a garbage collector; `x.ref` keeps `x` for
 * another use. */

/** @typedef {import("../types").Tensor} Tensor */

export const { numpy: np, nn, jit, valueAndGrad } = jax;

/** Start WebAssembly, or the plain CPU where a browser has none. */
export async function startArrays() {
  const found = await jax.init("wasm", "cpu");
  const device = found.includes("wasm") ? "wasm" : "cpu";
  jax.defaultDevice(device);
  return device;
}

/**
 * Numbers as an array of this shape; float32 or float64, as they are given.
 * @param {Float32Array | Float64Array} data
 * @param {number[]} shape
 * @returns {Tensor}
 */
export function tensor(data, shape) {
  return np.array(data).reshape(shape);
}

/** One number as an array without dimensions. @param {number} x @returns {Tensor} */
export function scalar(x) {
  return np.array(new Float32Array([x])).reshape([]);
}

/** Free what an object or a list of arrays holds. @param {object} arrays */
export function dispose(arrays) {
  for (const array of Object.values(arrays)) array.dispose();
}
