// What test_lab.py asks of a notebook that is open in JupyterLab (`notebook`, its panel).
({
  // Opens a notebook, with a kernel or without; from then on it is `notebook`.
  async open(path, withKernel) {
    const kernelPreference = { shouldStart: withKernel, canStart: withKernel, autoStartDefault: withKernel };
    const options = { path, factory: "Notebook", kernelPreference };
    window.notebook = await window.jupyterapp.commands.execute("docmanager:open", options);
    await window.notebook.context.ready;
    await window.notebook.revealed;
    if (withKernel) await window.notebook.sessionContext.ready;
  },

  // "Run all" of the menu; how far it has come is in `progress`.
  runAll(notebook) {
    window.progress = { done: false, pictures: 0 };
    const showing = () => notebook.content.node.querySelectorAll(".jp-OutputArea-output img").length;
    const look = setInterval(() => { window.progress.pictures = Math.max(window.progress.pictures, showing()); }, 200);
    window.jupyterapp.commands.execute("notebook:run-all-cells").finally(() => {
      clearInterval(look);
      window.progress.done = true;
    });
  },

  // Cells that raised, and cells that were not run.
  failures(notebook) {
    return notebook.content.widgets.flatMap((cell, i) => {
      if (cell.model.type !== "code") return [];
      const error = [...Array(cell.outputArea.model.length).keys()].map((j) => cell.outputArea.model.get(j).toJSON()).find((o) => o.output_type === "error");
      if (error) return [`cell ${i}: ${error.ename}: ${error.evalue}`];
      return cell.model.executionCount || !cell.model.sharedModel.source.trim() ? [] : [`cell ${i} was not run`];
    });
  },

  // Whether all cells are there, Markdown is drawn, and pictures are decoded.
  isDrawn(notebook) {
    const { model, widgets, node } = notebook.content;
    const isProse = (cell) => cell.model.type === "markdown";
    const hasProse = (cell) => cell.node.querySelector(".jp-MarkdownOutput:not(.lm-mod-hidden) *");
    return widgets.length === model.cells.length
      && widgets.every((cell) => !isProse(cell) || hasProse(cell))
      && [...node.querySelectorAll("img")].every((image) => image.complete);
  },

  // Whether JupyterLab trusts what is shown; a notebook without outputs it always does.
  isTrusted(notebook) {
    const shown = notebook.content.widgets.filter((cell) => cell.outputArea?.widgets.length);
    return shown.length > 0 && shown.every((cell) => cell.model.trusted);
  },

  // Takes away what was saved.
  clear(notebook) {
    return window.jupyterapp.commands.execute("notebook:clear-all-cell-outputs");
  },

  // Adds a line to the cell with this tag.
  appendTo(notebook, tag, text) {
    const cell = [...notebook.model.cells].find((model) => (model.getMetadata("tags") ?? []).includes(tag));
    cell.sharedModel.setSource(`${cell.sharedModel.source}\n${text}`);
  },

  // Adds a cell at the end.
  append(notebook, source) {
    notebook.model.sharedModel.addCell({ cell_type: "code", source });
  },

  close(notebook) {
    notebook.context.model.dirty = false;
    notebook.dispose();
  },

  changeTheme(theme) {
    return window.jupyterapp.commands.execute("apputils:change-theme", { theme: `JupyterLab ${theme}` });
  },

  height(notebook) {
    return notebook.content.node.querySelector(".jp-WindowedPanel-viewport, .jp-WindowedPanel-inner").scrollHeight;
  },

  // Outputs of which a plain text is shown although the notebook has a picture or a page of it.
  plainText(notebook) {
    const found = [];
    notebook.content.widgets.forEach((cell, i) => {
      (cell.outputArea?.widgets ?? []).forEach((output, j) => {
        const saved = Object.keys(cell.outputArea.model.get(j).data);
        const shown = [...output.node.querySelectorAll("[data-mime-type]")].map((e) => e.dataset.mimeType);
        const richer = saved.filter((type) => /^image\/|html$|vegalite|markdown$|latex$/.test(type));
        if (richer.length && shown.includes("text/plain")) found.push(`cell ${i}: ${richer} shown as text`);
        // a picture that moves draws itself, and a bar of progress goes when it is full
        const isAlive = saved.some((type) => /vegalite|widget-view/.test(type));
        if (!shown.length && !isAlive) found.push(`cell ${i}: ${saved} not shown`);
      });
    });
    return found;
  },

  // Syntax of the documentation's that JupyterLab leaves as it stands, and formulas that it cannot draw.
  rawSyntax(notebook) {
    const found = [];
    for (const cell of notebook.content.node.querySelectorAll(".jp-MarkdownOutput")) {
      const copy = cell.cloneNode(true);
      copy.querySelectorAll("code, pre, mjx-container, .MathJax, script, svg, annotation").forEach((e) => e.remove());
      const raw = copy.textContent.match(/:::|\{\{<|\{[#.][\w-]+[^}]*\}|@(eq|fig|sec|tbl)-\w+|\$\$|\\\(|\[\^\w+\]/);
      if (raw) found.push(`${raw[0]}: ${copy.textContent.trim().slice(0, 80)}`);
      cell.querySelectorAll("mjx-merror, .MathJax_Error, [data-mjx-error]").forEach((e) => found.push(`formula: ${e.textContent}`));
    }
    return found;
  },

  // Code that is wider than its cell.
  wideCode(notebook) {
    const wide = [];
    notebook.content.widgets.forEach((cell, i) => {
      for (const e of cell.node.querySelectorAll(".cm-scroller"))
        if (e.scrollWidth > e.clientWidth + 1) wide.push(`cell ${i}: ${e.scrollWidth} px of ${e.clientWidth}`);
    });
    return wide;
  },

  // Pictures that did not load, or are wider than their cell.
  badPictures(notebook) {
    const found = [];
    for (const e of notebook.content.node.querySelectorAll(".jp-OutputArea-output img, .jp-MarkdownOutput img")) {
      const box = e.closest(".jp-OutputArea-output, .jp-MarkdownOutput").getBoundingClientRect();
      if (!e.complete || !e.naturalWidth) found.push(`not loaded: ${e.outerHTML.slice(0, 80)}`);
      else if (e.getBoundingClientRect().right > box.right + 1) found.push(`${Math.round(e.getBoundingClientRect().width)} px wide in ${Math.round(box.width)}`);
    }
    return found;
  },

  // Words of outputs and of prose (code in it has JupyterLab's own colours) that are too faint for their ground: a contrast below 4.5, or 3 if large.
  faintText(notebook) {
    const parse = (colour) => {
      const n = (colour.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
      return [...(colour.startsWith("color(srgb") ? n.slice(0, 3).map((x) => 255 * x) : n.slice(0, 3)), n[3] ?? 1];
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
    const found = {};
    for (const area of notebook.content.node.querySelectorAll(".jp-RenderedHTMLCommon, .jp-RenderedText")) {
      const walk = document.createTreeWalker(area, NodeFilter.SHOW_TEXT);
      while (walk.nextNode()) {
        const e = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
        if (!text || e.closest(".jp-RenderedMarkdown pre, svg, script, style, mjx-assistive-mml, .jp-InternalAnchorLink")) continue;
        const style = getComputedStyle(e), ground = behind(e);
        if (parse(style.color)[3] === 0) continue;
        const [a, b] = [luminance(over(parse(style.color), ground)), luminance(ground)];
        const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found[`${e.tagName} ${style.color}`] = `${contrast.toFixed(1)}: ${text.slice(0, 40)}`;
      }
    }
    return Object.entries(found).map(([name, words]) => `${name} ${words}`);
  },
})
