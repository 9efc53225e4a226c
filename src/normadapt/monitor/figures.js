"use strict";
// Draws the figures of the report and of the live page from one JSON value; see page_data.py.
const figures = (() => {
  const $ = (id) => document.getElementById(id);
  const state = { data: null, measure: "shift", layer: 0, channel: 0, printing: false, heard: null };
  const narrow = (id) => width(id) < 560;
  const width = (id) => (state.printing ? (id === "before" || id === "after" ? 330 : 680) : $(id).clientWidth);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const isDark = () => !state.printing && matchMedia("(prefers-color-scheme:dark)").matches;
  const CONFIG = { displayModeBar: false, responsive: false, displaylogo: false };
  const BLUES = { light: ["#f1f4f8", "#c6dbf2", "#74a9e2", "#0b62c4", "#06295c"], dark: ["#20252d", "#1f3d63", "#2f6fb8", "#6cb0ff", "#dcecff"] };
  const scale = () => BLUES[isDark() ? "dark" : "light"].map((c, i) => [i / 4, c]);
  const html = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const short = (name, most) => (name.length > most ? "\u2026" + name.slice(1 - most) : name);
  const number = (value) => Number(value).toLocaleString("en", { maximumFractionDigits: 0 });
  const ends = (values) => { let low = Infinity, high = -Infinity; for (const v of values) if (v != null) { low = Math.min(low, v); high = Math.max(high, v); } return [low, high]; };

  // -- what all figures share ---------------------------------------------------------------------------------------
  function base(height, left) {
    const ink = colour("fg"), soft = colour("soft");
    return {
      height, margin: { l: left, r: 14, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: soft }, dragmode: false, showlegend: false,
      hoverlabel: { bgcolor: colour("bg"), bordercolor: colour("axis"), font: { color: ink, size: 12 }, align: "left" },
    };
  }
  const axis = (more) => ({ gridcolor: colour("grid"), linecolor: colour("axis"), zeroline: false, fixedrange: true, automargin: false, ...more });
  function draw(id, traces, layout) {
    layout.width = width(id);
    return Plotly.react($(id), traces, layout, CONFIG);
  }
  function timeline(more) {
    const h = state.data.history;
    return axis({
      type: h.time ? "date" : "linear", range: [h.starts[0], h.stop], showgrid: false, ticks: "outside", tickcolor: colour("axis"), nticks: narrow("map") ? 4 : 9,
      title: { text: h.time ? "time (UTC)" : "instances seen", standoff: h.time ? 14 : 6 }, ...more,
    });
  }
  // Edges of the columns, and which column each interval shows: none in a gap, where nothing came.
  function grid() {
    const h = state.data.history, edges = [], columns = [], gaps = new Set(h.gaps);
    h.starts.forEach((start, i) => {
      edges.push(start); columns.push(i);
      if (gaps.has(i)) { edges.push(start + h.usual); columns.push(null); }
    });
    edges.push(h.stop);
    return { edges, columns, middles: columns.map((_, i) => (edges[i] + edges[i + 1]) / 2) };
  }
  const spread = (row, columns) => columns.map((i) => (i == null ? null : row[i]));
  // Running mean over some of the columns, by their instances.
  function smooth(row, items) {
    const reach = Math.max(1, Math.round(row.length / 60));
    return row.map((value, i) => {
      let sum = 0, weight = 0;
      for (let j = Math.max(0, i - reach); j <= Math.min(row.length - 1, i + reach); j++) if (row[j] != null) { sum += row[j] * items[j]; weight += items[j]; }
      return value == null || !weight ? null : sum / weight;
    });
  }
  const when = (x) => (state.data.history.time ? new Date(x).toISOString().slice(0, 16).replace("T", " ") : `instance ${number(x)}`);

  // Stage changes and roll backs: a strip of marks above a figure, and lines through it.
  function marks(id, top, yaxis) {
    const h = state.data.history, bad = colour("c1"), soft = colour("soft");
    const shown = h.marks.filter((m) => m.at >= h.starts[0] && m.at <= h.stop);
    if (!shown.length) return { traces: [], shapes: [] };
    const pixel = (x) => ((x - h.starts[0]) / (h.stop - h.starts[0])) * (width(id) - 150);
    let free = -Infinity;
    const texts = shown.map((m, i) => {
      const text = m.text.split(":")[0], room = 7 * text.length + 18, at = pixel(m.at);
      const next = i + 1 < shown.length ? pixel(shown[i + 1].at) : Infinity;
      if (at < free || next - at < room || at + room > width(id) - 130) return "";
      free = at + room;
      return text;
    });
    const tint = (m) => (m.kind === "rollback" ? bad : soft);
    return {
      traces: [{
        type: "scatter", mode: "markers+text", x: shown.map((m) => m.at), y: shown.map(() => 0.5), yaxis, text: texts, textposition: "middle right",
        textfont: { color: shown.map(tint), size: 12 }, cliponaxis: false, hovertext: shown.map((m) => `${html(m.text)}<br>${when(m.at)}`), hoverinfo: "text",
        marker: { symbol: shown.map((m) => (m.kind === "rollback" ? "triangle-left" : "triangle-down")), size: 9, color: shown.map(tint) },
      }],
      // On a small screen many lines would hide what they mark: there only roll backs have theirs.
      shapes: shown.filter((m) => m.kind === "rollback" || shown.length < width(id) / 40).map((m) => ({
        type: "line", x0: m.at, x1: m.at, xref: "x", yref: "paper", y0: 0, y1: top, layer: "above",
        line: { color: tint(m), width: m.kind === "rollback" ? 1.5 : 1, dash: m.kind === "rollback" ? "solid" : "dot" },
      })),
    };
  }

  // -- layers and time ----------------------------------------------------------------------------------------------
  const rowHeight = (count) => (count <= 4 ? 44 : count <= 12 ? 28 : count <= 30 ? 19 : state.printing ? 8.5 : 13);
  const nameWidth = (names, id) => { const most = narrow(id) ? 14 : 30; return { most, left: Math.min(most, Math.max(...names.map((n) => n.length))) * (names.length > 30 ? 6.2 : 7.2) + 16 }; };
  function names(list, id) {
    const { most, left } = nameWidth(list, id);
    return { left, axis: axis({ tickvals: list.map((_, i) => i), ticktext: list.map((n) => html(short(n, most))), tickfont: { size: list.length > 30 ? 10 : 12 }, range: [list.length - 0.5, -0.5], showgrid: false }) };
  }
  function map() {
    const h = state.data.history, { edges, columns } = grid(), labels = names(h.names, "map");
    const strip = h.marks.length ? 26 : 0, body = Math.max(90, rowHeight(h.names.length) * h.names.length), height = body + strip + (h.time ? 130 : 118);
    const inside = body + strip, top = 1 - strip / inside;
    const tail = state.measure === "tail";
    const z = h.names.map((_, l) => columns.map((i) => (i == null ? null : tail ? (h.tail[l][i] == null ? null : Math.min(-h.tail[l][i], 30)) : h.shift[l][i])));
    const all = z.flat().filter((v) => v != null).sort((a, b) => a - b);
    const high = tail ? 20 : Math.max(0.3, all.length ? all[Math.floor(0.99 * (all.length - 1))] : 0);
    const say = h.names.map((name, l) => columns.map((i, c) => (i == null ? "" :
      `${html(name)}<br>${when(edges[c])}<br>shift ${h.shift[l][i] == null ? "–" : h.shift[l][i].toFixed(2)} sd` +
      (h.tail[l][i] == null ? "" : `<br>by chance ${h.tail[l][i] > -3 ? (10 ** h.tail[l][i]).toFixed(3) : `1e${Math.round(h.tail[l][i])}`}`))));
    const m = marks("map", top, "y2"), layout = base(height, labels.left);
    layout.margin.b = h.time ? 122 : 110;
    Object.assign(layout, {
      xaxis: timeline({ anchor: "y" }), yaxis: { ...labels.axis, domain: [0, top] },
      yaxis2: axis({ domain: [top, 1], range: [0, 1], visible: false }),
      shapes: [...m.shapes, { type: "rect", xref: "paper", x0: 0, x1: 1, yref: "y", y0: state.layer - 0.5, y1: state.layer + 0.5, line: { color: colour("fg"), width: 2 } }],
    });
    const bar = {
      orientation: "h", thickness: 10, len: narrow("map") ? 1 : 0.45, x: 0, xanchor: "left", y: -(h.time ? 74 : 62) / inside, yanchor: "top", outlinewidth: 0, tickfont: { size: 11 },
      title: { text: tail ? "probability of such a shift by chance" : "shift, sd of the layer’s output", side: "top", font: { size: 12 } },
      ...(tail ? { tickvals: [0, 5, 10, 15, 20], ticktext: ["1", "1e−5", "1e−10", "1e−15", "≤ 1e−20"] } : {}),
    };
    const heat = { type: "heatmap", x: edges, y: h.names.map((_, i) => i), z, zmin: 0, zmax: high, colorscale: scale(), colorbar: bar, text: say, hovertemplate: "%{text}<extra></extra>", hoverongaps: false, ygap: h.names.length <= 30 ? 1 : 0 };
    draw("map", [heat, ...m.traces], layout);
    const told = [...new Set(h.marks.map((x) => x.text.split(":")[0]))], labelled = m.traces.length && m.traces[0].text.every((t) => t);
    $("map-note").textContent = (tail && !all.length ? "This policy does not test for a shift. " : "") +
      (h.marks.some((x) => x.kind === "rollback") ? "◂ and an orange line: rolled back; ▾: any other change of the trial. " : h.marks.length && !labelled ? `▾ in this order: ${told.slice(0, 12).join(", ")}${told.length > 12 ? ", …" : ""}. ` : "") + (h.gaps.length ? "Empty: nothing was adapted then." : "");
  }
  function onMapClick(event) {
    const point = event.points.find((p) => p.data.type === "heatmap");
    if (point) choose(Math.round(point.y));
  }

  // -- one layer ----------------------------------------------------------------------------------------------------
  function choose(layer) {
    state.layer = layer; state.channel = 0;
    $("layer").value = String(layer);
    channels(); map(); panels(); trace();
  }
  function channels() {
    const list = state.data.history.channels[state.layer] || [];
    $("channel").replaceChildren(...list.map((c, i) => new Option(`${c.index}${i ? "" : " (largest shift)"}`, i)));
    $("channel").value = String(state.channel);
    $("channel").disabled = list.length < 2;
  }
  const GRID = Array.from({ length: 61 }, (_, i) => -4.5 + 0.15 * i); // standard deviations; as in page_data.py
  const BELL = GRID.map((z) => Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI));
  // A channel in the units of some statistics: bars and law of the stream.
  function under(panel, [centre, root]) {
    const bins = panel.counts.map((_, i) => (panel.low + panel.width * (i + 0.5) - centre) / root);
    return {
      bins, width: panel.width / root, heights: panel.counts.map((n) => (n * root) / (Math.max(panel.count, 1) * panel.width)),
      x: GRID.map((z) => (panel.mean + panel.sd * z - centre) / root), y: panel.law.map((f) => (f * root) / panel.sd), mean: (panel.mean - centre) / root,
    };
  }
  function panels() {
    const panel = (state.data.history.channels[state.layer] || [])[state.channel];
    const note = $("channel-note");
    for (const id of ["before", "after"]) $(id).closest(".pair").hidden = !panel;
    if (!panel) { note.textContent = "No instance of this layer was kept."; return; }
    const sides = { before: under(panel, panel.before), after: under(panel, panel.after) }, both = Object.values(sides);
    const source = { x: GRID.map((z) => z * panel.scatter), y: BELL.map((f) => f / panel.scatter) };
    const xs = ends([-3 * panel.scatter, 3 * panel.scatter, ...both.flatMap((s) => [s.mean, ...s.bins.flatMap((x) => [x - s.width, x + s.width])])]);
    const ys = ends([...both.flatMap((s) => [...s.heights, ...s.y]), ...source.y]);
    for (const id of ["before", "after"]) {
      const side = sides[id], stream = colour("c1"), layout = base(270, 16);
      const pad = 0.02 * (xs[1] - xs[0]);
      Object.assign(layout, {
        xaxis: axis({ range: [xs[0] - pad, xs[1] + pad], ticks: "outside", showgrid: false, title: { text: "instance means, in standard deviations", standoff: 4 } }),
        yaxis: axis({ range: [0, 1.08 * ys[1]], showticklabels: false }), bargap: 0, showlegend: true,
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12, color: colour("fg") } },
      });
      layout.margin.t = 34;
      draw(id, [
        { type: "bar", x: side.bins, y: side.heights, width: side.width, name: "stream", marker: { color: stream, opacity: 0.32, line: { width: 0 } }, hoverinfo: "skip" },
        { type: "scatter", mode: "lines", x: side.x, y: side.y, name: "its Edgeworth density", line: { color: stream, width: 2.2 }, hoverinfo: "skip" },
        { type: "scatter", mode: "lines", x: source.x, y: source.y, name: "source", line: { color: colour("c0"), width: 2.2, dash: "dash" }, hoverinfo: "skip" },
      ], layout);
    }
    const gone = Math.abs(sides.before.mean), left = Math.abs(sides.after.mean);
    note.textContent = `Channel ${panel.index}: the stream’s mean lies ${gone.toFixed(2)} sd off the source’s before, ${left.toFixed(2)} sd after. ` +
      `Bars: the last ${panel.count} instances; their law: Edgeworth density with their skewness and kurtosis. ` +
      (panel.known ? "Source: normal, with the profile’s scatter." : "Source: its scatter is not known without a profile; drawn with the stream’s own.");
  }
  function trace() {
    const h = state.data.history, { columns, middles } = grid(), l = state.layer, layout = base(h.time ? 312 : 300, 44);
    layout.margin.t = 30; if (h.time) layout.margin.b = 56;
    const line = (values, name, tint, dash, yaxis) => ({ type: "scatter", mode: columns.length === 1 ? "markers" : "lines", x: middles, y: spread(values, columns), name, yaxis, line: { color: tint, width: 2, dash }, hovertemplate: `${name} %{y:.2f}<extra></extra>` });
    Object.assign(layout, {
      xaxis: timeline({ anchor: "y2" }), showlegend: true, legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", font: { color: colour("fg") } },
      yaxis: axis({ domain: [0.56, 1], range: [-0.04, 1.04], tickvals: [0, 0.5, 1] }), yaxis2: axis({ domain: [0, 0.44], rangemode: "tozero", nticks: 4 }),
      shapes: marks("trace", 1, "y").shapes,
    });
    const known = h.meanWeight[l].some((v) => v != null);
    draw("trace", [
      ...(known ? [line(h.meanWeight[l], "weight on the mean", colour("c0"), "solid", "y"), line(h.varianceWeight[l], "on the variance", colour("c1"), "dash", "y")] : []),
      line(h.shift[l], "shift, sd", colour("c2"), "solid", "y2"),
    ], layout);
  }

  // -- answers ------------------------------------------------------------------------------------------------------
  function answers() {
    const h = state.data.history, { edges, columns, middles } = grid();
    const parts = [];
    if (h.agreement) parts.push({ title: "same answer as the source", height: 96, values: h.agreement, tint: "c0", range: null, format: ".1%" });
    if (h.entropy.some((v) => v != null)) parts.push({ title: "entropy of the answers, nats", height: 96, values: h.entropy, tint: "c3", range: null, format: ".2f" });
    if (h.classes) parts.push({ title: "share of each predicted class", height: Math.max(80, 19 * h.classes.length), heat: h.classes });
    if (!parts.length) { $("answers").textContent = "The model’s output gives no class probabilities."; return; }
    const strip = h.marks.length ? 26 : 0, title = 26, inside = strip + parts.reduce((sum, p) => sum + p.height + title, 0);
    const left = h.classes ? Math.max(48, nameWidth(h.classNames, "answers").left + 4) : 48;
    const layout = base(inside + (h.time ? 64 : 52), left), m = marks("answers", 1 - strip / inside, "y9");
    if (h.time) layout.margin.b = 56;
    Object.assign(layout, { annotations: [], xaxis: timeline({ anchor: `y${parts.length > 1 ? parts.length : ""}` }), yaxis9: axis({ domain: [1 - strip / inside, 1], range: [0, 1], visible: false }), shapes: m.shapes });
    let from = strip;
    const traces = parts.flatMap((part, i) => {
      const top = 1 - (from + title) / inside, key = i ? i + 1 : "", low = Math.max(0, top - part.height / inside);
      from += title + part.height;
      layout.annotations.push({ xref: "paper", yref: "paper", x: 0, y: top, xanchor: "left", yanchor: "bottom", text: part.title, showarrow: false, font: { color: colour("fg"), size: 12.5 }, bgcolor: colour("bg"), borderpad: 1 });
      const bottom = { domain: [low, top] };
      if (part.heat) {
        layout[`yaxis${key}`] = axis({ ...bottom, tickvals: h.classNames.map((_, k) => k), ticktext: h.classNames.map(html), range: [h.classNames.length - 0.5, -0.5], showgrid: false });
        const z = part.heat.map((row) => spread(row, columns));
        return { type: "heatmap", x: edges, y: h.classNames.map((_, k) => k), z, yaxis: `y${key}`, zmin: 0, zmax: Math.max(0.2, ends(z.flat())[1]), colorscale: scale(), showscale: false, ygap: 1, hoverongaps: false, hovertemplate: "class %{y}: %{z:.1%}<extra></extra>" };
      }
      layout[`yaxis${key}`] = axis({ ...bottom, nticks: 4, tickformat: part.format === ".1%" ? ".0%" : "" });
      const one = { type: "scatter", mode: columns.length === 1 ? "markers" : "lines", x: middles, yaxis: `y${key}` };
      return [
        { ...one, y: spread(part.values, columns), line: { color: colour(part.tint), width: 1 }, opacity: 0.4, hovertemplate: `%{y:${part.format}}<extra></extra>` },
        { ...one, y: spread(smooth(part.values, h.items), columns), line: { color: colour(part.tint), width: 2.4 }, hoverinfo: "skip" },
      ];
    });
    draw("answers", [...traces, ...m.traces], layout);
  }
  function weights() {
    const list = state.data.layers, labels = names(list.map((l) => l.name), "weights");
    if (!list.some((l) => l.weights[0] != null)) { $("weights").textContent = "This policy does not say which weights it uses."; return; }
    const layout = base(Math.max(60, rowHeight(list.length) * list.length) + 84, labels.left);
    layout.margin.t = 34;
    Object.assign(layout, { xaxis: axis({ range: [-0.03, 1.03], tickvals: [0, 0.25, 0.5, 0.75, 1], title: { text: "weight on the stream’s statistics", standoff: 6 } }), yaxis: { ...labels.axis, showgrid: true }, showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { color: colour("fg") } } });
    const dots = (row, name, tint, symbol, shift) => {
      const error = (side) => list.map((l) => { const i = l.intervals[row]; return i ? Math.max(0, side ? i[1] - l.weights[row] : l.weights[row] - i[0]) : 0; });
      return {
        type: "scatter", mode: "markers", name, x: list.map((l) => l.weights[row]), y: list.map((_, i) => i + shift), marker: { color: colour(tint), symbol, size: list.length > 30 ? 7 : 9, line: { width: 1.5, color: colour(tint) } },
        error_x: { type: "data", symmetric: false, array: error(1), arrayminus: error(0), color: colour(tint), thickness: 1.4, width: 0 }, text: list.map((l) => html(l.name)), hovertemplate: "%{text}<br>%{x:.2f}<extra></extra>",
      };
    };
    draw("weights", [dots(0, "mean", "c0", "circle", -0.14), dots(1, "variance", "c1", "diamond-open", 0.14)], layout);
  }

  // -- all of it ----------------------------------------------------------------------------------------------------
  function redraw() {
    if (!state.data || !state.data.layers.length) return;
    if (state.data.history) { map(); channels(); panels(); trace(); answers(); }
    weights();
  }
  function show(data) {
    const first = !state.data;
    state.data = data;
    if (first) state.layer = data.first;
    if (data.history) {
      state.layer = Math.min(state.layer, data.history.names.length - 1);
      if ($("layer").options.length !== data.history.names.length) {
        $("layer").replaceChildren(...data.history.names.map((name, i) => new Option(name, i)));
      }
      $("layer").value = String(state.layer);
      state.channel = Math.min(state.channel, Math.max(0, (data.history.channels[state.layer] || []).length - 1));
    }
    redraw();
    // The live page may put other elements in the place of these.
    if (data.history && state.heard !== $("layer")) { state.heard = $("layer"); listen(); }
  }
  function listen() {
    $("map").on("plotly_click", onMapClick);
    $("layer").addEventListener("change", (event) => choose(Number(event.target.value)));
    $("channel").addEventListener("change", (event) => { state.channel = Number(event.target.value); panels(); });
    for (const button of document.querySelectorAll("button[data-measure]")) {
      button.addEventListener("click", () => {
        state.measure = button.dataset.measure;
        for (const other of document.querySelectorAll("button[data-measure]")) other.setAttribute("aria-pressed", String(other === button));
        map();
      });
    }
  }
  let waiting = 0, last = 0;
  addEventListener("resize", () => { if (innerWidth === last) return; last = innerWidth; clearTimeout(waiting); waiting = setTimeout(redraw, 120); });
  matchMedia("(prefers-color-scheme:dark)").addEventListener("change", redraw);
  const print = (on) => { if (state.printing !== on) { state.printing = on; for (const part of document.querySelectorAll("details")) part.open = on; redraw(); } };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  return { show, choose, state };
})();
if (document.getElementById("data")) figures.show(JSON.parse(document.getElementById("data").textContent));
