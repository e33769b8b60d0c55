/* The worker's calls as promises. A page from file:// may not start a worker from a
 * file, but from a Blob of text that it holds. */

/* What jax-js asks for and older browsers lack: it only wants to know whether an array
 * is one. Nothing here makes such arrays. */
const FLOAT16 = "globalThis.Float16Array ??= class {};\n";

export class Client {
  /** @param {string} script - the text of the worker */
  constructor(script) {
    const blob = new Blob([FLOAT16, script], { type: "text/javascript" });
    this.worker = new Worker(URL.createObjectURL(blob));
    this.waiting = new Map();
    this.count = 0;
    this.worker.onmessage = ({ data: { id, result, error } }) => {
      const { resolve, reject } = this.waiting.get(id);
      this.waiting.delete(id);
      if (error) reject(new Error(error));
      else resolve(result);
    };
    this.worker.onerror = (event) => {
      for (const { reject } of this.waiting.values()) reject(new Error(event.message));
    };
  }

  /**
   * @param {string} call - a name in the worker's CALLS
   * @param {unknown} [argument]
   * @returns {Promise<any>}
   */
  call(call, argument) {
    this.count += 1;
    const id = this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, call, argument });
    });
  }
}
