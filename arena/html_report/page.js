"use strict";
const page = JSON.parse(document.getElementById("content").textContent);
const find = (selector) => document.querySelector(selector);
const PAGE = 40; // rows shown at once
const NARROW = matchMedia("(max-width: 40rem)"); // where two columns of the rows are hidden
// what would be invisible, or would change the direction of the text around it
const HIDDEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff])/;

function el(name, properties, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties || {}))
    key in made ? (made[key] = value) : made.setAttribute(key, value);
  made.append(...children.filter((child) => child != null));
  return made;
}

// a text as nodes, in which hidden characters are spelled out; pairs of surrogates are one character
function visible(text) {
  return text.split(/([\ud800-\udbff][\udc00-\udfff])/).flatMap((part, pair) => pair % 2 ? [part] :
    part.split(HIDDEN).map((piece, at) => at % 2 ?
      el("span", {className: "hidden-character", textContent: "U+" + piece.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}) : piece));
}
const bdi = (text) => el("bdi", {}, ...visible(String(text)));

function number(value) {
  if (typeof value !== "number") return value == null ? "" : String(value);
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(4);
}

function table(columns, rows, caption) {
  const cell = (value, at) => el(at ? "td" : "th", at ? {className: typeof value === "number" ? "number" : ""} : {scope: "row"},
    value instanceof Node ? value : bdi(number(value)));
  return el("div", {className: "scroll", tabIndex: 0, role: "group", "aria-label": caption}, el("table", {},
    el("thead", {}, el("tr", {}, ...columns.map((name) => el("th", {scope: "col"}, bdi(name))))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell))))));
}

// charts -------------------------------------------------------------------------------------------------------------
function tip(handler, event, item, value) {
  const shown = find("#tip");
  shown.hidden = value == null || value === "";
  if (shown.hidden) return;
  shown.replaceChildren(...visible(String(value)));
  shown.style.left = Math.max(8, Math.min(event.pageX + 12, document.documentElement.clientWidth - shown.offsetWidth - 8)) + "px";
  shown.style.top = event.pageY + 16 + "px";
}

function chartTable(chart) {
  const fields = Object.keys(chart.columns);
  const rows = (chart.data.held_out || chart.data.table).map((datum) => fields.map((field, at) =>
    !at && datum.filter ? el("button", {type: "button", className: "link", onclick: (event) => open(datum, event.target)},
      bdi(number(datum[field]))) : datum[field] ?? null));
  return el("details", {}, el("summary", {}, "Figures as a table"),
    table(Object.values(chart.columns), rows, chart.title + " as a table"));
}

// a chart is one stop of the Tab key, the arrow keys move between its bars, and Enter opens the rows of one
function reachable(place) {
  const bars = [...place.querySelectorAll(".role-mark:not([aria-hidden=true]) path")].filter((path) => path.__data__?.datum?.filter);
  const focus = (bar) => {
    bars.forEach((other) => other.setAttribute("tabindex", other === bar ? 0 : -1));
    bar.focus();
  };
  bars.forEach((bar, at) => {
    const datum = bar.__data__.datum;
    bar.setAttribute("role", "button");
    bar.setAttribute("tabindex", at ? -1 : 0);
    bar.setAttribute("aria-label", datum.tip);
    bar.onclick = () => open(datum, bar);
    bar.onkeydown = (event) => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (step) focus(bars[(at + step + bars.length) % bars.length]);
      else if (event.key === "Enter" || event.key === " ") open(datum, bar);
      else return;
      event.preventDefault();
    };
  });
}

async function draw(place, chart) {
  const options = {ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip: tip, mode: "vega-lite"};
  const {view} = await window.vegaEmbed(place, {...chart.spec, datasets: chart.data}, options);
  place.setAttribute("aria-label", chart.title);
  reachable(place);
  view.addResizeListener(() => requestAnimationFrame(() => reachable(place)));
}

const drawn = [];
function figure(chart) {
  const place = el("div", {className: "chart"});
  drawn.push(() => draw(place, chart));
  return el("figure", {className: chart.size}, el("figcaption", {}, bdi(chart.title)), place,
    Object.keys(chart.columns).length ? chartTable(chart) : null);
}

function section(part, at) {
  const id = "section-" + at;
  find("nav").append(el("a", {href: "#" + id, textContent: part.title}));
  const opens = page.rows && (part.charts || []).some((chart) => chart.data.table.some((datum) => datum.filter));
  return el("section", {id, "aria-label": part.title}, el("h2", {}, bdi(part.title)),
    part.big ? el("p", {className: "big"}, part.big.value, el("small", {}, part.big.note && "95% interval " + part.big.note)) : null,
    part.lead ? el("p", {className: "lead"}, bdi(part.lead)) : null,
    ...(part.notes || []).map((note) => el("p", {className: "note"}, bdi(note))),
    part.facts ? el("dl", {}, ...part.facts.map(([name, value, note]) =>
      el("div", {}, el("dt", {}, bdi(name)), el("dd", {}, bdi(value), el("small", {}, bdi(note)))))) : null,
    part.table ? table(part.table.columns, part.table.rows, part.title) : null,
    opens ? el("p", {className: "lead opens", textContent: "Click a bar or a cell, or press Enter on it, to see its rows."}) : null,
    part.charts ? el("div", {className: "charts"}, ...part.charts.map(figure)) : null);
}

// rows ---------------------------------------------------------------------------------------------------------------
const rows = page.rows, state = {filter: [], says: "", from: null, query: "", shown: PAGE};
const words = rows ? rows.texts.map((cells, at) => (rows.ids[at] + "\n" + cells.flat(3).join("\n")).toLowerCase()) : [];

function open(datum, from) {
  Object.assign(state, {filter: datum.filter, says: datum.says, from, shown: PAGE});
  document.querySelectorAll("[aria-pressed=true]").forEach((other) => other.removeAttribute("aria-pressed"));
  from.setAttribute("aria-pressed", "true");
  list();
  find("#rows-title").focus({preventScroll: true});
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  find("#rows").scrollIntoView({behavior: calm ? "auto" : "smooth"});
}

function matching() {
  const found = [];
  for (let at = 0; at < rows.ids.length; at++)
    if (state.filter.every(([column, value]) => rows.columns[column][at] === value) &&
      (words[at] ?? rows.ids[at].toLowerCase()).includes(state.query)) found.push(at);
  return found;
}

function piece(value, className) {
  const [text, more] = Array.isArray(value) ? value : [value, 0];
  const empty = text == null || text === "";
  return el("div", {className: className + (empty ? " empty" : ""), dir: "auto"}, ...(empty ? ["no text"] : visible(text)),
    more ? el("em", {}, " … " + number(more) + " more characters are not in this file") : null);
}

function conversation(at) {
  const cells = rows.texts[at];
  if (!cells) return el("p", {className: "lead"}, "The texts of this row are not in this file.");
  const turns = Array.isArray(cells[0]) && typeof cells[0][1] !== "number" ? cells[0].length : 0;
  return el("div", {}, ...Array.from({length: turns || 1}, (_, turn) => el("div", {className: "turn"},
    ...rows.fields.map((name, field) => el("div", {className: name === rows.whole ? "whole" : "part"},
      el("h3", {}, bdi(name.replaceAll("_", " ") + (turns > 1 ? ", turn " + (turn + 1) : ""))),
      piece(turns ? cells[field][turn] : cells[field], "text"))))));
}

function shares(at) {
  const label = rows.classes.map((of, place) => rows.names[of] + " " + rows.probabilities[at][place].toFixed(3)).join(", ");
  return el("div", {className: "shares", role: "img", "aria-label": label, title: label}, ...rows.probabilities[at].map((share) => {
    const bar = el("span", {});
    bar.style.flexGrow = share;
    return bar;
  }));
}

function line(at) {
  const first = rows.texts[at]?.[Math.max(0, rows.fields.indexOf(rows.whole))];
  const start = (Array.isArray(first) ? first.find((each) => each != null) : first) ?? "";
  const detail = el("tr", {className: "detail", hidden: true}, el("td", {colSpan: NARROW.matches ? 4 : 6}));
  const toggle = el("button", {type: "button", className: "link", "aria-expanded": "false", onclick: () => {
    detail.hidden = !detail.hidden;
    toggle.setAttribute("aria-expanded", !detail.hidden);
    if (!detail.firstChild.childNodes.length) detail.firstChild.append(conversation(at));
  }}, bdi(rows.ids[at]));
  const [label, predicted] = ["label", "predicted"].map((name) => rows.names[rows.columns[name][at]]);
  const excerpt = (Array.isArray(start) ? start[0] : start).slice(0, 160);
  return [el("tr", {}, el("th", {scope: "row"}, toggle), el("td", {}, bdi(label)), el("td", {}, bdi(predicted)),
    el("td", {className: "number"}, rows.of_label[at].toFixed(3)), el("td", {}, shares(at)),
    el("td", {className: "excerpt", dir: "auto"}, ...visible(excerpt))), detail];
}

function list() {
  const found = matching();
  const what = (state.says && ": " + state.says) + (state.query && ", with “" + state.query + "”");
  find("#count").replaceChildren(...visible(number(found.length) + " of " + number(rows.ids.length) + " rows" + what));
  find("#rows tbody").replaceChildren(...found.slice(0, state.shown).flatMap(line));
  find("#more").hidden = found.length <= state.shown;
  find("#clear").hidden = !state.filter.length && !state.query;
  find("#back").hidden = !state.from;
}

function start() {
  find("h1").append(bdi(page.title));
  find("#subtitle").append(bdi(page.subtitle));
  find("main").append(...page.sections.map(section));
  drawn.reduce((before, next) => before.then(next), Promise.resolve()).then(() => (document.body.dataset.drawn = "yes"));
  if (!rows) return;
  find("nav").append(el("a", {href: "#rows", textContent: "Rows"}));
  find("#rows").hidden = false;
  find("#rows-note").append(bdi(rows.note));
  find("#rows thead").append(el("tr", {}, ...["id", "label", "judge", "p(label)", rows.classes.map((at) => rows.names[at]).join(" · "),
    "text"].map((name) => el("th", {scope: "col"}, bdi(name)))));
  find("#query").oninput = (event) => { Object.assign(state, {query: event.target.value.toLowerCase(), shown: PAGE}); list(); };
  find("#rows form").onsubmit = (event) => event.preventDefault();
  find("#more").onclick = () => { state.shown += PAGE; list(); };
  find("#back").onclick = () => { state.from.focus(); state.from.scrollIntoView({block: "center"}); };
  find("#clear").onclick = () => {
    state.from?.removeAttribute("aria-pressed");
    Object.assign(state, {filter: [], says: "", query: "", from: null, shown: PAGE});
    find("#query").value = "";
    list();
    find("#query").focus();
  };
  list();
}
start();
