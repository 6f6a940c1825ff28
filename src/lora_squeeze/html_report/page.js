"use strict";
// Every number is taken from the JSON of the report. Names are set as text, never as markup.

const read = id => JSON.parse(document.getElementById(id).textContent);
const report = read("report");
const servers = read("servers");
const figures = read("figures");
const at = (root, selector) => root.querySelector(selector);
const percent = share => (100 * share).toFixed(2) + " %";
const grouped = count => String(count).replace(/\B(?=(\d{3})+$)/g, ",");
const significant = value => value === null ? "" : String(Number(value.toPrecision(3)));
const range = ([low, high]) => low === high ? String(low) : low + "–" + high;

function size(bytes) {
  for (const unit of ["B", "kB", "MB"]) {
    if (bytes < 1000) return Number(bytes.toPrecision(4)) + " " + unit;
    bytes /= 1000;
  }
  return Number(bytes.toPrecision(4)) + " GB";
}

function element(tag, text, parent, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  parent.append(made);
  return made;
}

function words() {
  const recommended = mark => {
    const rank = report.recommended_ranks[mark];
    return `${rank} (${size(report.curve[rank - 1].bytes)})`;
  };
  at(document, "#facts").textContent =
    `${report.modules.length} modules, rank ${report.rank}, factors ${size(report.bytes.lora)}` +
    Object.entries(report.bytes.extra).map(([kind, bytes]) => `, ${kind} ${size(bytes)}`).join("");
  let text = `Rank ${recommended("0.95")} for all modules keeps 95 % of the energy on average, rank ${recommended("0.99")} keeps 99 %.`;
  if (report.plan) {
    const asked = Object.entries(report.plan.request).map(([name, value]) => `${name} ${value}`).join(", ");
    text += ` Plan for ${asked}: ranks ${range(extent(Object.values(report.plan.ranks)))}, ` +
      `${percent(report.energy)} of the energy in ${size(report.bytes.lora_after)}.`;
  }
  at(document, "#recommendation").textContent = text + " Energy is not task quality: measure on the task.";
  for (const note of report.notes) element("li", note, at(document, "#notes"));
  const carried = Object.entries(report.bytes.causes).map(([kind, cause]) => `${kind} ${size(report.bytes.extra[kind])}: ${cause}`);
  at(document, "#carried").textContent = carried.length ? `the file carries besides ${carried.join("; ")}` : "the file carries nothing else";
  for (const source of servers.sources) element("li", source, at(document, "#sources"));
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// A slider over points; `shown` says what else changes with it.
function slider(id, points, start, shown) {
  const root = document.getElementById(id);
  const input = at(root, "input");
  const show = () => {
    const point = points[input.value];
    at(root, ".energy").textContent = percent(point.energy);
    at(root, ".mean").textContent = percent(point.mean_energy);
    at(root, ".least").textContent = percent(point.min_energy);
    at(root, ".bytes").textContent = `${grouped(point.bytes)} bytes (${size(point.bytes)})`;
    const list = at(root, ".servers");
    list.replaceChildren();
    servers.ranks[point.largest_rank].forEach((verdict, i) => {
      const line = element("li", undefined, list, verdict.answer);
      element("b", { yes: "✓ ", option: "! ", no: "✗ " }[verdict.answer] + servers.names[i], line);
      line.append(": " + verdict.text);
    });
    shown(root, point, input);
  };
  input.max = points.length - 1;
  input.value = start;
  input.addEventListener("input", show);
  show();
}

function rankShown(root, point, input) {
  at(root, ".rank").textContent = point.rank;
  input.setAttribute("aria-valuetext", `rank ${point.rank}`);
  at(root, ".call").textContent = `lora-squeeze squeeze … --rank ${point.rank}`;
  markRank(point.rank);
}

function sizeShown(root, point, input) {
  at(root, ".size").textContent = size(point.bytes);
  at(root, ".largest").textContent = point.largest_rank;
  input.setAttribute("aria-valuetext", size(point.bytes));
  at(root, ".call").textContent = `lora-squeeze squeeze … --rank ${point.rank} --allocate global`;
}

let marked = 1;
function markRank(rank) {
  marked = rank;
  const chart = document.getElementById("chart-energy");
  if (!chart.layout) return;
  const line = { type: "line", x0: rank, x1: rank, y0: 0, y1: 1, yref: "paper", line: { color: color("--accent"), width: 1 } };
  Plotly.relayout(chart, { shapes: [line] });
}

const names = new Intl.Collator("en", { numeric: true });

// Columns are [title, value of a row for sorting, text of a row].
function table(id, rows, columns) {
  const root = document.getElementById(id);
  const head = element("tr", undefined, element("thead", undefined, root));
  const body = element("tbody", undefined, root);
  const fill = sorted => body.replaceChildren(...sorted.map(row => {
    const line = document.createElement("tr");
    for (const [, value, text] of columns) element("td", text ? text(row) : value(row), line);
    return line;
  }));
  for (const [title, value] of columns) {
    const cell = element("th", undefined, head);
    cell.scope = "col";
    element("button", title, cell).addEventListener("click", () => {
      const up = cell.getAttribute("aria-sort") === "descending" || (typeof value(rows[0]) === "string" && !cell.hasAttribute("aria-sort"));
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = (a, b) => typeof a === "string" ? names.compare(a, b) : a - b;
      fill([...rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))));
    });
  }
  fill(rows);
}

function tables() {
  const planned = report.plan !== null;
  const compared = report.base !== null;
  const mark = name => [`${100 * name} %`, row => row.rank_for_energy[name]];
  table("modules", report.modules, [
    ["module", row => row.name],
    ["rank", row => row.rank],
    mark("0.9"), mark("0.95"), mark("0.99"),
    ...(planned ? [["plan", row => row.rank_after], ["energy kept", row => row.energy, row => percent(row.energy)]] : []),
    ...["stable", "entropy"].map(kind => [kind, row => row[kind + "_rank"], row => significant(row[kind + "_rank"])]),
    ["numerical", row => row.numerical_rank],
    ["norm", row => row.norm, row => significant(row.norm)],
    ...(compared ? [
      ["of the weight", row => row.base?.relative_norm ?? -1, row => significant(row.base?.relative_norm ?? null)],
      ["unchanged in bf16", row => row.base?.unchanged ?? -1, row => row.base?.unchanged == null ? "" : percent(row.base.unchanged)],
      ["lost in bf16", row => row.base?.merge_error ?? -1, row => row.base?.merge_error == null ? "" : percent(row.base.merge_error)],
    ] : []),
    ["bytes", row => row.size_bytes, row => grouped(row.size_bytes)],
  ]);
  const high = bounds => bounds[1];
  const markOf = name => [`${100 * name} %`, row => high(row.rank_for_energy[name]), row => range(row.rank_for_energy[name])];
  table("kinds", report.kinds, [
    ["kind", row => row.name],
    ["modules", row => row.modules],
    ["rank", row => high(row.rank), row => range(row.rank)],
    markOf("0.9"), markOf("0.95"), markOf("0.99"),
    ...(planned ? [["plan", row => high(row.rank_after), row => range(row.rank_after)]] : []),
    ["entropy, mean", row => row.effective_ranks.entropy_rank.mean, row => significant(row.effective_ranks.entropy_rank.mean)],
    ["bytes", row => row.bytes, row => grouped(row.bytes)],
  ]);
}

const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themed(layout) {
  const axis = { ...layout.xaxis, gridcolor: color("--line"), linecolor: color("--line") };
  const other = { ...layout.yaxis, gridcolor: color("--line"), linecolor: color("--line") };
  const hover = { ...layout.hoverlabel, bgcolor: color("--panel"), bordercolor: color("--line"), font: { color: color("--text") } };
  return { ...layout, xaxis: axis, yaxis: other, hoverlabel: hover, font: { ...layout.font, color: color("--text") } };
}

function draw() {
  const options = { responsive: true, displayModeBar: false, scrollZoom: false };
  const done = Object.entries(figures).map(([id, figure]) => {
    const data = figure.data.map(trace => trace.meta === "text" ? { ...trace, line: { ...trace.line, color: color("--text") } } : trace);
    return Plotly.react(id, data, themed(figure.layout), options);
  });
  Promise.all(done).then(() => { markRank(marked); document.body.dataset.drawn = color("--ground"); });
}

words();
tables();
const wanted = report.curve.findIndex(point => point.rank === report.recommended_rank);
slider("by-rank", report.curve, Math.max(wanted, 0), rankShown);
const like = report.best_curve.findLastIndex(point => point.rank <= report.recommended_rank);
slider("by-size", report.best_curve, Math.max(like, 0), sizeShown);
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
