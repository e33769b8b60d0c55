/* The figure of the two algorithms, drawn by grpo_nb.figure, with values in its boxes
 * as `draw_figure(text=...)` writes them. */

import { calm, svg, wait } from "./dom.js";

/** @typedef {{ boxes: string[], values?: Record<string, string[]>, says: string }}
 *   Stage */

const LINE = 16; // height of a line of values
const ROOM = { grpo: 6, ppo: 4 }; // lines
const WIDE = 7.3; // of a character
const MONO = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace";

export class Figure {
  /** @param {HTMLElement} frame @param {any} figures */
  constructor(frame, figures) {
    this.frame = frame;
    this.figures = figures;
    this.half = null;
    this.token = 0;
    this.hurried = false;
  }

  /** Go to the end of the walk. */
  hurry() {
    this.hurried = true;
  }

  /** Draw one half without values. @param {"grpo" | "ppo"} half */
  show(half) {
    this.half = half;
    this.token += 1; // whatever runs through the boxes stops
    this.frame.innerHTML = this.figures[half].svg;
    this.root = this.frame.querySelector("svg");
    this.boxes = new Map();
    for (const link of this.root.querySelectorAll("a")) {
      this.boxes.set(link.querySelector("title").textContent.split(":")[0], link);
      link.setAttribute("target", "_blank"); // the run goes on
    }
  }

  /** Write values into a box. @param {string} name @param {string[]} values */
  write(name, values) {
    const box = this.figures[this.half].boxes[name];
    const group = this.boxes.get(name).querySelector("g");
    const lines = shortened(values, ROOM[this.half]);
    const longest = Math.max(...lines.map((line) => line.length));
    const width = Math.max(box.w, WIDE * longest + 8);
    // an arrow ends at the left edge, which stays; the question has none
    const left = name === "q" ? box.x - width / 2 : box.x - box.w / 2;
    const height = Math.max(box.h, LINE * lines.length + 10); // arrows end at its edge
    const rect = group.querySelector("rect");
    rect.setAttribute("x", left);
    rect.setAttribute("y", box.y - height / 2);
    rect.setAttribute("width", width);
    rect.setAttribute("height", height);
    for (const text of group.querySelectorAll("text")) text.remove();
    const first = box.y + 4 - (LINE * (lines.length - 1)) / 2;
    lines.forEach((line, i) => {
      const style = { "font-size": 12, "text-anchor": "middle", "font-family": MONO };
      const place = { x: left + width / 2, y: first + LINE * i };
      group.append(svg("text", { ...place, ...style }, line));
    });
  }

  /** On a phone the figure is wider than the page: show this box. */
  scrollTo(link) {
    const [box, frame] = [link, this.frame].map((e) => e.getBoundingClientRect());
    this.frame.scrollLeft += (box.left + box.right - frame.left - frame.right) / 2;
  }

  /**
   * Light the boxes in order, each with its values and a sentence.
   * @param {Stage[]} stages
   * @param {number} pause - milliseconds a stage; 0: all at once
   * @param {(sentence: string) => void} say
   */
  async run(stages, pause, say) {
    this.show(this.half);
    const token = this.token;
    const slow = pause > 0 && !calm();
    this.hurried = false;
    if (slow) {
      for (const part of this.root.querySelectorAll("a"))
        part.parentElement.classList.add("wait");
    }
    for (const { boxes, values = {}, says } of stages) {
      if (token !== this.token) return;
      for (const link of this.boxes.values()) link.classList.remove("now");
      for (const name of boxes) {
        this.boxes.get(name).classList.add("on");
        this.boxes.get(name).classList.toggle("now", slow);
      }
      for (const [name, lines] of Object.entries(values)) this.write(name, lines);
      if (slow) {
        say(says);
        this.scrollTo(this.boxes.get(boxes[0]));
      }
      const until = performance.now() + pause;
      while (slow && !this.hurried && performance.now() < until) await wait(50);
    }
    for (const link of this.boxes.values()) link.classList.remove("now");
  }
}

/** At most so many lines, of at most ten characters. */
function shortened(values, room) {
  const short = values.map((text) =>
    text.length <= 10 ? text : `${text.slice(0, 9)}…`,
  );
  if (short.length <= room) return short;
  return [...short.slice(0, room - 2), "⋮", short.at(-1)];
}
