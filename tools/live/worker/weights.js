/* Weights as they stand in the page: float16, little endian, base64. */

/** The bytes of a base64 text. @param {string} text @returns {Uint8Array} */
export function fromBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

/**
 * Float16 as float32: exact, since each half is a float32, too.
 * @param {Uint16Array} halves
 * @returns {Float32Array}
 */
export function fromHalves(halves) {
  const floats = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) {
    const sign = halves[i] & 0x8000 ? -1 : 1;
    const exponent = (halves[i] >> 10) & 31;
    const fraction = halves[i] & 1023;
    floats[i] =
      exponent === 0
        ? sign * fraction * 2 ** -24
        : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return floats;
}

/** Numbers in an array of this shape. @param {number[]} shape */
export function sizeOf(shape) {
  return shape.reduce((product, size) => product * size, 1);
}

/**
 * Cut one long array into the parameters, in the order of torch's `parameters()`.
 * @param {Float32Array} floats
 * @param {number[][]} shapes
 * @returns {Float32Array[]}
 */
export function splitParameters(floats, shapes) {
  let start = 0;
  return shapes.map((shape) => {
    const part = floats.slice(start, start + sizeOf(shape));
    start += sizeOf(shape);
    return part;
  });
}
