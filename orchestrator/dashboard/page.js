"use strict";
// The table of runs at `/`, one run at `/run/NAME`; each lives by one stream of server-sent events.

const settings = JSON.parse(document.getElementById("settings").textContent);
const words = settings.words, lang = settings.lang, other = lang === "ja" ? "en" : "ja";
const main = document.getElementById("main"), head = document.getElementById("head");
const name = location.pathname.startsWith("/run/") ? decodeURIComponent(location.pathname.slice(5)) : null;

function make(tag, options = {}, ...children) {
  const made = document.createElement(tag), { head: label, ...own } = options;
  for (const [key, value] of Object.entries(own)) if (value !== undefined && value !== null) made[key] = value;
  if (label) made.dataset.head = label;
  made.append(...children.filter((one) => one !== null && one !== undefined));
  return made;
}

const fill = (text, ...values) => values.reduce((made, value, at) => made.replace(`{${at}}`, value), text);
const local = (path) => (lang === settings.own ? path : `${path}?lang=${lang}`);
const pageOf = (run) => local(`/run/${encodeURIComponent(run)}`);
const reportOf = (run) => local(`/report/${encodeURIComponent(run)}`);
const number = (value) => (value === null || value === undefined ? "" : value.toFixed(4));
const count = (value) => (value ?? 0).toLocaleString("en");

function seconds(value) {  // as the command line writes them
  if (value < 10) return `${Number(value.toPrecision(2))} s`;
  if (value < 100) return `${value.toFixed(0)} s`;
  const minutes = Math.floor(Math.round(value) / 60), two = (one) => String(one).padStart(2, "0");
  if (minutes < 60) return `${minutes} min ${two(Math.round(value) % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours >= 100 ? `${(hours / 24).toFixed(0)} d` : `${hours} h ${two(minutes % 60)} min`;
}

function timeLeft(row) {
  if (row.left_s === undefined) return "";
  return row.left_is_measured ? seconds(row.left_s) : fill(words.about, seconds(row.left_s));
}

function stateOf(row) {
  const text = row.state === "running" && row.doing ? words[`doing_${row.doing}`] ?? row.doing : words[`state_${row.state}`];
  return make("span", { className: `state ${row.state}`, textContent: text ?? row.state });
}

function barOf(row) {
  const bar = make("div", { className: "bar" }, make("div"));
  bar.firstChild.style.width = `${Math.min(100, (100 * (row.step ?? 0)) / Math.max(1, row.num_steps ?? 1))}%`;
  return bar;
}

// --- the stream: one a page; while the page is hidden there is none, and afterwards it continues from the last id

function listen(address, kinds, sign) {
  let source = null, last = "";
  const open = () => {
    const question = new URLSearchParams({ lang, ...(last ? { after: last } : {}) });
    source = new EventSource(`${address}?${question}`);
    source.onopen = () => { sign.className = "live"; sign.textContent = words.live; };
    source.onerror = () => {
      sign.className = "live lost";
      sign.textContent = source.readyState === EventSource.CLOSED ? words.gone : words.lost;
    };
    for (const [kind, act] of Object.entries(kinds)) {
      source.addEventListener(kind, (event) => { last = event.lastEventId || last; act(JSON.parse(event.data)); });
    }
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) source.close(); else open();
  });
  open();
}

function showHead(title, ...links) {
  document.title = title;
  const sign = make("span", { className: "live lost", textContent: "…" });
  const question = new URLSearchParams({ lang: other });
  head.append(
    make("h1", { textContent: title }),
    make("nav", {}, ...links, make("a", { href: `?${question}`, lang: other, textContent: other === "ja" ? "日本語" : "English" }), sign),
  );
  return sign;
}

// --- the table

function showTable() {
  const sign = showHead(words.title);
  head.append(make("div", { className: "where", textContent: `${words.folder}: ${settings.folder}` }));
  const text = make("input", { type: "search", placeholder: words.filter, ariaLabel: words.filter });
  const state = make("select", { ariaLabel: words.state }, new Option(words.any, ""),
    ...["running", "finished", "failed", "stopped", "interrupted", "damaged", "sent"]
      .map((one) => new Option(words[`state_${one}`], one)));
  const heads = ["run", "state", "model", "progress", "loss", "held_out"];
  const body = make("tbody"), note = make("p", { className: "soft" });
  const table = make("table", { className: "cards runs" },
    make("thead", {}, make("tr", {}, ...heads.map((one) => make("th", { textContent: words[one], scope: "col",
      className: one === "loss" || one === "held_out" ? "number" : "" })))), body);
  const rows = new Map();  // run -> { row, shown }

  function matches(row) {
    const sought = text.value.trim().toLowerCase();
    return (!state.value || row.state === state.value)
      && (!sought || [row.run, row.model, row.method].some((one) => one && one.toLowerCase().includes(sought)));
  }

  function arrange() {
    const all = [...rows.values()].sort((a, b) => (b.row.state === "running") - (a.row.state === "running")
      || (b.row.started ?? 0) - (a.row.started ?? 0) || a.row.run.localeCompare(b.row.run));
    const wanted = all.filter((one) => matches(one.row)).map((one) => one.shown);
    if (wanted.length !== body.children.length || wanted.some((one, at) => one !== body.children[at])) {
      body.replaceChildren(...wanted);
    }
    table.hidden = !wanted.length;
    note.textContent = !rows.size ? fill(words.none, settings.folder) : wanted.length ? "" : words.no_match;
  }

  function take(changed) {
    for (const row of changed) {
      if (row.gone) { rows.delete(row.run); continue; }
      const known = rows.get(row.run) ?? { shown: make("tr") };
      known.row = row;
      known.shown.replaceChildren(...cellsOf(row));
      rows.set(row.run, known);
    }
    arrange();
  }

  text.addEventListener("input", arrange);
  state.addEventListener("change", arrange);
  main.append(make("div", { className: "tools" }, text, state), make("div", { className: "scroll" }, table), note);
  if (settings.cluster) showCluster();
  listen("/api/runs/events", { all: (found) => { rows.clear(); take(found); }, rows: take }, sign);
}

function cellsOf(row) {
  const isSearch = row.kind === "search", link = isSearch ? reportOf(row.run) : pageOf(row.run);
  const began = row.started ? new Date(row.started * 1000).toLocaleString(lang, { dateStyle: "medium", timeStyle: "short" }) : "";
  const losses = row.before === null || row.before === undefined
    ? number(row.after) : `${number(row.before)} → ${row.after === null ? "…" : number(row.after)}`;
  const trouble = row.damage ?? row.error;
  const steps = isSearch ? fill(words.trials, row.step) : row.num_steps ? `${count(row.step)} / ${count(row.num_steps)}` : "";
  const left = timeLeft(row);
  const progress = row.state === "sent" ? [make("small", { textContent: fill(words.sent_to, row.where, row.run) })]
    : [row.state === "running" && row.num_steps ? barOf(row) : null, steps,
      left ? make("small", { textContent: `${words.time_left}: ${left}` }) : null];
  return [
    make("td", { className: "name" }, make("a", { href: link, textContent: row.run }), make("small", { textContent: began })),
    make("td", {}, stateOf(row)),
    make("td", { className: "wide" }, row.model ?? "", make("small", { textContent: row.method ?? "" }),
      trouble ? make("small", { className: "bad", textContent: trouble.split("\n")[0].slice(0, 200) }) : null),
    make("td", { className: "nowrap", head: words.progress }, ...progress),
    make("td", { className: "number", head: words.loss, textContent: number(row.loss) }),
    make("td", { className: "number", head: words.held_out, textContent: losses }),
  ];
}

async function showCluster() {
  const place = make("div", { className: "scroll" }, make("p", { className: "soft", textContent: words.asking }));
  main.append(make("h2", { textContent: `${words.cluster} (${settings.cluster})` }), place);
  const heads = ["node", "state", "cores", "memory", "device", "slots", "does"];
  const ask = async () => {
    if (document.hidden) return;
    let found;
    try { found = await (await fetch("/api/nodes")).json(); } catch { return; }
    if (found.error) { place.replaceChildren(make("p", { className: "bad", textContent: found.error })); return; }
    place.replaceChildren(tableOf(heads, found.nodes.map((one) => [one.name, one.state, one.num_cores,
      one.memory_bytes ? `${(one.memory_bytes / 2 ** 30).toFixed(1)} GiB` : "", one.device,
      `${one.slots_in_use} / ${one.slots}`, one.does.join(", ")])));
  };
  await ask();
  setInterval(ask, 60000);
}

function tableOf(heads, rows, numbers = []) {
  const kind = (at) => (numbers.includes(heads[at]) ? "number" : at ? "" : "name");
  return make("table", { className: "cards" },
    make("thead", {}, make("tr", {}, ...heads.map((one, at) => make("th", { textContent: words[one] ?? one, scope: "col",
      className: kind(at) === "number" ? "number" : "" })))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell, at) => {
      const own = make("td", { className: kind(at), head: at ? words[heads[at]] ?? heads[at] : null });
      own.append(cell ?? "");
      return own;
    })))));
}

// --- one run

function showRun() {
  const sign = showHead(name, make("a", { href: local("/"), textContent: words.all }),
    make("a", { href: reportOf(name), textContent: words.report }));
  const whole = make("div", { className: "whole" }), facts = make("dl", { className: "facts" });
  const chart = new Chart(words), live = make("div"), plan = make("div");
  const phases = make("div"), events = make("pre"), logs = make("div"), files = new Map();
  const folded = (title, body, open) => make("details", { open }, make("summary", { textContent: title }), body);
  main.append(whole, facts, make("h2", { textContent: words.curve }), chart.figure, live, make("h2"),
    folded(words.events, events, true), folded(words.plan, plan, false), folded(words.phases, phases, false),
    folded(words.logs, logs, false));

  function append(place, text) {  // and stay at the end, where the reader is there
    const isAtEnd = place.scrollTop + place.clientHeight >= place.scrollHeight - 8;
    place.textContent = (place.textContent + text).slice(-60000);
    if (isAtEnd) place.scrollTop = place.scrollHeight;
  }

  const lines = (found) => found.map((one) => `${one}\n`).join("");
  listen(`/api/runs/${encodeURIComponent(name)}/events`, {
    whole: (found) => {
      chart.set(found.losses, found.held_out, found.width);
      events.textContent = "";
      append(events, lines(found.lines));
      plan.replaceChildren(...(found.plan ? planOf(found.plan) : []));
    },
    more: (found) => { chart.add(found.losses, found.held_out); if (found.lines.length) append(events, lines(found.lines)); },
    now: (found) => {
      whole.replaceChildren(...summaryOf(found.row));
      facts.replaceChildren(...(found.facts ?? []).map(factOf));
      live.replaceChildren(...machinesOf(found), ...stagesOf(found));
      phases.replaceChildren(tableOf(["phase", "measured", "predicted"], found.phases ?? [], ["measured", "predicted"]));
    },
    log: (found) => {
      if (!files.has(found.file)) {
        files.set(found.file, make("pre"));
        logs.append(make("h3", { textContent: found.file }), files.get(found.file));
      }
      if (found.is_first) files.get(found.file).textContent = "";
      append(files.get(found.file), found.text);
    },
  }, sign);
}

function summaryOf(row) {
  const left = timeLeft(row), isLive = row.state === "running";
  const doing = row.total ? ` (${count(row.done)} / ${count(row.total)})` : "";
  const state = stateOf(row);
  state.append(isLive ? doing : "");
  const losses = row.before !== null && row.before !== undefined
    ? `${words.held_out} ${number(row.before)} → ${row.after === null ? "…" : number(row.after)}` : "";
  return [
    make("div", { className: "line" }, state, make("b", { textContent: [row.model, row.method].filter(Boolean).join(" · ") }),
      make("span", { textContent: losses })),
    row.num_steps ? barOf(row) : null,
    make("div", { className: "line soft" },
      row.num_steps ? `${words.step} ${count(row.step)} / ${count(row.num_steps)}` : "",
      left ? make("span", { textContent: `${words.time_left}: ${left}` }) : null),
    row.damage || row.error ? make("p", { className: "bad", textContent: row.damage ?? row.error }) : null,
  ].filter(Boolean);
}

function factOf([title, value]) {
  const [own, beside] = value.split(" (");
  return make("div", {}, make("dt", { textContent: title }), make("dd", {}, own,
    beside ? make("small", { textContent: beside.slice(0, -1) }) : null));
}

function busyOf(row) {
  if (row.busy === null || row.busy === undefined) return row.computes ?? "";
  const bar = make("div", { className: "bar", title: fill(words.busy_part, `${Math.round(100 * row.busy)} %`) }, make("div"));
  bar.firstChild.style.width = `${100 * row.busy}%`;
  return make("span", {}, bar, `${Math.round(100 * row.busy)} %`);
}

function machinesOf(found) {
  if (!found.machines?.length || found.stages?.length) return [];
  const heads = ["node", "device", "share", "tokens_per_s", "busy", "waits", "memory", "sent"];
  return [make("h2", { textContent: words.machines }), make("div", { className: "scroll" }, tableOf(heads,
    found.machines.map((one) => [nodeOf(one), one.device, one.share, one.tokens_per_s, busyOf(one), one.waits, one.memory, one.sent]),
    ["tokens_per_s", "waits", "memory", "sent"]))];
}

function stagesOf(found) {
  if (!found.stages?.length) return [];
  const heads = ["stage", "node", "device", "layers", "busy", "computes", "waits", "memory", "sent"];
  const beside = (row, key) => make("span", {}, row[key], make("small", { textContent: `${words.predicted} ${row.predicted[key]}` }));
  return [make("h2", { textContent: words.stages }), make("div", { className: "scroll" }, tableOf(heads,
    found.stages.map((one) => [`${words.stage} ${one.stage}`, nodeOf(one), one.device, one.layers, busyOf(one), beside(one, "computes"),
      beside(one, "waits"), beside(one, "memory"), beside(one, "sent")]), ["computes", "waits", "memory", "sent"]))];
}

function nodeOf(row) {
  return make("span", {}, row.node, row.is_slowest ? make("small", { textContent: words.slowest }) : null);
}

function planOf(plan) {
  const part = (title, heads, rows) => (rows.length
    ? [title ? make("h3", { textContent: title }) : null, make("div", { className: "scroll" }, tableOf(heads, rows))] : []);
  return [
    ...part(null, ["setting", "value", "why"], plan.settings.map(([key, value, why]) => [
      make("span", { className: "key-name", textContent: key }), value, why])),
    ...part(words.ways, ["way", "time", "memory", "why"], plan.ways),
    ...part(words.left_out, ["node", "why"], plan.left_out),
  ].filter(Boolean);
}

if (name === null) showTable(); else showRun();
