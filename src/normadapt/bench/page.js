"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const roles = Object.fromEntries(data.methods.map((m) => [m.name, m.role]));
const names = data.methods.map((m) => m.name);
const state = { scope: data.scopes[0].name, n: "mean", measure: "gain", task: null, stream: null, size: null };
const minus = (text) => text.replace("-", "\u2212");
const html = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

// -- the heat map ---------------------------------------------------------------------------------------------------
const mean = (values) => (values.some((v) => v == null) || !values.length ? null : values.reduce((a, b) => a + b) / values.length);

function accuracies(scope) {
  const sizes = state.n === "mean" ? scope.sizes.map(String) : [state.n];
  const found = new Map();
  for (const name of names) {
    const rows = sizes.map((n) => (scope.accuracy[n] || {})[name]);
    if (rows.some((row) => !row)) continue;
    const row = scope.streams.map((_, i) => mean(rows.map((values) => values[i])));
    if (scope.name === data.all && row.some((v) => v == null)) continue; // it was not run in every suite
    found.set(name, [...row.map((v) => (v == null ? null : v / 100)), null]);
    found.get(name)[scope.streams.length] = mean(found.get(name).slice(0, -1));
  }
  return found;
}

function heat() {
  const scope = data.scopes.find((s) => s.name === state.scope);
  const table = accuracies(scope);
  const rules = [...table.keys()].filter((name) => roles[name] !== "limit" && roles[name] !== "ablation");
  const columns = [...scope.streams, "average"];
  const best = columns.map((_, i) => Math.max(...rules.map((name) => table.get(name)[i] ?? -1)));
  const source = table.get("Source");
  const value = (name, i) => {
    const own = table.get(name)[i];
    if (own == null) return null;
    return state.measure === "regret" ? own - best[i] : state.measure === "gain" && source ? own - source[i] : own;
  };
  const all = [...table.keys()].flatMap((name) => columns.map((_, i) => value(name, i))).filter((v) => v != null);
  const sorted = all.map(Math.abs).sort((a, b) => a - b);
  const most = Math.max(2, sorted[Math.floor(0.95 * (sorted.length - 1))] || 0);
  const low = Math.min(...all), high = Math.max(...all);
  const paint = (v) => {
    const share = state.measure === "accuracy" ? (v - low) / (high - low || 1) : Math.min(1, Math.abs(v) / most);
    const colour = state.measure !== "accuracy" && v < 0 ? "--c1" : "--c0";
    return `background:color-mix(in srgb,var(${colour}) ${Math.round(62 * share)}%,var(--bg))`;
  };
  const signed = state.measure !== "accuracy";
  const cell = (name, i) => {
    const v = value(name, i);
    if (v == null) return "<td>\u2013</td>";
    const text = minus((signed && v > 0.049 ? "+" : "") + v.toFixed(1).replace(/^-0\.0$/, "0.0"));
    const top = rules.includes(name) && table.get(name)[i].toFixed(1) === best[i].toFixed(1) ? ' class="best"' : "";
    return `<td${top} style="${paint(v)}" title="${html(name)}, ${columns[i]}: ${table.get(name)[i].toFixed(2)} %">${text}</td>`;
  };
  const rows = [...table.keys()].map(
    (name) => `<tr class="${roles[name]}"><td title="${html(name)}">${html(name)}</td>${columns.map((_, i) => cell(name, i)).join("")}</tr>`
  );
  const head = ["method", ...columns].map((c) => `<th>${c}</th>`).join("");
  $("heat").innerHTML = `<table class="heat"><thead><tr>${head}</tr></thead><tbody>${rows.join("")}</tbody></table>`;
  document.querySelectorAll("[data-scope]").forEach((part) => (part.hidden = part.dataset.scope !== state.scope));
}

// -- accuracy over time ---------------------------------------------------------------------------------------------
const first = ["Source", "BatchStatistics", "Domains", "Domains + profile", "ceiling", "limit"];
const shown = new Set(names.filter((name) => first.includes(name) || roles[name] === "ours"));
const style = {};
let next = 0;
for (const name of names) {
  const cycle = ["--c1", "--c2", "--c3", "--c4", "--c6", "--c7"];
  if (name === "Source") style[name] = ["--soft", "2 3", 1.6];
  else if (roles[name] === "limit") style[name] = ["--fg", name === "limit" ? "7 4" : "1 4", 1.6];
  else if (roles[name] === "ours") style[name] = [name === "Domains" ? "--c5" : "--c0", "", 2.6];
  else style[name] = [cycle[next % 6], ["", "8 3", "3 2"][Math.floor(next++ / 6) % 3], 1.5];
}

function curve() {
  const found = data.curves.find((c) => c.task === state.task && c.stream === state.stream && String(c.n) === state.size);
  if (!found) return void ($("curve").innerHTML = '<p class="note">This stream was not run here.</p>');
  const width = Math.max(300, $("curve").clientWidth - 16), narrow = width < 600, height = narrow ? 330 : 400;
  const marks = found.marks.filter((mark) => mark[1]);
  const left = 44, right = 10, bottom = 42, top = marks.length > 1 ? 12 + 6.3 * Math.max(...marks.map((m) => m[1].length)) : 14;
  const lines = names.filter((name) => shown.has(name) && found.lines[name]);
  const values = lines.flatMap((name) => found.lines[name]);
  const low = Math.max(0, Math.floor((Math.min(...values, 900) - 20) / 100) * 100), high = 1000;
  const x = (at) => left + ((width - left - right) * at) / found.length;
  const y = (v) => top + ((height - top - bottom) * (high - v)) / (high - low);
  const parts = [];
  for (let v = low; v <= high; v += high - low > 600 ? 200 : 100)
    parts.push(`<path class="grid" d="M${left} ${y(v)}H${width - right}"/><text x="${left - 6}" y="${y(v) + 4}" text-anchor="end">${v / 10}</text>`);
  if (marks.length > 1) for (const [at, label] of marks)
    parts.push(`<path class="grid" d="M${x(at)} ${top - 4}V${height - bottom}"/><text transform="translate(${x(at) + 12} ${top - 6}) rotate(-90)">${html(label)}</text>`);
  const step = Math.max(1, 10 ** Math.floor(Math.log10(found.length)) / (found.length < 3 * 10 ** Math.floor(Math.log10(found.length)) ? 2 : 1));
  for (let at = 0; at <= found.length; at += narrow ? 2 * step : step)
    parts.push(`<text x="${x(at)}" y="${height - bottom + 17}" text-anchor="middle">${at}</text>`);
  parts.push(`<path class="axis" d="M${left} ${top}V${height - bottom}H${width - right}"/>`);
  parts.push(`<text x="${(left + width - right) / 2}" y="${height - 7}" text-anchor="middle">instances so far; % right in bins of ${found.bin}</text>`);
  for (const name of lines) {
    const [colour, dash, stroke] = style[name], line = found.lines[name];
    const d = line.map((v, i) => `${i ? "L" : "M"}${x(i === line.length - 1 ? (i * found.bin + found.length) / 2 : (i + 0.5) * found.bin).toFixed(1)} ${y(v).toFixed(1)}`).join("");
    parts.push(`<path d="${d}" style="stroke:var(${colour});stroke-width:${stroke}" stroke-dasharray="${dash}" stroke-linejoin="round"><title>${html(name)}</title></path>`);
  }
  $("curve").innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="accuracy over time">${parts.join("")}</svg>`;
}

function chips() {
  $("chips").innerHTML = names.map((name) => {
    const [colour, dash, stroke] = style[name];
    const key = `<svg viewBox="0 0 24 8"><path d="M0 4H24" style="stroke:var(${colour});stroke-width:${stroke}" stroke-dasharray="${dash}"/></svg>`;
    return `<button type="button" data-name="${html(name)}" aria-pressed="${shown.has(name)}">${key}${html(name)}</button>`;
  }).join("");
}

// -- controls -------------------------------------------------------------------------------------------------------
const options = (id, values, chosen) =>
  ($(id).innerHTML = values.map((v) => `<option${v === chosen ? " selected" : ""}>${html(String(v))}</option>`).join(""));
const buttons = (id, values, chosen) =>
  ($(id).innerHTML = values.map(([v, text]) => `<button type="button" value="${v}" aria-pressed="${v === chosen}">${text}</button>`).join(""));
const among = (values, wanted) => (values.includes(wanted) ? wanted : values[0]);
const distinct = (values) => [...new Set(values)];

function update() {
  const scope = data.scopes.find((s) => s.name === state.scope);
  if (state.n !== "mean" && !scope.sizes.map(String).includes(state.n)) state.n = "mean";
  options("scope", data.scopes.map((s) => s.name), state.scope);
  buttons("n", [["mean", "mean"], ...scope.sizes.map((n) => [String(n), `n=${n}`])], state.n);
  buttons("measure", [["gain", "minus Source"], ["accuracy", "accuracy"], ["regret", "minus the best"]], state.measure);
  const tasks = distinct(data.curves.map((c) => c.task));
  const near = tasks.filter((t) => state.scope === data.all || t === state.scope || t.startsWith(state.scope + "/"));
  state.task = among(near.length ? near : tasks, state.task);
  const streams = distinct(data.curves.filter((c) => c.task === state.task).map((c) => c.stream));
  state.stream = among(streams, state.stream);
  const sizes = distinct(data.curves.filter((c) => c.task === state.task && c.stream === state.stream).map((c) => String(c.n)));
  state.size = among(sizes, state.size ?? "16");
  options("task", near.length ? near : tasks, state.task);
  options("stream", streams, state.stream);
  buttons("size", sizes.map((n) => [n, `n=${n}`]), state.size);
  heat();
  chips();
  curve();
}

for (const id of ["scope", "task", "stream"]) $(id).addEventListener("change", (e) => { state[id] = e.target.value; update(); });
for (const id of ["n", "measure", "size"]) $(id).addEventListener("click", (e) => {
  const button = e.target.closest("button");
  if (!button) return;
  state[id] = button.value;
  update();
  [...$(id).children].find((b) => b.value === state[id])?.focus();
});
$("chips").addEventListener("click", (e) => {
  const button = e.target.closest("button");
  if (!button) return;
  const name = button.dataset.name;
  shown.has(name) ? shown.delete(name) : shown.add(name);
  button.setAttribute("aria-pressed", shown.has(name));
  curve();
});
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(curve, 80); });
update();
