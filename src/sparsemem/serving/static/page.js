"use strict";

const POLL_MILLISECONDS = 400;
const REFRESH_MILLISECONDS = 3000;
const byId = (id) => document.getElementById(id);
let state = { ready: false, model: "", lessons: [], undone: [], asked: [], changed: null, job: null, error: null };
/* The number of the exchange that the next question follows; null: it begins a conversation; undefined: no state yet. */
let current;
/* What is being answered: an exchange, or the number of one with more text for a side. */
let live = null;
let polling = false;
let told = null;

/* An element with text and children; text never becomes markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

async function send(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.headers = { "content-type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached. Is `sparsemem ui` still running?");
  }
  if (response.ok) return response;
  const answer = await response.json();
  throw new Error(answer.error || `The server answered ${response.status}.`);
}

const call = async (method, path, body) => (await send(method, path, body)).json();

/* Ask for an answer, and give each of its events to `tell`; the last event. */
async function stream(path, body, tell) {
  const reader = (await send("POST", path, body)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) throw new Error("The server stopped before the answer was complete.");
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events.map((one) => JSON.parse(one.slice("data: ".length)))) {
      if (event.error) throw new Error(event.error);
      if (event.number) return event;
      tell(event);
    }
  }
}

function complain(message) {
  byId("error-text").textContent = message;
  byId("error").hidden = !message;
}

/* Do something with the server; what goes wrong is shown until it is closed. */
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    complain(error.message);
    return null;
  }
}

/* New children for an element; who is on one of the old ones by keyboard stays there. */
function replace(id, ...children) {
  const focused = byId(id).contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  byId(id).replaceChildren(...children);
  if (focused) byId(id).querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
}

/* What had the focus may be gone. */
function keepFocus(id) {
  if (document.activeElement === document.body) byId(id).focus();
}

function show(next) {
  if (next) state = next;
  if (state.ready) follow();
  byId("model").textContent = state.model;
  if (state.error && state.error !== told) complain(state.error);
  told = state.error;
  showJob();
  showLessons();
  showAsked();
  showChanges();
  if (state.job && !polling) poll();
}

function showJob() {
  const job = state.job;
  byId("job").hidden = !job && !live;
  const text = job ? (job.steps ? `${job.phase}: ${job.step} of ${job.steps}` : `${job.phase} …`) : "Answering …";
  if (byId("job-text").textContent !== text) byId("job-text").textContent = text;
  const bar = byId("job-bar");
  if (job && job.steps) { bar.max = job.steps; bar.value = job.step; } else bar.removeAttribute("value");
  const busy = !state.ready || Boolean(job);
  byId("teach-button").disabled = busy;
  byId("file").disabled = busy;
  byId("changes-button").disabled = busy || !state.lessons.some((lesson) => lesson.on);
  byId("ask-button").disabled = busy || Boolean(live);
}

async function poll() {
  polling = true;
  while (state.job) {
    await new Promise((done) => setTimeout(done, POLL_MILLISECONDS));
    const next = await attempt(() => call("GET", "/api/state"));
    if (!next) break;
    state = next;
    if (state.job) showJob();
  }
  polling = false;
  show();
}

const sizeOf = (bytes) => bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;

function showLessons() {
  byId("no-lessons").hidden = state.lessons.length > 0;
  byId("no-lessons").textContent = state.ready ? "Nothing yet. The model is as it came."
    : state.error ? "The model could not be loaded." : "The model and its lessons are being loaded …";
  const busy = Boolean(state.job);
  const open = new Set([...document.querySelectorAll(".lessons details[open]")].map((one) => one.closest("li").dataset.lesson));
  replace("lessons", ...[...state.lessons].reverse().map((lesson) => {
    const count = lesson.records.length;
    const answers = new Set(lesson.records.map((record) => record.completion));
    const says = answers.size === 1 && count <= 9 ? [...answers][0] : null;
    const facts = lesson.given ? "the adapter that the page was started with" : [
      count > 1 ? `${count} questions` : null, `${lesson.rows.toLocaleString("en")} rows`, sizeOf(lesson.size),
      `${lesson.seconds.toFixed(1)} s`, lesson.replaced ? "a newer lesson answers instead" : null].filter(Boolean).join(" · ");
    return make("li", { class: lesson.on ? "" : "off", "data-lesson": lesson.name },
      make("div", { class: "title" }, lesson.title),
      says ? make("div", { class: "says" }, `→ ${says}`) : null,
      make("div", { class: "facts" }, facts),
      count > 1 ? make("details", { open: open.has(lesson.name) }, make("summary", {}, "Questions"),
        make("ul", { class: "questions" }, ...lesson.records.map((record) => make("li", {}, record.completion
          ? `${record.prompt} → ${record.completion}` : record.prompt)))) : null,
      make("div", { class: "tools" },
        make("label", { class: "switch" },
          make("input", { type: "checkbox", role: "switch", checked: lesson.on, disabled: busy,
            "aria-label": `Use ${lesson.title}`,
            onchange: (event) => change("POST", lesson.name, { on: event.target.checked }) }),
          make("span", {}, lesson.on ? "on" : "off")),
        lesson.given ? null : make("button", { type: "button", disabled: busy, "aria-label": `Undo ${lesson.title}`,
          onclick: () => confirm(`Take back "${lesson.title}"?`) && change("DELETE", lesson.name) }, "Undo"),
        lesson.given ? null : make("a", { href: `/api/lessons/${lesson.name}/file`, download: true,
          "aria-label": `Download ${lesson.title}` }, "Download")));
  }));
  byId("undone-part").hidden = !state.undone.length;
  replace("undone", ...state.undone.map((lesson) => make("li", {},
    make("div", {}, lesson.title),
    make("div", { class: "tools" }, make("button", { type: "button", disabled: busy, "aria-label": `Teach ${lesson.title} again`,
      onclick: () => change("POST", `${lesson.name}/redo`, {}) }, "Teach again")))));
}

/* What another tab has changed is shown here, too. */
async function refresh() {
  if (document.hidden || polling || live) return;
  let next;
  try {
    next = await call("GET", "/api/state");
  } catch {
    return;
  }
  if (JSON.stringify(next) !== JSON.stringify(state)) show(next);
}

async function change(method, path, body) {
  const next = await attempt(() => call(method, `/api/lessons/${path}`, body));
  show(next || await attempt(() => call("GET", "/api/state")));
  keepFocus("lessons-title");
}

/* Go on with the last conversation at first, then with what another tab has added to the one shown. */
function follow() {
  if (current === undefined && state.asked.length) current = state.asked[0].number;
  if (!state.asked.some((one) => one.number === current)) current = null;
  for (let next; current && (next = state.asked.find((one) => one.follows === current));) current = next.number;
}

/* The exchanges of a conversation, in the order of asking. */
function conversation(last) {
  const one = state.asked.find((exchange) => exchange.number === last);
  return one ? [...conversation(one.follows), one] : [];
}

function showAsked() {
  const shown = conversation(current);
  const fresh = live && live.question ? [live] : [];
  replace("conversation", ...[...shown, ...fresh].map(exchange));
  byId("conversation").setAttribute("aria-busy", Boolean(live));
  byId("new-button").hidden = !shown.length;
  byId("new-button").disabled = Boolean(live);
  // a conversation is shown once, by its last exchange
  const earlier = state.asked.filter((one) => !shown.includes(one) && !state.asked.some((next) => next.follows === one.number));
  replace("asked", ...earlier.map((one) => make("article", { class: "card conversation" }, ...conversation(one.number).map(exchange))));
}

function exchange(one) {
  const told = live && live.number === one.number ? live : {};
  const tokens = one.pieces.map((piece) => {
    const token = make("span", { class: "token", title: `in scope: ${piece.gate}` }, piece.text);
    if (piece.gate > 0) token.style.backgroundColor = `rgba(var(--shade), ${(0.1 + 0.45 * piece.gate).toFixed(2)})`;
    return token;
  });
  const side = (title, name, ...text) => make("div", {}, make("h4", {}, title),
    make("p", { class: name, id: told[name] === undefined ? null : `live-${name}` }, ...(told[name] === undefined ? text : [told[name]]),
      one.cut[name] && told[name] === undefined ? " …" : ""),
    one.cut[name] ? make("button", { type: "button", class: "more", disabled: Boolean(live || state.job), "aria-label": `More of the ${name} answer to ${one.question}`,
      onclick: () => answer("/api/more", { number: one.number, side: name }, { number: one.number, [name]: one[name] }) }, "More") : null);
  return make("div", { class: "exchange" },
    make("p", { class: "asks" }, one.question),
    make("div", { class: "answers" }, side("Taught", "taught", ...tokens), side("Base", "base", one.base)),
    make("p", { class: "spoke" }, one.spoke || spoke(one)));
}

function spoke(one) {
  if (one.shut) return "What was taught was in scope at the answer's first tokens alone: this is the base model's answer.";
  return one.lesson ? `Spoke: ${one.title}${one.source ? ` (${one.source})` : ""}` : "No lesson spoke: this is the base model's answer.";
}

/* Get an answer and show it as it comes. */
async function answer(path, body, shown) {
  live = shown;
  show();
  const end = await attempt(() => stream(path, body, (texts) => {
    Object.assign(live, texts);
    for (const name of Object.keys(texts)) byId(`live-${name}`).textContent = texts[name];
  }));
  const asked = live.question;
  live = null;
  if (end && asked) current = end.number;
  show(await attempt(() => call("GET", "/api/state")));
  keepFocus("ask");
  return end;
}

function pairTable(title, pairs, told) {
  if (!pairs.length) return [];
  const changed = pairs.filter((pair) => pair.base !== pair.taught).length;
  const isSame = (pair) => pair.base === pair.taught;
  const rows = [...pairs].sort((a, b) => isSame(a) - isSame(b)).map((pair) => make("tr", {},
    make("td", { "data-label": "Question" }, pair.question),
    make("td", { "data-label": "Before" }, pair.base),
    make("td", { "data-label": "After", class: isSame(pair) ? "quiet" : "other" }, isSame(pair) ? "the same" : pair.taught)));
  return [make("h3", {}, `${title}: ${told || `${changed} of ${pairs.length} changed`}`),
    make("table", { class: "pairs" }, make("thead", {}, make("tr", {}, ...["Question", "Before", "After"].map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...rows))];
}

function showChanges() {
  const found = state.changed;
  if (!found) {
    byId("changes").replaceChildren();
    byId("changes-when").textContent = state.lessons.length ? "" : "Teach something first.";
    return;
  }
  const on = state.lessons.filter((lesson) => lesson.on).map((lesson) => lesson.name);
  const stale = JSON.stringify(on) !== JSON.stringify(found.lessons);
  byId("changes-when").textContent = stale ? "The lessons have changed since: look again." : "";
  const contexts = found.contexts || [];
  const prose = found.prose.map((text) => make("tr", {},
    make("td", {}, text.name),
    make("td", { class: "number", "data-label": "Perplexity before" }, text.base.toFixed(2)),
    make("td", { class: "number", "data-label": "after" }, text.taught.toFixed(2)),
    make("td", { class: "number", "data-label": "Tokens in scope" }, `${(100 * text.in_scope).toFixed(1)} %`)));
  byId("changes").replaceChildren(
    ...pairTable("General questions", found.questions),
    ...pairTable("Neighbours: the taught forms about others, and other questions about what was taught", found.neighbours || []),
    ...pairTable("What was taught, asked in contexts", contexts, `${contexts.filter((pair) => pair.right).length} of ${contexts.length} right`),
    make("h3", {}, "Prose"),
    make("table", {}, make("thead", {}, make("tr", {}, ...["Text", "Perplexity before", "after", "Tokens in scope"].map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...prose)));
}

function turn() {
  const page = location.hash === "#changes" ? "changes" : "teach";
  byId("page-teach").hidden = page !== "teach";
  byId("page-changes").hidden = page !== "changes";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/* Records that `sparsemem study` wrote are read beside their sentences first. */
let reviewed = { name: "", records: [] };

async function teachFile(file) {
  if (!file) return;
  const text = await file.text();
  const records = studied(text);
  if (records) review(file.name, records);
  else show(await attempt(() => call("POST", "/api/teach", { file: text, name: file.name })));
}

/* The records of a file in which each has the text of its source; null for any other file. */
function studied(text) {
  try {
    const records = text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
    return records.length && records.every((record) => record.prompt && record.source && record.source.text) ? records : null;
  } catch {
    return null;
  }
}

function review(name, records) {
  reviewed = { name, records };
  byId("review-records").replaceChildren(...records.map((record) => {
    const { file, lines, pages, text } = record.source;
    const field = (kind, label, value) => make("label", {}, label, make(kind === "wordings" ? "textarea" : "input", { "data-kind": kind, value }, kind === "wordings" ? value : ""));
    return make("li", {},
      make("blockquote", { title: `${file}, ${(lines || pages || []).join(" to ")}` }, text),
      field("prompt", "Question", record.prompt),
      field("completion", "Answer", record.completion),
      field("wordings", "Other ways to ask it", (record.wordings || []).join("\n")),
      make("label", { class: "keep" }, make("input", { type: "checkbox", "data-kind": "keep", checked: true }), "Teach it"));
  }));
  byId("review").hidden = false;
  byId("review").scrollIntoView();
}

function readReview() {
  return [...byId("review-records").children].flatMap((item, place) => {
    const value = (kind) => item.querySelector(`[data-kind=${kind}]`).value.trim();
    if (!item.querySelector("[data-kind=keep]").checked) return [];
    const wordings = value("wordings").split("\n").map((line) => line.trim()).filter(Boolean);
    return [{ ...reviewed.records[place], prompt: value("prompt"), completion: value("completion"), wordings }];
  });
}

byId("teach-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const phrasings = form.phrasings.value.split("\n").filter((line) => line.trim());
  const body = { question: form.question.value, answer: form.answer.value, phrasings };
  const next = await attempt(() => call("POST", "/api/teach", body));
  if (!next) return;
  if (!byId("ask").value) byId("ask").value = form.question.value;
  form.reset();
  show(next);
});

byId("ask-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = byId("ask").value;
  const shown = { number: 0, question, base: "", taught: "", pieces: [], cut: {}, spoke: "Answering …" };
  if (await answer("/api/ask", { question, follows: current }, shown)) byId("ask").select();
});
byId("new-button").addEventListener("click", () => {
  current = null;
  show();
  byId("ask").focus();
});

byId("changes-button").addEventListener("click", async () => {
  show(await attempt(() => call("POST", "/api/changes", {})));
});

byId("review").addEventListener("submit", async (event) => {
  event.preventDefault();
  const file = readReview().map((record) => JSON.stringify(record)).join("\n");
  const next = await attempt(() => call("POST", "/api/teach", { file, name: reviewed.name }));
  if (!next) return;
  byId("review").hidden = true;
  show(next);
});
byId("review-close").addEventListener("click", () => { byId("review").hidden = true; });

byId("file").addEventListener("change", async (event) => {
  await teachFile(event.target.files[0]);
  event.target.value = "";
});
for (const kind of ["dragenter", "dragover"]) byId("drop").addEventListener(kind, () => byId("drop").classList.add("over"));
for (const kind of ["dragleave", "drop"]) byId("drop").addEventListener(kind, () => byId("drop").classList.remove("over"));
byId("error-close").addEventListener("click", () => complain(""));
window.addEventListener("hashchange", turn);

setInterval(refresh, REFRESH_MILLISECONDS);
document.addEventListener("visibilitychange", refresh);

turn();
attempt(() => call("GET", "/api/state")).then(show);
