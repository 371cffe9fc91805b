// The page that tries out a judge. Texts become text nodes, never HTML.

const find = (query) => document.querySelector(query);
const letter = (at) => String.fromCharCode(65 + at);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
const state = {judge: "", turns: []};  // of each turn, the prompt and then the answers
let judges = [], asked = 0;

function el(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const judge = () => judges.find((each) => each.name === state.judge) ?? judges[0];
const answers = () => state.turns[0].length - 1;
const blank = (fields = judge().columns.length) => Array(fields).fill("");
const label = (at) => (judge().ranks ? (at ? `Answer ${letter(at - 1)}` : "Prompt") : judge().columns[at]);

// The address holds what was entered, as base64url of JSON.

function save() {
  const bytes = new TextEncoder().encode(JSON.stringify(state));
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  const hash = state.turns.flat().some(Boolean) ? `#${text.replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "")}` : "";
  history.replaceState(null, "", location.pathname + location.search + hash);
  find("#result").classList.add("old");
}

function restore() {
  try {
    const text = atob(location.hash.slice(1).replaceAll("-", "+").replaceAll("_", "/"));
    const kept = JSON.parse(new TextDecoder().decode(Uint8Array.from(text, (each) => each.charCodeAt(0))));
    state.judge = judges.some((each) => each.name === kept.judge) ? kept.judge : judges[0].name;
    const {columns, ranks, reads_turns, limits} = judge();
    const most = ranks ? limits.answers + 1 : columns.length;
    const fields = Math.min(most, Math.max(columns.length, ...kept.turns.map((turn) => turn.length)));
    const turns = kept.turns.slice(0, reads_turns ? 100 : 1);
    state.turns = turns.map((turn) => Array.from({length: fields}, (_, at) => String(turn[at] ?? "")));
    if (!turns.length) throw new Error("no turns");
  } catch {  // an empty address, or one that was cut
    Object.assign(state, {judge: state.judge || judges[0].name, turns: []});
    state.turns = [blank()];
  }
  draw();
}

// The form

function change(edit, focus) {
  edit();
  save();
  draw();
  if (focus) find(focus)?.focus();
}

function field(turn, at) {
  const id = `field-${turn}-${at}`, row = state.turns[turn];
  const text = el("textarea", {id, value: row[at], rows: at ? 5 : 2, spellcheck: false, oninput: () => { row[at] = text.value; save(); }});
  const top = el("div", {className: "top"}, el("label", {htmlFor: id}, label(at)));
  if (at && turn === 0 && answers() > 2 && judge().ranks)
    top.append(el("button", {type: "button", className: "link", ariaLabel: `Remove answer ${letter(at - 1)}`,
      onclick: () => change(() => state.turns.forEach((each) => each.splice(at, 1)), "#add-answer")}, "Remove"));
  const made = el("div", {className: at ? "answer" : "prompt"}, top, text);
  if (at) made.dataset.at = at - 1;
  return made;
}

function fieldset(row, turn) {
  const made = el("fieldset");
  if (state.turns.length > 1)
    made.append(el("legend", {}, `Turn ${turn + 1}`, el("button", {type: "button", className: "link", ariaLabel: `Remove turn ${turn + 1}`,
      onclick: () => change(() => state.turns.splice(turn, 1), "#add-turn")}, "Remove")));
  const [prompt, ...others] = row.map((_, at) => field(turn, at));
  made.append(prompt);
  if (others.length) made.append(el("div", {className: "answers"}, ...others));
  return made;
}

function draw() {
  const {ranks, reads_turns, limits, examples, columns, report, invented} = judge();
  find("#turns").replaceChildren(...state.turns.map(fieldset));
  find("#judge").value = judge().name;
  find("#swap").hidden = !ranks || answers() !== 2;
  find("#add-answer").hidden = !ranks || answers() >= limits.answers;
  find("#add-turn").hidden = !reads_turns;
  find("#title").textContent = ranks ? "Which answer is better?" : "Which class is it?";
  find("#lead").hidden = !ranks;
  find("#invented").hidden = !invented;
  find("#report").hidden = !report || Boolean(token());
  find("#report").href = `report?judge=${encodeURIComponent(judge().name)}`;
  find("#examples").hidden = !Object.keys(examples).length;
  find("#examples span").replaceChildren(...Object.entries(examples).map(([name, row]) => el("button", {type: "button", className: "link",
    onclick: () => change(() => {
      const texts = columns.map((column) => [row[column]].flat());
      state.turns = texts[0].map((_, turn) => texts.map((text) => text[turn] ?? ""));
      find("#result").hidden = true;
    }, "#field-0-0")}, name)));
}

// Asking

const token = () => sessionStorage.getItem("token") ?? "";

async function ask(path, body) {
  const headers = {...(token() && {authorization: `Bearer ${token()}`}), ...(body && {"content-type": "application/json"})};
  const reply = await fetch(path, {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body)});
  if (reply.status === 401) {
    const dialog = find("#ask");
    find("#token").value = "";
    dialog.showModal();
    await new Promise((done) => dialog.addEventListener("close", done, {once: true}));
    if (!find("#token").value) throw new Error("The server needs its token.");
    sessionStorage.setItem("token", find("#token").value);
    return ask(path, body);
  }
  const content = await reply.json();
  const {message, problems = []} = content.error ?? {};
  if (!reply.ok) throw new Error(problems.map((each) => `${spoken(each.field)}: ${each.what}`).join("\n") || message);
  return content;
}

function spoken(field) {  // as the form calls it
  const at = (name) => (/^answers\[\d+\]$/.test(name) ? parseInt(name.slice(8)) + 1 : (judge()?.columns ?? []).indexOf(name));
  return field.split(", ").map((name) => (at(name) < 0 ? name : label(at(name)))).join(", ");
}

async function submit() {
  const mine = ++asked, button = find("#form .primary"), {columns, reads_turns, ranks} = judge();
  const texts = state.turns[0].map((_, at) => (reads_turns ? state.turns.map((turn) => turn[at]) : state.turns[0][at]));
  const many = ranks && texts.length > columns.length;
  find("#alert").textContent = "";
  if (!state.turns.flatMap((turn) => (ranks ? turn.slice(1) : turn)).some((text) => text.trim())) {
    find("#result").hidden = true;
    button.ariaBusy = "false";
    find("#alert").textContent = ranks ? "There is nothing to judge: enter an answer." : "There is nothing to judge: enter a text.";
    find(ranks ? "#field-0-1" : "#field-0-0").focus();
    return;
  }
  button.ariaBusy = "true";
  try {
    const body = many ? {judge: state.judge, prompt: texts[0], answers: texts.slice(1)}
      : {judge: state.judge, rows: [Object.fromEntries(columns.map((column, at) => [column, texts[at]]))]};
    const started = performance.now(), found = await ask(many ? "v1/rank" : "v1/judge", body);
    if (mine !== asked) return;  // a later question is on its way
    const [headline, ...details] = many ? ranking(found) : verdict(found.rows[0]);
    find("#details").replaceChildren(...details, facts(found, performance.now() - started));
    find("#result").hidden = false;
    find("#result").classList.remove("old");
    find("#headline").textContent = headline;
    find("#result").scrollIntoView({block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"});
  } catch (error) {
    if (mine === asked) find("#alert").textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
  } finally {
    if (mine === asked) button.ariaBusy = "false";
  }
}

// The result

function bars(rows) {
  return el("dl", {className: "bars"}, ...rows.flatMap(([name, share, number, colour]) => {
    const fill = el("div", {className: "fill"});
    fill.style.setProperty("--share", `${100 * share}%`);
    if (colour < 2) fill.style.setProperty("--colour", `var(--${"ab"[colour]})`);
    return [el("dt", {}, name), el("dd", {}, el("div", {className: "track", ariaHidden: "true"}, fill), el("span", {className: "number"}, number))];
  }));
}

const classes = (probabilities) => bars(Object.entries(probabilities).map(([name, share], at) => [name, share, percent(share), at]));

function verdict(row) {
  if (row.error) return [`There is no verdict: ${row.error}`];
  const [best, share] = Object.entries(row.probabilities).reduce((one, other) => (other[1] > one[1] ? other : one));
  const what = !judge().ranks ? best : best.length === 1 ? `Answer ${best} is preferred` : "Most likely a tie";
  const parts = [`${what}, with ${percent(share)}`, el("div", {className: "block"}, classes(row.probabilities))];
  if (!row.is_read) parts.push(el("p", {className: "note warn"}, "There is nothing to read: the probabilities come from the labels of the training rows."));
  else if (row.kind) parts.push(el("p", {className: "note"}, `This is a special row: ${row.kind}.`));
  if (row.is_read && row.orders.length > 1) {
    parts.push(el("p", {className: row.flips ? "note warn" : "note"}, row.flips ? "The verdict flips with the order of the answers." : "Both orders of the answers give the same verdict."));
    const titles = ["A shown first", "B shown first"];
    parts.push(el("div", {className: "pair"}, ...row.orders.map((order, at) => el("div", {}, el("h3", {}, titles[at] ?? `Order ${at + 1}`), classes(order.probabilities)))));
  }
  return parts;
}

function ranking({order, strengths, wins}) {
  const rows = order.map((at) => [`Answer ${letter(at)}`, Math.exp(strengths[at] - strengths[order[0]]), strengths[at].toFixed(2).replace("-", "−"), at]);
  const head = el("tr", {}, el("td", {className: "self"}), ...order.map((at) => el("th", {scope: "col"}, `over ${letter(at)}`)));
  const body = order.map((one) => el("tr", {}, el("th", {scope: "row"}, `Answer ${letter(one)}`), ...order.map((other) => {
    const cell = el("td", {}, one === other ? "" : percent(wins[one][other]));
    if (one === other) cell.className = "self";
    else cell.style.setProperty("--win", Math.max(0, 160 * (wins[one][other] - 0.5)));
    return cell;
  })));
  return [`Answer ${letter(order[0])} is the best of ${order.length}`,
    el("div", {className: "block"}, bars(rows)),
    el("p", {className: "soft"}, "Strengths: a difference of 0.69 means that one is preferred twice as often as the other."),
    el("div", {className: "block"}, el("h3", {}, "How often each is preferred, with half of the ties"), el("div", {className: "scroll", tabIndex: 0}, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body))))];
}

function facts({batch, judge: name, rows: [row] = []}, milliseconds) {
  const cut = [row?.turns_dropped && count(row.turns_dropped, "earlier turn"), row?.tokens_cut && count(row.tokens_cut, "token")].filter(Boolean);
  const whole = !row || row.error ? "" : cut.length ? ` Too long to be read whole: ${cut.join(" and ")} cut.` : " Nothing was cut.";
  const beside = batch.requests > 1 ? `, together with ${count(batch.requests - 1, "other request")}` : "";
  const shared = batch.shared_tokens ? ` of ${batch.logical_tokens.toLocaleString("en")}; prompts share the other ${batch.shared_tokens.toLocaleString("en")}` : "";
  return el("p", {className: "facts"}, `${name} computed ${count(batch.tokens, "token")}${shared}. ` +
    `${count(batch.rows, "row")}${beside}, ${Math.round(milliseconds)} ms.${whole}`);
}

// Beginning

find("#form").onsubmit = (event) => { event.preventDefault(); submit(); };
find("#form").onkeydown = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(); };
find("#add-turn").onclick = () => change(() => state.turns.push(blank(state.turns[0].length)), `#field-${state.turns.length}-0`);
find("#add-answer").onclick = () => change(() => state.turns.forEach((turn) => turn.push("")), `#field-0-${state.turns[0].length}`);
find("#swap").onclick = () => {
  change(() => state.turns.forEach((turn) => turn.splice(1, 2, turn[2], turn[1])));
  if (!find("#result").hidden) submit();
};
find("#judge").onchange = (event) => change(() => {
  state.judge = event.target.value;
  if (!judge().ranks || answers() < 2) state.turns = [blank()];
  find("#result").hidden = true;
});
addEventListener("hashchange", restore);

try {
  judges = await ask("v1/judges");
  find("#judge").append(...judges.map((each) => el("option", {value: each.name}, each.name)));
  find("#choice").hidden = judges.length < 2;
  restore();
  document.body.dataset.ready = "";
} catch (error) {
  find("#alert").textContent = `The judges cannot be listed: ${error.message}`;
}
