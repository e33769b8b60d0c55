// Each interactive picture is a static one until here, and stays it where scripts are off. Axes, words and numbers take the
// page's colours from styles.css, which is why the picture is drawn as SVG.
document.querySelectorAll(".interactive").forEach((box) => {
  const spec = JSON.parse(box.querySelector("script").textContent);
  vegaEmbed(box.querySelector("div"), spec, { actions: false, renderer: "svg", defaultStyle: false }).then(({ view }) => {
    const svg = box.querySelector("svg");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", spec.description);
    box.view = view; // for tests
  });
});
