"use strict";
// Texts of the run are shown as text, not as markup: by textContent here, and by entities where plotly would parse markup.
const run = JSON.parse(document.getElementById("content").textContent);
const $ = (id) => document.getElementById(id);
const SEVERITIES = ["notice", "warning", "critical"];
const VERDICT_COLOURS = { healthy: "healthy", suspected: "warning", confirmed: "critical", damaged: "critical" };
const MISSING = -32768, NOTHING = -46, DECADES = 700; // constants of the cells, as in content.py

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
const entities = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const whole = (value) => value.toLocaleString("en");
const counted = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
function number(value) {
  if (value === null || value === undefined || value === "nan") return "NaN";
  if (value === "inf" || value === "-inf") return "Inf";
  const size = Math.abs(value);
  return value === 0 || (size >= 1e-3 && size < 1e4) ? String(+value.toPrecision(4)) : value.toExponential(2);
}
const real = (values) => values.map((value) => (value === "nan" ? null : value));

// Heat maps: 16 bits per cell, one line per layer.
function decoded(part) {
  const columns = part.x.length, bytes = Uint8Array.from(atob(part.cells), (char) => char.charCodeAt(0));
  const cells = new Int16Array(bytes.buffer);
  const rows = run.layers.map((_, layer) =>
    Array.from(cells.subarray(layer * columns, (layer + 1) * columns), (cell) => (cell === MISSING ? null : cell / DECADES)));
  const packed = part.broken ? Uint8Array.from(atob(part.broken), (char) => char.charCodeAt(0)) : null;
  const stride = Math.ceil(columns / 8);
  const broken = (layer, column) => packed !== null && (packed[layer * stride + (column >> 3)] >> (7 - (column & 7)) & 1) === 1;
  return { x: part.x, width: part.width, rows, broken, any: packed !== null };
}
const gradient = run.gradient ? decoded(run.gradient) : null;
const weight = run.weight ? decoded(run.weight) : null;

function middle(row) {
  const known = row.filter((value) => value !== null && value > NOTHING).sort((a, b) => a - b);
  return known.length ? known[known.length >> 1] : null;
}
function against(rows, reference) {
  return rows.map((row) => {
    const typical = reference(row);
    return row.map((value) => (value === null || typical === null ? null : value - typical));
  });
}
// The colours span the values of most cells. A value beyond has the last colour, and the tooltip shows its number.
function span(rows) {
  const known = rows.flat().filter((value) => value !== null && value > NOTHING).sort((a, b) => a - b);
  if (!known.length) return [0, 1];
  const low = known[Math.floor(known.length * 0.01)], high = known[Math.floor((known.length - 1) * 0.995)];
  return [low, Math.min(Math.max(high, low + 1), Math.max(low + 6, known[known.length >> 1] + 4))];
}

const state = { relative: false };
const RISING = [[0, "#3b5fa8"], [0.5, "#f3f1ea"], [0.75, "#ee9b55"], [1, "#b3152d"]];
const RISING_DARK = [[0, "#5f8ee0"], [0.5, "#23272e"], [0.75, "#d07a35"], [1, "#ff5d5d"]];
const LEVELS = [[0, "#eef1f4"], [0.35, "#a9c3dc"], [0.6, "#5b86b8"], [0.8, "#7a3f8f"], [1, "#c2185b"]];
const LEVELS_DARK = [[0, "#1f2630"], [0.35, "#2f4f74"], [0.6, "#4f86c2"], [0.8, "#b06fd0"], [1, "#ff7eb0"]];
const isDark = () => document.documentElement.dataset.theme === "dark";

function ticks(low, high) {
  const values = [], step = Math.max(1, Math.ceil((high - low) / 6));
  for (let value = Math.ceil(low); value <= high; value += step) values.push(value);
  return values;
}
function power(value) {
  return value >= -3 && value <= 3 ? String(+(10 ** value).toPrecision(1)) : `10<sup>${value}</sup>`;
}

// Panels from top to bottom: key, height in pixels, title.
const layerHeight = Math.max(240, Math.min(780, run.layers.length * (run.layers.length > 60 ? 3 : 13)));
const panels = [
  ["loss", run.loss ? 130 : 0, "loss"],
  ["norm", 150, "global gradient norm"],
  ["gradient", gradient ? layerHeight : 0, "gradient norm of each layer"],
  ["clip", run.clip_coefficient ? 90 : 0, "clip coefficient"],
  ["rate", run.learning_rate ? 90 : 0, "learning rate"],
  ["scale", run.loss_scale ? 90 : 0, "loss scale"],
  ["weight", weight ? Math.max(140, layerHeight * 0.55) : 0, "weight norm against its first"],
].filter((panel) => panel[1] > 0);
const GAP = 44, TOP = 30, BOTTOM = 46;
const inner = panels.reduce((sum, panel) => sum + panel[1], 0) + GAP * (panels.length - 1);
const axes = {};
let filled = 0;
panels.forEach(([key, height, title], index) => {
  axes[key] = { id: index ? String(index + 1) : "", domain: [1 - (filled + height) / inner, 1 - filled / inner], title };
  filled += height + GAP;
});

function line(key, values, name) {
  return {
    type: "scatter", mode: values.x.length < 2 ? "markers" : "lines", name, x: values.x, y: real(values.y), yaxis: "y" + axes[key].id,
    line: { color: colour("blue"), width: 1.3 }, hovertemplate: `step %{x:,}<br>${name} %{y:.4g}<extra></extra>`,
  };
}
function stops(key, values, name) {
  const at = new Map(values.x.map((x, index) => [x, real(values.y)[index]]));
  const known = real(values.y).filter((value) => value !== null && value > 0);
  const rest = known.length ? known[known.length - 1] : 1;
  return {
    type: "scatter", mode: "markers", name, x: values.bad, y: values.bad.map((x) => at.get(x) ?? rest), yaxis: "y" + axes[key].id,
    marker: { symbol: "x", size: 9, color: colour("critical") }, hovertemplate: `after step %{x:,}<br>${name}<extra></extra>`,
  };
}
function heat(key, part, rows, scale, range, title) {
  const shown = rows.map((row) => row.map((value) => (value === null ? null : Math.max(range[0], Math.min(range[1], value)))));
  const domain = axes[key].domain, marks = ticks(range[0], range[1]);
  return {
    type: "heatmap", x0: part.x[0], dx: part.width, z: shown, yaxis: "y" + axes[key].id, zmin: range[0], zmax: range[1], colorscale: scale,
    hoverinfo: "none", name: key, zsmooth: false,
    colorbar: {
      x: 1.008, xanchor: "left", y: (domain[0] + domain[1]) / 2, len: Math.max(0.06, (domain[1] - domain[0]) * 0.9), thickness: 9,
      outlinewidth: 0, tickvals: marks, ticktext: marks.map((value) => title + power(value)), tickfont: { size: 11, color: colour("soft") },
    },
  };
}
function brokenCells(key, part) {
  const z = part.rows.map((row, layer) => row.map((_, column) => (part.broken(layer, column) ? 1 : null)));
  const full = colour("critical");
  return { type: "heatmap", x0: part.x[0], dx: part.width, z, yaxis: "y" + axes[key].id, colorscale: [[0, full], [1, full]], showscale: false, hoverinfo: "none", name: key };
}

function traces() {
  const made = [], dark = isDark();
  if (run.loss) {
    made.push(line("loss", run.loss, "loss"));
    if (run.loss.bad.length) made.push(stops("loss", run.loss, "the loss is not finite"));
  }
  made.push(line("norm", run.global_norm, "global norm"));
  if (run.global_norm.bad.length) made.push(stops("norm", run.global_norm, "the norm is not finite"));
  if (gradient) {
    const rows = state.relative ? against(gradient.rows, middle) : gradient.rows;
    const range = state.relative ? [-2, 2] : span(rows);
    const scale = state.relative ? (dark ? RISING_DARK : RISING) : dark ? LEVELS_DARK : LEVELS;
    made.push(heat("gradient", gradient, rows, scale, range, state.relative ? "× " : ""));
    if (gradient.any) made.push(brokenCells("gradient", gradient));
  }
  if (run.clip_coefficient) made.push(line("clip", run.clip_coefficient, "clip coefficient"));
  if (run.learning_rate) made.push(line("rate", run.learning_rate, "learning rate"));
  if (run.loss_scale) made.push(line("scale", run.loss_scale, "loss scale"));
  if (weight) {
    const first = (row) => row.find((value) => value !== null && value > NOTHING) ?? null;
    made.push(heat("weight", weight, against(weight.rows, first), dark ? RISING_DARK : RISING, [-1, 1], "× "));
    if (weight.any) made.push(brokenCells("weight", weight));
  }
  return made;
}

// Incidents are shaded over all panels; a bar above shows how long auto-clip was on.
function shapes() {
  const made = [], last = run.step + 0.5;
  for (const incident of run.incidents) {
    const mark = colour(incident.severity);
    const x0 = incident.opened_step - 0.5, x1 = incident.closed_step === null ? last : incident.closed_step + 0.5;
    for (const key of ["loss", "norm", "clip", "rate", "scale"]) {
      if (axes[key]) made.push({ type: "rect", xref: "x", yref: "paper", x0, x1, y0: axes[key].domain[0], y1: axes[key].domain[1], fillcolor: mark, opacity: +colour("shade"), line: { width: 0 }, layer: "below" });
    }
    made.push({ type: "line", xref: "x", yref: "paper", x0, x1: x0, y0: 0, y1: 1, line: { color: mark, width: 1, dash: "dot" } });
    if (incident.clip) {
      const lifted = incident.clip.lifted_step ?? null, domain = axes.norm.domain;
      const released = lifted === null ? incident.clip.released_step ?? run.step : lifted - 1;
      made.push({ type: "rect", xref: "x", yref: "paper", x0: incident.clip.from_step - 0.5, x1: released + 0.5, y0: domain[1], y1: domain[1] + 7 / inner, fillcolor: colour("blue"), opacity: 0.8, line: { width: 0 } });
    }
  }
  return made;
}

function layout() {
  const soft = colour("soft"), grid = colour("grid");
  const made = {
    height: inner + TOP + BOTTOM, margin: { l: 24 + Math.max(40, ...run.labels.map((label) => 6.5 * label.length)), r: 84, t: TOP, b: BOTTOM },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: "zoom",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", size: 12, color: colour("ink") },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: colour("ink") },
    hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { color: colour("paper"), size: 12 } },
    xaxis: { title: { text: "step", font: { color: soft } }, gridcolor: grid, zeroline: false, tickformat: ",d", anchor: "y" + axes[panels[panels.length - 1][0]].id, fixedrange: false, tickfont: { color: soft } },
    shapes: shapes(),
    annotations: panels.map(([key, , title]) => ({ text: `<b>${title}</b>`, xref: "paper", yref: "paper", x: 0, y: axes[key].domain[1], xanchor: "left", yanchor: "bottom", yshift: 7, showarrow: false, font: { size: 12.5 } })),
  };
  for (const [key] of panels) {
    const axis = { domain: axes[key].domain, gridcolor: grid, zeroline: false, fixedrange: true, ticklabelstandoff: 5, tickfont: { size: 11, color: soft } };
    if (key === "gradient" || key === "weight") {
      const each = Math.ceil(run.layers.length / (axes[key].domain[1] - axes[key].domain[0]) / (inner / 13));
      const places = run.layers.map((_, place) => place).filter((place) => place % each === 0);
      Object.assign(axis, { range: [run.layers.length - 0.5, -0.5], tickvals: places, showgrid: false, ticks: "",
        ticktext: places.map((place) => entities(run.labels[place])),
        tickfont: { size: 10.5, color: soft, family: "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace" } });
    } else if (key === "clip") {
      axis.range = [0, 1.05];
    } else if (key === "rate") {
      Object.assign(axis, { rangemode: "tozero", exponentformat: "power", nticks: 4 });
    } else {
      const values = { loss: run.loss, norm: run.global_norm, scale: run.loss_scale }[key];
      if (real(values.y).every((value) => value === null || value > 0)) Object.assign(axis, { type: "log", exponentformat: "power", nticks: 5 });
    }
    made["yaxis" + axes[key].id] = axis;
  }
  return made;
}

const OPTIONS = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };
const picture = $("picture");
const draw = () => Plotly.react(picture, traces(), layout(), OPTIONS);

function showTip(event) {
  const point = event.points[0];
  if (point.data.type !== "heatmap") return;
  const part = point.data.name === "weight" ? weight : gradient, layer = Math.round(point.y), column = point.pointIndex ? point.pointIndex[1] : point.pointNumber[1];
  const value = part.rows[layer][column], from = Math.ceil(part.x[column] - part.width / 2), to = Math.floor(part.x[column] + part.width / 2);
  const typical = middle(part.rows[layer]);
  const lines = [run.common + run.layers[layer], to > from ? `steps ${whole(from)} to ${whole(to)}` : `step ${whole(Math.round(part.x[column]))}`];
  const kind = part === weight ? "weight norm" : "gradient norm";
  if (part.broken(layer, column)) lines.push("not finite");
  if (value !== null) lines.push(`${kind} ${value <= NOTHING ? "0" : number(10 ** value)}` + (typical === null ? "" : ` · median ${number(10 ** typical)}`));
  const tip = $("tip");
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const { clientX: x, clientY: y } = event.event;
  tip.style.left = Math.min(x + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(y + 14, innerHeight - tip.offsetHeight - 8) + "px";
}

// Head, stories, environment.
function fillHead() {
  $("verdict").textContent = run.verdict;
  $("verdict").style.color = colour(VERDICT_COLOURS[run.verdict]);
  $("standing").textContent = run.standing.join(" · ");
  $("run").textContent = run.run;
  const facts = run.facts, session = run.sessions[run.sessions.length - 1];
  const optimizer = facts.optimizer ? `${facts.optimizer}, rate ${number(facts.rate)}` : null;
  $("facts").textContent = [run.called, counted(run.layers.length, "layer"), counted(facts.parameters, "parameter"), optimizer,
    "began " + new Date(run.sessions[0].started * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }),
    run.sessions.length > 1 ? `resumed ${run.sessions.length - 1}×, last at step ${whole(session.first_step ?? 0)}` : null, run.state].filter(Boolean).join(" · ");
  const lastOf = (values) => (values && values.y.length ? number(values.y[values.y.length - 1]) : "not seen");
  const figures = [["steps", whole(run.step + 1)], ["last loss", lastOf(run.loss)], ["last global norm", lastOf(run.global_norm)],
    ["incidents", run.incidents.length ? `${run.incidents.length}, worst ${SEVERITIES[Math.max(...run.incidents.map((one) => SEVERITIES.indexOf(one.severity)))]}` : "none"]];
  if (run.last_loss_scale !== "nan") figures.push(["loss scale", number(run.last_loss_scale)]);
  if (run.facts.clip) figures.push(["clipped", counted(run.clipped_steps, "step")], ["skipped", counted(run.skipped_steps, "step")]);
  if (run.scaled_up_steps) figures.push(["scaled up", counted(run.scaled_up_steps, "step")]);
  for (const [name, value] of figures) {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    $("figures").append(pair);
  }
}
function listOf(lines, className) {
  const list = element("ul", undefined, className);
  for (const text of lines) list.append(element("li", text));
  return list;
}
function fillStories() {
  const home = $("stories");
  if (!run.incidents.length) home.append(element("p", "No incident was opened.", "quiet"));
  run.incidents.forEach((incident, place) => {
    const card = element("article"), head = element("header");
    card.style.setProperty("--mark", `var(--${incident.closed_step === null || incident.verdict === "damaged" ? incident.severity : "resolved"})`);
    card.style.borderLeftColor = `var(--${incident.severity})`;
    head.append(element("h3", run.headlines[place]), element("span", undefined, "grow"));
    const zoom = element("button", "show in picture");
    zoom.type = "button";
    zoom.addEventListener("click", () => {
      const end = incident.closed_step ?? Math.min(run.step, incident.opened_step + 60), room = Math.max(20, (end - incident.opened_step) * 0.3);
      Plotly.relayout(picture, { "xaxis.range": [Math.max(-0.5, incident.opened_step - room), Math.min(run.step + 0.5, end + room)] });
      picture.scrollIntoView({ behavior: "smooth" });
    });
    head.append(zoom);
    card.append(head);
    if (incident.layers.length > 1) {
      card.append(element("h4", "Layers in the order in which they left their band"));
      const more = incident.layers.length > 12 ? ` and ${incident.layers.length - 12} more` : "";
      card.append(element("div", incident.layers.slice(0, 12).join(" → ") + more, "names"));
    }
    if (incident.evidence.length) card.append(element("h4", "Evidence"), listOf(incident.evidence));
    if (run.clips[place]) card.append(element("h4", "Auto-clip"), element("div", run.clips[place]));
    if (incident.advice.length) card.append(element("h4", "What to do"), listOf(incident.advice, "advice"));
    home.append(card);
  });
  const kinds = [...new Set(run.incidents.map((incident) => incident.severity))];
  for (const kind of SEVERITIES.filter((one) => kinds.includes(one))) {
    const square = element("i");
    square.style.background = `var(--${kind})`;
    $("legend").append(square, kind);
  }
  if (run.incidents.some((incident) => incident.clip)) {
    const square = element("i");
    square.style.background = "var(--blue)";
    $("legend").append(square, "auto-clip on");
  }
  if (run.notes.length) {
    $("notes").hidden = false;
    for (const note of run.notes) $("notes").querySelector("ul").append(element("li", note));
  }
}
function tableOf(rows) {
  const table = element("table");
  for (const [name, value] of rows) {
    const row = element("tr");
    row.append(element("th", name), element("td", value));
    table.append(row);
  }
  return table;
}
function fillEnvironment() {
  const session = run.sessions[run.sessions.length - 1], told = session.environment;
  const rows = [...Object.entries(told.versions ?? {}), ["platform", told.platform ?? ""], ["host", session.host], ["program", told.program ?? ""],
    ["auto-clip", told.clip ?? "off"], ["gradient norms", run.provenance], ["gradwatch's own time", `${Math.round(run.cost_us)} µs a step`]];
  if (run.common) rows.push(["names of layers", `all begin with ${run.common}, which is left out here`]);
  $("environment").append(tableOf(rows));
  const more = element("details");
  more.append(element("summary", `${(told.rules ?? []).length} rules and their thresholds`));
  more.append(tableOf((told.rules ?? []).map((rule) => [`${rule.code} ${rule.name}`, Object.entries(rule.settings).map(([name, value]) => `${name} ${value}`).join(", ")])));
  $("environment").append(more);
  if (run.sessions.length > 1) {
    const all = element("details");
    all.append(element("summary", `${run.sessions.length} sessions`));
    all.append(tableOf(run.sessions.map((one) => [`process ${one.pid} on ${one.host}`, `from step ${one.first_step ?? "-"}` + (one.until_step === null ? "" : `; steps from ${one.until_step} on were made again`)])));
    $("environment").append(all);
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}
const system = matchMedia("(prefers-color-scheme: dark)");
setTheme(system.matches ? "dark" : "light");
system.addEventListener("change", () => { setTheme(system.matches ? "dark" : "light"); repaint(); });
function repaint() {
  $("verdict").style.color = colour(VERDICT_COLOURS[run.verdict]);
  draw();
}
$("theme").addEventListener("click", () => { setTheme(isDark() ? "light" : "dark"); repaint(); });
for (const name of ["absolute", "relative"]) {
  $(name).addEventListener("click", () => {
    state.relative = name === "relative";
    $("absolute").setAttribute("aria-pressed", String(!state.relative));
    $("relative").setAttribute("aria-pressed", String(state.relative));
    draw();
  });
}
fillHead();
fillStories();
fillEnvironment();
draw().then(() => {
  picture.on("plotly_hover", showTip);
  picture.on("plotly_unhover", () => { $("tip").hidden = true; });
  document.documentElement.dataset.drawn = "yes";
});
