"use strict";
// Sorting, filtering, comparing and drawing. What records say reaches the page as text alone, never as markup.
(() => {
  const root = document.documentElement;
  const find = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const islands = new Map();

  function island(id) {
    if (!islands.has(id)) islands.set(id, JSON.parse(document.getElementById(id).textContent));
    return islands.get(id);
  }

  function make(name, attributes = {}, ...children) {
    const svg = ["svg", "line"].includes(name);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  // ── Charts ──────────────────────────────────────────────────────────────────────────────────────────────────────

  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x"];
  const PALETTE = 8;
  const TREND_POINTS = 1000;
  const drawn = new Map(); // element → the function that builds its chart in the present colours
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const ofPalette = (place) => colour(`--c${place % PALETTE}`);
  // Plotly reads a few tags in its texts: these are a person's words.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function number(value) {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e4 && size < 1e15 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  }

  // As in the tables: two significant digits of half the interval.
  function figure([value, low, high, n]) {
    const known = low != null && high != null;
    const half = known ? Math.abs(high - low) / 2 : 0;
    const digits = half > 0 ? Math.max(0, Math.min(8, 1 - Math.floor(Math.log10(half)))) : null;
    const text = (x) => (digits === null ? number(x) : x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
    return { value: text(value), interval: known ? `[${text(low)}, ${text(high)}]` : "", n: n ? `n = ${n}` : "" };
  }

  function layout(more = {}) {
    const axis = {
      gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true, fixedrange: false,
      tickfont: { size: 11 }, title: { standoff: 6, font: { size: 11 } }, exponentformat: "power", separatethousands: true,
    };
    return {
      margin: { l: 48, r: 10, t: 8, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--muted") },
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 12 }, align: "left" },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", ...more, xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
    };
  }

  function bars(line, tint) {
    if (!line.low) return undefined;
    const reach = (end, sign) => end.map((at, i) => (at === null || line.y[i] === null ? 0 : sign * (at - line.y[i])));
    return { type: "data", symmetric: false, array: reach(line.high, 1), arrayminus: reach(line.low, -1), color: tint, thickness: 1.3, width: 3 };
  }

  // One curve; what is measured once an epoch has points, what is measured each step a line.
  function curve(line, place, name = line.name) {
    const seldom = line.of <= 60;
    const tint = ofPalette(place);
    const of = (i) => figure([line.y[i], line.low ? line.low[i] : null, line.low ? line.high[i] : null, line.n?.[i]]);
    return {
      type: "scatter", mode: seldom ? "lines+markers" : "lines", name: plain(name), x: line.x, y: line.y, error_y: bars(line, tint),
      line: { color: tint, width: line.x.length > 300 ? 1.1 : 1.7, dash: line.dash || "solid" }, marker: { color: tint, size: seldom && line.of > 25 ? 4 : 6 },
      text: line.x.map((x, i) => `${plain(name)}<br>step ${number(x)}: ${of(i).value} ${of(i).interval} ${of(i).n}`), hoverinfo: "text",
    };
  }

  function curves(chart) {
    if (chart.cells) return heat(chart);
    const lines = chart.lines.map((line, place) => curve(line, place));
    return [lines, layout({ showlegend: lines.length > 1, xaxis: { title: { text: chart.x, standoff: 6, font: { size: 11 } } } })];
  }

  function heat(chart) {
    const shown = chart.cells.map((row) => row.map((cell) => (cell > 0 ? Math.log10(cell) : null)));
    const ends = shown.flat().filter((x) => x !== null);
    const low = Math.floor(ends.reduce((a, b) => Math.min(a, b), 0)), high = Math.ceil(ends.reduce((a, b) => Math.max(a, b), low + 1));
    const ticks = Array.from({ length: high - low + 1 }, (_, i) => low + i);
    const trace = {
      type: "heatmap", x: chart.columns, y: chart.rows.map(plain), z: shown, colorscale: "Cividis", hoverinfo: "text", hoverongaps: false,
      text: chart.cells.map((row, r) => row.map((cell, c) => `${plain(chart.rows[r])}<br>step ${number(chart.columns[c])}: ${number(cell)}`)),
      colorbar: { thickness: 8, outlinewidth: 0, tickvals: ticks, ticktext: ticks.map((t) => `10<sup>${t}</sup>`), tickfont: { size: 10 } },
    };
    return [[trace], layout({ xaxis: { title: { text: chart.x, standoff: 6, font: { size: 11 } } }, yaxis: { type: "category", autorange: "reversed" } })];
  }

  function trend({ figure: name, points }) {
    const newest = points.slice(-TREND_POINTS);
    const profiles = [...new Set(newest.map((point) => point[2]))];
    const groups = profiles.map((profile) => {
      const place = island("trends-data").profiles.indexOf(profile); // the same colour in every chart
      const own = newest.filter((point) => point[2] === profile);
      const line = { y: own.map((p) => p[3]), low: own.some((p) => p[4] !== null) ? own.map((p) => p[4]) : null, high: own.map((p) => p[5]) };
      const tint = ofPalette(place);
      return {
        type: "scatter", mode: "markers", name: plain(profile), x: own.map((p) => p[0]), y: line.y, error_y: bars(line, tint),
        marker: { color: tint, size: 7, symbol: SYMBOLS[Math.floor(place / PALETTE) % SYMBOLS.length] }, hoverinfo: "text",
        text: own.map((p) => { const f = figure(p.slice(3)); return `<b>${p[0]}</b>  ${plain(p[1])}<br>${plain(profile)}<br>${f.value} ${f.interval} ${f.n}`; }),
      };
    });
    const every = Math.max(1, Math.ceil(newest.length / 6));
    const ticks = newest.filter((_, i) => i % every === 0);
    const xaxis = {
      type: "category", categoryorder: "array", categoryarray: newest.map((p) => p[0]), range: [-0.6, newest.length - 0.4],
      tickvals: ticks.map((p) => p[0]), ticktext: ticks.map((p) => p[0].slice(9)), tickangle: newest.length > 3 ? -30 : 0,
    };
    const yaxis = name.endsWith(".delta") ? { rangemode: "tozero", zeroline: true, zerolinecolor: colour("--muted") } : {};
    return [groups, layout({ showlegend: profiles.length > 1, xaxis, yaxis })];
  }

  function draw(element, build) {
    drawn.set(element, build);
    const [data, style] = build();
    Plotly.react(element, data, style, { responsive: true, displayModeBar: false });
  }

  function drawFromPage(element) {
    if (drawn.has(element)) return;
    const { source, at } = element.dataset;
    draw(element, source === "trends" ? () => trend(island("trends-data").trends[at]) : () => curves(island(source)[at]));
  }

  const watcher = new IntersectionObserver((changes) => {
    for (const change of changes) if (change.isIntersecting) { watcher.unobserve(change.target); drawFromPage(change.target); }
  }, { rootMargin: "300px" });
  all(".plot[data-source]").forEach((element) => watcher.observe(element));

  function redraw() {
    for (const [element, build] of drawn) element.isConnected ? draw(element, build) : drawn.delete(element);
  }

  // ── Light and dark ──────────────────────────────────────────────────────────────────────────────────────────────

  const toggle = find("#theme");
  function setTheme(theme, keep) {
    root.dataset.theme = theme;
    toggle.textContent = theme === "dark" ? "Light" : "Dark";
    if (keep) try { localStorage.setItem("aletheia-theme", theme); } catch { /* a page that may keep nothing */ }
    redraw();
  }
  toggle.hidden = false;
  toggle.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark", true));
  setTheme(root.dataset.theme, false);
  let beforePrint = null;
  addEventListener("beforeprint", () => {
    beforePrint = root.dataset.theme;
    all(".plot[data-source]").filter((element) => element.offsetParent).forEach(drawFromPage);
    setTheme("light", false);
  });
  addEventListener("afterprint", () => setTheme(beforePrint, false));

  // ── The index ───────────────────────────────────────────────────────────────────────────────────────────────────

  const table = find("#index");
  const chosen = new Set();
  if (table) index();

  function index() {
    const PAGE = Number(table.dataset.rows);
    const body = table.tBodies[0], form = find("#filter"), more = find("#more"), count = find("output", form);
    const rows = [...body.rows].map((element, order) => ({ element, order, text: element.textContent.toLowerCase(), data: element.dataset }));
    let shown = PAGE, column = -1, descending = false;

    function key(row) {
      const cell = row.element.cells[column];
      const text = cell.dataset.key ?? "";
      return table.tHead.rows[0].cells[column].dataset.sort === "number" ? (text === "" ? null : Number(text)) : text.toLowerCase() || null;
    }

    function arrange() { // what has no key stands last, whichever way
      const sorted = [...rows];
      if (column >= 0) {
        const keys = new Map(rows.map((row) => [row, key(row)]));
        const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
        sorted.sort((a, b) => {
          const [x, y] = [keys.get(a), keys.get(b)];
          if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order;
          return (descending ? compare(y, x) : compare(x, y)) || a.order - b.order;
        });
      }
      table.classList.toggle("grouped", column < 0);
      body.append(...sorted.map((row) => row.element));
      rows.splice(0, rows.length, ...sorted);
      filter();
    }

    function filter() {
      const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const stage = form.elements.stage.value, status = form.elements.status.value;
      let matching = 0;
      for (const row of rows) {
        const fits = (!stage || row.data.stage === stage) && (!status || row.data.status === status) && words.every((word) => row.text.includes(word));
        matching += fits;
        row.element.hidden = !fits || matching > shown;
      }
      count.textContent = matching === rows.length ? `${number(rows.length)} records` : `${number(matching)} of ${number(rows.length)} records`;
      more.hidden = matching <= shown;
      more.textContent = `Show all ${number(matching)}; ${number(shown)} are shown`;
    }

    [...table.tHead.rows[0].cells].forEach((head, place) => {
      if (!head.dataset.sort) return;
      const button = make("button", { type: "button" }, head.textContent);
      head.replaceChildren(button);
      button.addEventListener("click", () => { // up, down, and back to newest first with pipelines together
        if (column !== place) { column = place; descending = false; }
        else if (!descending) descending = true;
        else column = -1;
        [...table.tHead.rows[0].cells].forEach((cell) => cell.removeAttribute("aria-sort"));
        if (column >= 0) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        arrange();
      });
    });

    function showFigure(name) {
      const found = new Map();
      for (const { figure, points } of Object.values(island("trends-data").trends))
        if (figure === name) for (const point of points) found.set(point[0], point.slice(3));
      const head = find("th.figure", table);
      head.hidden = !name;
      find("button", head).textContent = name;
      for (const row of rows) {
        const cell = find("td.figure", row.element), point = found.get(row.data.id);
        cell.hidden = !name;
        cell.replaceChildren();
        cell.dataset.key = point ? point[0] : "";
        if (point) cell.append(figure(point).value, " ", make("span", { class: "muted" }, figure(point).interval));
      }
      if (column === head.cellIndex) arrange();
    }

    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.elements.text.addEventListener("input", () => { shown = PAGE; filter(); });
    for (const name of ["stage", "status"]) form.elements[name].addEventListener("change", () => { shown = PAGE; filter(); });
    form.elements.figure?.addEventListener("change", (event) => showFigure(event.target.value));
    more.addEventListener("click", () => { shown = Infinity; filter(); });
    body.addEventListener("change", (event) => {
      const id = event.target.closest("tr").dataset.id;
      event.target.checked ? chosen.add(id) : chosen.delete(id);
      compare();
    });
    find("#chosen button").addEventListener("click", () => choose([]));
    filter();
  }

  function choose(ids) {
    chosen.clear();
    const boxes = new Map(all(".pick input", table).map((box) => [box.closest("tr").dataset.id, box]));
    for (const [id, box] of boxes) box.checked = !box.disabled && ids.includes(id);
    for (const id of ids) if (boxes.get(id)?.checked) chosen.add(id);
    compare();
  }

  // ── The comparison ──────────────────────────────────────────────────────────────────────────────────────────────

  function compare() {
    const section = find("#compare"), place = find("#comparison"), bar = find("#chosen");
    const ids = [...chosen];
    bar.hidden = ids.length === 0;
    find("span", bar).textContent = ids.length === 1 ? "1 record chosen; choose another" : `${ids.length} records chosen`;
    section.hidden = ids.length < 2;
    place.replaceChildren();
    if (ids.length < 2) return;
    const records = ids.map((id) => island("compare-data")[id]);
    place.append(
      make("p", { class: "muted" }, "Intervals of two records say little about their difference where both measured the same rows; for that, paired row by row: ", make("code", {}, `aletheia exp compare ${ids.join(" ")}`)),
      figures(ids, records), differences(ids, records), overlaid(ids),
    );
  }

  function heads(ids) {
    return ids.map((id, i) => {
      const key = make("span", { class: "key" });
      key.style.background = `var(--c${i % PALETTE})`;
      return make("th", { class: "right" }, key, make("a", { class: "id", href: `#${id}` }, id));
    });
  }

  function figures(ids, records) {
    const names = [...new Set(records.flatMap((record) => Object.keys(record.metrics)))];
    const sure = (name) => records.some((record) => record.metrics[name]?.[1] != null);
    const shared = names.filter((name) => records.filter((record) => record.metrics[name]).length > 1).sort((a, b) => sure(b) - sure(a));
    const body = make("tbody");
    for (const name of shared) {
      const values = records.map((record) => record.metrics[name]);
      body.append(make("tr", {}, make("td", {}, name), ...values.map((value) => {
        const shown = value ? figure(value) : { value: "–", interval: "" };
        return make("td", { class: "right" }, shown.value, " ", make("span", { class: "interval" }, shown.interval));
      }), make("td", {}, strip(values))));
    }
    const head = make("thead", {}, make("tr", {}, make("th", {}, "Figure"), ...heads(ids), make("th", {}, "side by side")));
    const left = names.length - shared.length;
    return make("div", {}, make("div", { class: "scroll" }, make("table", { class: "results" }, head, body)),
      left ? make("p", { class: "muted" }, `${left} figures that only one of them has are left out.`) : "");
  }

  function strip(values) { // each record's figure and interval on one scale, from the lowest to the highest end
    const ends = values.filter(Boolean).flatMap(([value, low, high]) => [value, low ?? value, high ?? value]);
    const begin = Math.min(...ends), width = Math.max(...ends) - begin || 1, step = 7;
    const at = (x) => 3 + (94 * (x - begin)) / width;
    const svg = make("svg", { class: "strip", viewBox: `0 0 100 ${step * values.length}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    svg.style.height = `${step * values.length + 2}px`;
    values.forEach((value, i) => {
      if (!value) return;
      const y = step * i + step / 2;
      if (value[1] !== null && value[2] !== null) svg.append(make("line", { class: `bar c${i % PALETTE}`, x1: at(value[1]), x2: at(value[2]), y1: y, y2: y }));
      svg.append(make("line", { class: `point c${i % PALETTE}`, x1: at(value[0]), x2: at(value[0]), y1: y - 2.5, y2: y + 2.5 }));
    });
    return svg;
  }

  function differences(ids, records) {
    const body = make("tbody");
    let same = 0;
    for (const part of Object.keys(records[0].parts)) {
      const keys = [...new Set(records.flatMap((record) => Object.keys(record.parts[part])))];
      const rows = keys.filter((key) => new Set(records.map((record) => JSON.stringify(record.parts[part][key]))).size > 1);
      same += keys.length - rows.length;
      if (rows.length) body.append(make("tr", {}, make("th", { colspan: ids.length + 1 }, part)));
      for (const key of rows) {
        const cells = records.map((record) => { const value = record.parts[part][key]; return make("td", { class: "right" }, value === undefined ? "–" : String(value)); });
        body.append(make("tr", {}, make("td", {}, make("code", {}, key)), ...cells));
      }
    }
    const table = make("table", { class: "results" }, make("thead", {}, make("tr", {}, make("th", {}, "Differs"), ...heads(ids))), body);
    return make("div", {}, make("h3", {}, "What differs"), body.rows.length ? make("div", { class: "scroll" }, table) : "",
      make("p", { class: "muted" }, `${number(same)} values of configuration, data, environment and code are the same.`));
  }

  function overlaid(ids) {
    const place = make("div", { class: "charts" });
    const logs = ids.map((id) => (document.getElementById(`curves-${id}`) ? island(`curves-${id}`) : []));
    const titles = [...new Set(logs.flat().filter((chart) => chart.lines).map((chart) => chart.title))];
    for (const title of titles) {
      const found = logs.map((charts) => charts.find((chart) => chart.title === title));
      if (found.filter(Boolean).length < 2) continue;
      const build = () => [
        found.flatMap((chart, i) => (chart ? chart.lines.map((line, l) => curve({ ...line, dash: l ? "dot" : "solid" }, i, `${ids[i].slice(9)} ${chart.lines.length > 1 ? line.name : ""}`)) : [])),
        layout({ showlegend: true, xaxis: { title: { text: "step", standoff: 6, font: { size: 11 } } } }),
      ];
      const plot = make("div", { class: "plot", role: "img", "aria-label": title });
      const thinned = found.some((chart) => chart?.note) ? make("span", { class: "note" }, "of long curves the lowest and highest of each stretch") : "";
      place.append(make("figure", { class: "chart" }, make("figcaption", {}, make("b", {}, title), thinned), plot));
      requestAnimationFrame(() => draw(plot, build));
    }
    return place.children.length ? make("div", {}, make("h3", {}, "Curves"), place) : "";
  }

  // ── The address: #EXP-…, #compare=EXP-…,EXP-…, #dark, #light, #all; several with & ─────────────────────────────

  function follow() {
    for (const part of decodeURIComponent(location.hash.slice(1)).split("&")) {
      const target = document.getElementById(part);
      if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
      else if (part === "all") all("details").forEach((element) => { element.open = true; });
      else if (part === "dark" || part === "light") setTheme(part, false);
      else if (part.startsWith("compare=") && table) choose(part.slice(8).split(","));
    }
  }
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => { // a second click on the same link opens it again
    const link = event.target.closest('a[href^="#"]');
    if (link && link.getAttribute("href") === location.hash) follow();
  });
  const button = find("#all");
  if (button) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const open = button.textContent === "Open all";
      all("details.record").forEach((element) => { element.open = open; });
      button.textContent = open ? "Close all" : "Open all";
    });
  }
  follow();
})();
