// What test_site.py asks of an open page. Each function returns what is wrong, so nothing is found on a good page.
({
  // What is wider than the window. The page cuts that off instead of scrolling, so each element is asked;
  // what stands in a box that scrolls by itself (code, tables, formulas) may be as wide as it likes.
  sticksOut() {
    const wide = document.documentElement.clientWidth + 1, found = [];
    const scrolls = (e) => {
      for (let box = e.parentElement; box && box !== document.body; box = box.parentElement)
        if (box.getBoundingClientRect().right <= wide && /auto|scroll|hidden/.test(getComputedStyle(box).overflowX)) return true;
    };
    if (document.documentElement.scrollWidth > wide) found.push(`the page: ${document.documentElement.scrollWidth} px`);
    for (const e of document.querySelectorAll("main *, header *")) {
      const { width, height, left, right } = e.getBoundingClientRect();
      if (!width || !height || (right <= wide && left >= -1)) continue;
      if (e.closest(".katex-mathml, .visually-hidden") || scrolls(e)) continue;
      const name = `${e.tagName.toLowerCase()}.${e.getAttribute("class")}`;
      found.push(`${name}: ${Math.round(left)} to ${Math.round(right)} px, ${e.textContent.trim().slice(0, 60)}`);
    }
    return found.slice(0, 5);
  },

  // Formulas that a reader would see as TeX, and commands that KaTeX does not know, which it prints in red.
  rawMath() {
    const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), found = [];
    while (walk.nextNode()) {
      const text = walk.currentNode.data, parent = walk.currentNode.parentElement;
      if (parent.closest("pre, code, script, style, .katex, svg")) continue;
      if (/\$\$|\\\(|\\\[|\$[^$\n]*[\\_^{][^$\n]*\$/.test(text)) found.push(text.trim().slice(0, 80));
    }
    const red = document.querySelectorAll(".katex-error, .katex [style*='color:#cc0000']");
    return found.concat([...red].map((e) => e.textContent));
  },

  // Pictures without a text for those who cannot see them, and pictures that did not load.
  mutePictures() {
    const text = (id) => (document.getElementById(id)?.textContent || "").trim();
    const words = (ids) => (ids || "").split(/ +/).map(text).join("");
    const mute = (e) => e.tagName === "IMG" ? !(e.getAttribute("alt") || "").trim() || !e.complete || !e.naturalWidth
      : e.getAttribute("role") !== "img" || !(e.getAttribute("aria-label") || words(e.getAttribute("aria-labelledby")));
    const pictures = [...document.querySelectorAll("img, main svg")].filter((e) => !e.closest("[aria-hidden=true], .katex"));
    return pictures.filter(mute).map((e) => e.outerHTML.slice(0, 120));
  },

  // Text too faint for its background: a contrast below 4.5, or 3 if large (WCAG 2, level AA).
  faintText() {
    const parse = (colour) => {
      const n = colour.match(/[\d.]+/g).map(Number);
      const rgb = colour.startsWith("color(srgb") ? n.slice(0, 3).map((x) => 255 * x) : n.slice(0, 3);
      return [...rgb, n[3] ?? 1];
    };
    const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
    const behind = (e) => {
      if (!e) return [255, 255, 255];
      const own = parse(getComputedStyle(e).backgroundColor);
      return own[3] === 1 ? own : over(own, behind(e.parentElement));
    };
    const luminance = (colour) => {
      const [r, g, b] = colour.map((x) => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b;
    };
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = {};
    while (walk.nextNode()) {
      const e = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
      if (!text || e.closest("svg, script, style, .katex-mathml")) continue;
      if (!e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
      const style = getComputedStyle(e), ground = behind(e);
      const [a, b] = [luminance(over(parse(style.color), ground)), luminance(ground)];
      const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      if (contrast >= (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) continue;
      found[`${e.tagName.toLowerCase()}.${e.className}`] = `${contrast.toFixed(1)}: ${text.slice(0, 40)}`;
    }
    return found;
  },
})
