"use strict";
// Draws what the data says, in the colours of the look, for the width of the window; and switches plan, shape and look.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const state = { plan: data.picked, shape: 0, everything: false };
  const NARROW_PX = 600;
  const [CELL_PX, BETWEEN_PX] = [24, 36];
  const MOST_COVERED_PX2 = 40;
  const LEGEND = { orientation: "h", x: 0, xanchor: "left", xref: "container", y: 0, yref: "container", yanchor: "bottom" };
  // Where plotly can write beside a point, and which way that is.
  const SIDES = [["top right", 1, -1], ["top left", -1, -1], ["bottom right", 1, 1], ["bottom left", -1, 1], ["middle right", 1, 0],
    ["middle left", -1, 0], ["top center", 0, -1], ["bottom center", 0, 1]];

  // -- colours and look ------------------------------------------------------------------------------------------

  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;

  /** What a colour of style.css is in the present look. */
  function colour(name) {
    probe.style.color = name;
    return getComputedStyle(probe).color;
  }

  /** A copy of a chart in which every colour's name is replaced by the colour. */
  function coloured(value) {
    if (typeof value === "string") return value.startsWith("var(--") ? colour(value) : value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each)]));
    }
    return value;
  }

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.look ? root.dataset.look === "dark" : prefersDark.matches);

  function setLook(look) {
    if (look) root.dataset.look = look;
    byId("look").textContent = isDark() ? "Light look" : "Dark look";
    drawAll();
  }

  // -- drawing ---------------------------------------------------------------------------------------------------

  /** Draw a chart in place of what was there, with the common layout. */
  function draw(id, chart, height) {
    const place = byId(id);
    const narrow = place.clientWidth < NARROW_PX;
    const legendPx = chart.layout.showlegend ? legendHeight(chart.data, place.clientWidth) : 0;
    const axis = { gridcolor: "var(--line)", zerolinecolor: "var(--line)", linecolor: "var(--muted)", automargin: true,
      fixedrange: narrow };
    const layout = {
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: "var(--ink)" },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow ? 44 : 60, r: 14, t: 14, b: 50 + legendPx },
      legend: LEGEND,
      hoverlabel: { bgcolor: "var(--panel)", bordercolor: "var(--muted)", font: { color: "var(--ink)" }, align: "left" },
      dragmode: narrow ? false : "zoom",
      width: place.clientWidth,
      height: height + legendPx,
      ...chart.layout,
    };
    if (chart.layout.legend) layout.legend = { ...LEGEND, ...chart.layout.legend };
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis/.test(name)) {
        const own = layout[name];
        layout[name] = { ...axis, ...own };
        if (own.title) layout[name].title = { ...own.title, standoff: 8 };
      }
    }
    // Named one by one: what plotly offers otherwise includes sending the chart to a server.
    const config = { displaylogo: false, responsive: false, displayModeBar: narrow ? false : "hover", plotlyServerURL: "",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    return Plotly.react(place, coloured(chart.data), coloured(layout), config);
  }

  /** Pixels that a legend below a chart takes: as many entries beside one another as have room. */
  function legendHeight(traces, width) {
    const names = traces.map((trace) => trace.name).filter(Boolean);
    const widest = Math.max(...names.map((name) => name.length)) * 7.5 + 52;
    return Math.ceil(names.length / Math.max(1, Math.floor(width / widest))) * 21 + 8;
  }

  /** The ring around the picked plan. */
  function ring(x, y, size) {
    return { type: "scatter", mode: "markers", x: [x], y: [y], hoverinfo: "skip",
      marker: { symbol: "circle-open", size, color: "var(--ink)", line: { width: 2 } } };
  }

  /** Put each point's number on the side of it where it covers least, and leave it out where it covers much. */
  function withLabels(chart, id, height) {
    const width = byId(id).clientWidth - 80;
    const at = (value, axis) => ((axis.type === "log" ? Math.log10(value) : value) - axis.range[0]) / (axis.range[1] - axis.range[0]);
    const points = chart.data.flatMap((trace, number) => (trace.customdata || []).map((_, index) => ({
      number, index, x: at(trace.x[index], chart.layout.xaxis) * width, y: (1 - at(trace.y[index], chart.layout.yaxis)) * (height - 70),
      radius: (Array.isArray(trace.marker.size) ? trace.marker.size[index] : trace.marker.size) / 2,
      wide: String(trace.text[index]).replace(/<[^>]*>/g, "").length * 8,
    })));
    const taken = points.map((point) => [point.x - point.radius, point.y - point.radius, point.x + point.radius, point.y + point.radius]);
    const sides = chart.data.map(() => []);
    const texts = chart.data.map((trace) => [...(trace.text || [])]);
    for (const point of points.reverse()) {
      const [side, box, covered] = SIDES.map(([name, right, down]) => {
        const reach = point.radius + 4;
        const x = point.x + right * (reach + point.wide / 2) - point.wide / 2;
        const y = point.y + down * (reach + 6) - 6;
        return [name, [x, y, x + point.wide, y + 12]];
      }).map(([name, place]) => [name, place, taken.reduce((sum, other) => sum + overlap(place, other), 0)
        + (place[0] < 0 || place[2] > width || place[1] < 0 || place[3] > height - 70 ? 1000 : 0)])
        .reduce((best, each) => (each[2] < best[2] ? each : best));
      if (covered > MOST_COVERED_PX2) texts[point.number][point.index] = "";
      else taken.push(box);
      sides[point.number][point.index] = side;
    }
    const data = chart.data.map((trace, number) => (trace.customdata
      ? { ...trace, textposition: sides[number], text: texts[number] } : trace));
    return { ...chart, data };
  }

  /** Square pixels that two boxes share. */
  function overlap(a, b) {
    return Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  }

  function drawFront() {
    const plan = data.plans[state.plan];
    const layout = { ...data.front.layout };
    if (state.everything) layout.yaxis = { ...layout.yaxis, ...data.front.everything };
    const height = byId("front-chart").clientWidth < NARROW_PX ? 400 : 500;
    const labelled = withLabels({ data: data.front.data, layout }, "front-chart", height);
    labelled.data.push(ring(plan.x, plan.y, 34));
    clickable(draw("front-chart", labelled, height));
    const [words, button] = byId("beyond").children;
    byId("beyond").hidden = data.front.beyond === 0;
    words.textContent = state.everything ? "All plans are shown."
      : `${data.front.beyond} of ${data.plans.length} plans lie above what is shown.`;
    button.textContent = state.everything ? "Show the part near the front" : "Show all plans";
  }

  function drawPrediction() {
    const plan = data.plans[state.plan];
    const labelled = withLabels(data.prediction, "prediction-chart", 380);
    labelled.data.push(ring(plan.time_ms, plan.predicted_ms, 26));
    clickable(draw("prediction-chart", labelled, 380));
  }

  /** Pick the plan of a point that is clicked; the charts keep their place, so once is enough. */
  function clickable(drawn) {
    drawn.then((place) => {
      if (place.dataset.clickable) return;
      place.dataset.clickable = "yes";
      place.on("plotly_click", (event) => {
        const point = event.points.find((each) => each.customdata !== undefined);
        if (point) pick(point.customdata);
      });
    });
  }

  function drawShares() {
    const plan = data.plans[state.plan];
    for (const name of ["time", "loss"]) draw(`${name}-chart`, plan[name], 70 + 28 * plan.time.bars);
  }

  function drawShape() {
    if (!data.shapes.length) return;
    draw("latency-chart", data.shapes[state.shape], 420);
    document.querySelectorAll("table.shape").forEach((table, index) => { table.hidden = index !== state.shape; });
  }

  // -- the heat map of formats -----------------------------------------------------------------------------------

  /** Layers of the picked plan by place: cells[row][column] is a list of [layer, choice]. */
  function cellsOf(plan) {
    const cells = data.rows.map(() => data.columns.map(() => []));
    plan.choices.forEach((choice, index) => {
      const layer = data.layers[index];
      cells[layer.row][layer.column].push([layer, data.choices[choice]]);
    });
    return cells;
  }

  /** The format that most layers of a cell have; undefined where the cell is empty. */
  function mainFormat(cell) {
    const counts = new Map();
    for (const [, choice] of cell) counts.set(choice.format, (counts.get(choice.format) || 0) + 1);
    return [...counts.entries()].sort((a, b) => b[1] - a[1])[0];
  }

  function cellText(cell) {
    const main = mainFormat(cell);
    return main ? data.formats[main[0]].code + (main[1] < cell.length ? "+" : "") : "";
  }

  function cellHover(cell) {
    const lines = cell.slice(0, 6).map(([layer, choice]) => `<b>${escaped(layer.name)}</b><br>${escaped(data.formats[choice.format].id)}<br>`
      + `${escaped(choice.route)}<br>${choice.time} a request, loss ${choice.loss}, ${choice.memory}`);
    return lines.join("<br>") + (cell.length > 6 ? `<br>and ${cell.length - 6} more` : "");
  }

  function escaped(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  /** Rows are types, columns blocks; where the blocks do not fit beside one another they go on below, in bands. */
  function drawLayers() {
    const cells = cellsOf(data.plans[state.plan]);
    const place = byId("layers-chart");
    const labelPx = Math.min(Math.max(...data.rows.map((row) => row.length)) * 7.2 + 16, place.clientWidth * 0.4);
    const cellPx = 7 * Math.max(...cells.flat().map((cell) => cellText(cell).length)) + 7;
    const fitting = Math.max(1, Math.floor((place.clientWidth - labelPx - 14) / cellPx));
    const perBand = Math.ceil(data.columns.length / Math.ceil(data.columns.length / fitting));
    const bands = [];
    for (let start = 0; start < data.columns.length; start += perBand) {
      const columns = data.columns.map((_, column) => column).slice(start, start + perBand);
      bands.push({ columns, rows: data.rows.map((_, row) => row).filter((row) => columns.some((column) => cells[row][column].length)) });
    }
    const insidePx = bands.reduce((sum, band) => sum + CELL_PX * band.rows.length, 0) + BETWEEN_PX * (bands.length - 1);
    const fills = data.formats.flatMap((format, index) => [index, index + 1].map(
      (edge) => [edge / data.formats.length, `var(--h${format.colour})`]));
    const chart = { data: [], layout: { margin: { l: labelPx, r: 14, t: 4, b: BETWEEN_PX }, showlegend: false } };
    let usedPx = 0;
    bands.forEach(({ columns, rows }, number) => {
      const suffix = number ? String(number + 1) : "";
      const band = rows.map((row) => columns.map((column) => cells[row][column]));
      chart.data.push({
        type: "heatmap", xaxis: `x${suffix}`, yaxis: `y${suffix}`, xgap: 2, ygap: 2, showscale: false,
        zmin: 0, zmax: data.formats.length, colorscale: fills, x: columns.map((_, index) => index), y: rows.map((_, index) => index),
        z: band.map((row) => row.map((cell) => (cell.length ? mainFormat(cell)[0] + 0.5 : null))),
        text: band.map((row) => row.map(cellText)), texttemplate: "%{text}", textfont: { size: 11.5, color: "var(--ink)" },
        hovertext: band.map((row) => row.map(cellHover)), hovertemplate: "%{hovertext}<extra></extra>", hoverongaps: false,
      });
      const common = { showgrid: false, zeroline: false, fixedrange: true };
      chart.layout[`xaxis${suffix}`] = { ...common, anchor: `y${suffix}`, range: [-0.5, bands[0].columns.length - 0.5], tickangle: 0,
        tickvals: columns.map((_, index) => index), ticktext: columns.map((column) => data.columns[column]) };
      const ends = [usedPx, usedPx + CELL_PX * rows.length].map((px) => Math.max(0, 1 - px / insidePx));
      chart.layout[`yaxis${suffix}`] = { ...common, anchor: `x${suffix}`, range: [rows.length - 0.5, -0.5], automargin: false,
        domain: ends.reverse(), tickvals: rows.map((_, index) => index), ticktext: rows.map((row) => fitted(data.rows[row], labelPx)) };
      usedPx += CELL_PX * rows.length + BETWEEN_PX;
    });
    const height = insidePx + 4 + BETWEEN_PX;
    draw("layers-chart", chart, height);
  }

  /** A label cut where it has no room; the table has it whole. */
  function fitted(text, px) {
    const most = Math.max(4, Math.floor((px - 16) / 6.6));
    return escaped(text.length > most ? `…${text.slice(text.length - most + 1)}` : text);
  }

  // -- words and tables of the picked plan -----------------------------------------------------------------------

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  /** Fill a table: the first cell of a row is its head; on narrow windows the others bring the heads of their columns. */
  function fillTable(id, rows) {
    const heads = [...byId(id).tHead.querySelectorAll("th")];
    byId(id).tBodies[0].replaceChildren(...rows.map((row) => {
      const line = element("tr");
      row.forEach((text, index) => line.append(index === 0 ? element("th", text, { scope: "row" })
        : element("td", text, { "data-label": heads[index].textContent, class: heads[index].className })));
      return line;
    }));
  }

  function writePlan() {
    const plan = data.plans[state.plan];
    byId("plan-title").textContent = `${plan.glyph} ${plan.number}. ${plan.label} (plan ${plan.short}; ${plan.family})`;
    byId("plan-facts").replaceChildren(...plan.facts.map(([term, value]) => {
      const pair = element("div");
      pair.append(element("dt", term), element("dd", value));
      return pair;
    }));
    const counts = new Map();
    for (const choice of plan.choices) counts.set(data.choices[choice].format, (counts.get(data.choices[choice].format) || 0) + 1);
    byId("formats").replaceChildren(...[...counts.entries()].sort((a, b) => b[1] - a[1]).map(([index, count]) => {
      const format = data.formats[index];
      const item = element("li");
      item.append(element("span", format.code, { class: "swatch", style: `background: var(--h${format.colour})` }),
        ` ${format.id}${format.unquantized ? " (left alone)" : ""}, ${count} ${count === 1 ? "layer" : "layers"}`);
      return item;
    }));
    fillTable("layers-table", plan.choices.map((index, layer) => {
      const choice = data.choices[index];
      return [data.layers[layer].name, data.layers[layer].shape, data.formats[choice.format].id, choice.route, choice.time, choice.loss,
        choice.memory, choice.reason];
    }));
    fillTable("phases-table", plan.phases);
    fillTable("left-table", plan.left_alone);
    byId("left-table").hidden = plan.left_alone.length === 0;
    byId("none-left").hidden = plan.left_alone.length > 0;
    writeShares(plan);
    byId("plan-select").value = String(state.plan);
    document.querySelectorAll("tr[data-plan]").forEach((row) => row.classList.toggle("picked", Number(row.dataset.plan) === state.plan));
    document.querySelectorAll("button.pick").forEach((button) => {
      button.setAttribute("aria-pressed", String(Number(button.dataset.plan) === state.plan));
    });
  }

  function writeShares(plan) {
    const head = element("tr");
    head.append(element("th", "Type of layer", { scope: "col" }));
    for (const name of plan.shares.heads) head.append(element("th", name, { scope: "col", class: "number" }));
    byId("shares-table").tHead.replaceChildren(head);
    fillTable("shares-table", plan.shares.rows);
  }

  // -- what the reader does --------------------------------------------------------------------------------------

  function pick(index) {
    state.plan = index;
    history.replaceState(null, "", `#plan-${data.plans[index].short}`);
    writePlan();
    drawFront();
    drawLayers();
    drawShares();
    drawPrediction();
  }

  function drawAll() {
    drawFront();
    drawLayers();
    drawShares();
    drawPrediction();
    drawShape();
  }

  for (const [index, plan] of data.plans.entries()) {
    byId("plan-select").append(element("option", `${plan.glyph} ${plan.number}. ${plan.label} (${plan.short})`, { value: index }));
  }
  const named = data.plans.findIndex((plan) => location.hash === `#plan-${plan.short}`);
  if (named >= 0) state.plan = named;
  byId("plan-select").addEventListener("change", (event) => pick(Number(event.target.value)));
  document.querySelectorAll("button.pick").forEach((button) => button.addEventListener("click", () => pick(Number(button.dataset.plan))));
  const shapes = byId("shape-select");
  if (shapes) shapes.addEventListener("change", () => { state.shape = Number(shapes.value); drawShape(); });
  byId("beyond").querySelector("button").addEventListener("click", () => { state.everything = !state.everything; drawFront(); });
  byId("look").addEventListener("click", () => setLook(isDark() ? "light" : "dark"));
  prefersDark.addEventListener("change", () => setLook());
  let width = innerWidth;
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (innerWidth !== width) { width = innerWidth; drawAll(); } }, 120);
  });
  if (innerWidth < NARROW_PX) document.querySelectorAll("details").forEach((each) => { each.open = false; });
  writePlan();
  setLook();
})();
