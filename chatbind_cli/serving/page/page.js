// The page of `chatbind serve`. What a model or a file says becomes text, never HTML: the one piece
// of HTML that comes from the server is a preview, whose templates escape.

const $ = (id) => document.getElementById(id);
const KEY = "chatbind-key";

let said = []; // the conversation so far, in OpenAI's form
let attached = []; // what goes with the next question: { file, modality, node }
let running = null; // the AbortController of the answer that is being given
let model = ""; // its name

// --- the server ---------------------------------------------------------------------------------

let newKey = null; // while somebody types one

function wantKey(line) {
  newKey ??= new Promise((resolve) => {
    $("refused").textContent = sessionStorage.getItem(KEY) === null ? "" : line;
    $("key").hidden = false;
    $("secret").focus();
    $("key").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, $("secret").value.trim());
      $("secret").value = "";
      $("key").hidden = true;
      newKey = null;
      resolve();
      $("text").focus();
    };
  });
  return newKey;
}

const stopped = (signal) => new Promise((_, reject) => {
  signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
});

// A response that is good; asks for a key, and again, where the server wants one.
async function call(path, init = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...init.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...init, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached.");
    }
    if (response.ok) return response;
    const line = await errorLine(response);
    if (response.status !== 401) throw new Error(line);
    if (key === sessionStorage.getItem(KEY)) await Promise.race([wantKey(line), stopped(init.signal)]);
  }
}

async function errorLine(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answers ${response.status} ${response.statusText}.`;
  }
}

// The events of an answer as they come: parsed, without the last one, which says that it was.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- media --------------------------------------------------------------------------------------

function attach(files) {
  for (const file of files) {
    const node = $("medium").content.firstElementChild.cloneNode(true);
    const item = { file, modality: "", node };
    const [choice, remove] = [node.querySelector("select"), node.querySelector(".remove")];
    choice.selectedIndex = -1;
    choice.setAttribute("aria-label", `What ${file.name} is seen as`);
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    choice.onchange = () => { item.modality = choice.value; look(item); };
    remove.onclick = () => {
      attached = attached.filter((other) => other !== item);
      node.remove();
      $("files").focus();
    };
    attached.push(item);
    $("media").append(node);
    look(item);
  }
}

// Shows a medium as the server sees it, and learns what that takes it for.
async function look(item) {
  const view = item.node.querySelector(".view");
  const asked = (item.asked = {});
  view.ariaBusy = "true";
  let shown;
  try {
    const about = { name: item.file.name, ...(item.modality && { modality: item.modality }) };
    const request = { method: "POST", body: item.file };
    const response = await call(`/preview?${new URLSearchParams(about)}`, request);
    const parsed = new DOMParser().parseFromString(await response.text(), "text/html");
    shown = document.adoptNode(parsed.querySelector("figure"));
    await shown.querySelector("img")?.decode(); // so that the page does not jump
    if (item.asked !== asked) return; // another modality was chosen meanwhile
    item.modality = shown.dataset.modality;
    item.node.querySelector("select").value = item.modality;
  } catch (error) {
    if (item.asked !== asked) return;
    shown = document.createElement("p");
    shown.className = "failure";
    shown.setAttribute("role", "alert");
    shown.textContent = error.message;
  }
  view.replaceChildren(shown);
  view.ariaBusy = "false";
}

const dataUri = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error(`${file.name} cannot be read any more.`));
  reader.readAsDataURL(file);
});

async function part({ file, modality }) {
  return { type: "media", url: await dataUri(file), ...(modality && { modality }) };
}

// --- the conversation ---------------------------------------------------------------------------

function showTurn(text, items) {
  const node = $("turn").content.firstElementChild.cloneNode(true);
  node.querySelector("h2").textContent = `Question ${$("turns").childElementCount + 1}`;
  node.querySelector(".asked .words").textContent = text;
  node.querySelector(".media").append(...items.map((item) => item.node.querySelector(".view")));
  $("turns").append(node);
  $("welcome").hidden = true;
  $("anew").hidden = false;
  return node;
}

function showState(busy, line) {
  $("ask").hidden = busy;
  $("stop").hidden = !busy;
  $("status").textContent = line;
}

function showError(line) {
  $("error").textContent = line;
  $("error").hidden = line === "";
}

const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

async function ask(text) {
  const items = attached;
  const controller = (running = new AbortController());
  const turn = showTurn(text, items);
  const [words, figures] = [turn.querySelector(".answer .words"), turn.querySelector(".figures")];
  const clock = new Clock(figures);
  attached = [];
  $("media").replaceChildren();
  $("text").value = "";
  showError("");
  showState(true, "Answering");
  atEnd = true;
  toEnd();
  let problem = null;
  let question;
  try {
    question = { role: "user", content: [{ type: "text", text }, ...(await Promise.all(items.map(part)))] };
    const body = {
      model, messages: [...said, question], stream: true, stream_options: { include_usage: true },
      temperature: number("temperature"), max_tokens: number("most"),
    };
    const response = await call("/v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), signal: controller.signal,
      headers: { "Content-Type": "application/json" },
    });
    for await (const event of events(response)) {
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) words.append(piece);
      clock.hear(event, piece);
    }
  } catch (error) {
    problem = error;
  }
  words.ariaBusy = "false";
  if (running !== controller) return clock.end(""); // a new conversation has begun
  running = null;
  const given = words.textContent;
  const aborted = problem?.name === "AbortError";
  if (problem !== null && !aborted) showError(problem.message);
  clock.end(aborted ? "stopped" : problem ? "broken off" : "");
  if (given === "" && problem !== null) {
    takeBack(turn, text, items);
    showState(false, aborted ? "Stopped" : "");
    return;
  }
  said.push(question, { role: "assistant", content: given });
  showState(false, `Answered. ${figures.textContent}`);
}

// A question that got no answer goes back to where it can be changed and asked again.
function takeBack(turn, text, items) {
  const views = turn.querySelectorAll(".media .view");
  items.forEach((item, at) => item.node.prepend(views[at]));
  $("media").prepend(...items.map((item) => item.node));
  attached = [...items, ...attached];
  turn.remove();
  if ($("text").value === "") $("text").value = text;
  $("text").focus();
  $("anew").hidden = said.length === 0;
  $("welcome").hidden = said.length > 0;
}

// What an answer takes, in words below it.
class Clock {
  constructor(node) {
    this.node = node;
    this.start = performance.now();
    this.usage = null;
    this.notes = [];
    this.timer = setInterval(() => this.show(), 100);
  }

  get seconds() { return (performance.now() - this.start) / 1000; }

  hear(event, piece) {
    if (piece) this.first ??= this.seconds;
    this.usage = event.usage ?? this.usage;
    if (event.choices?.[0]?.finish_reason === "length") this.notes.push("cut off at the most tokens");
  }

  show() {
    const parts = [`${this.seconds.toFixed(1)} s`];
    if (this.first !== undefined) parts.push(`first words after ${this.first.toFixed(1)} s`);
    const tokens = this.usage?.completion_tokens;
    if (tokens) parts.push(`${tokens} token${tokens > 1 ? "s" : ""}`);
    this.node.textContent = [...parts, ...this.notes].join(" · ");
  }

  end(note) {
    clearInterval(this.timer);
    if (note) this.notes.push(note);
    this.show();
  }
}

// Stays at the end of the page, whatever grows, for as long as the reader is there.
const page = document.scrollingElement;
let atEnd = true;
let height = 0;
const toEnd = () => { page.scrollTop = page.scrollHeight; };
document.addEventListener("scroll", () => {
  // What has grown since the last frame has not moved the reader.
  atEnd = Math.min(height, page.scrollHeight) - page.scrollTop - page.clientHeight < 40;
});
const growing = new ResizeObserver(() => {
  height = page.scrollHeight;
  if (atEnd) toEnd();
});
for (const node of [$("turns"), document.querySelector("footer")]) growing.observe(node);

function startAnew() {
  running?.abort();
  running = null;
  said = [];
  attached = [];
  for (const id of ["turns", "media"]) $(id).replaceChildren();
  $("text").value = "";
  showError("");
  showState(false, "New conversation");
  $("welcome").hidden = false;
  $("anew").hidden = true;
  $("text").focus();
}

// --- what one can do ----------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (running === null && text !== "") ask(text);
  else $("text").focus();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").addEventListener("click", () => { running?.abort(); $("text").focus(); });
$("anew").addEventListener("click", startAnew);
$("files").addEventListener("change", (event) => {
  attach(event.target.files);
  event.target.value = ""; // the same file may be chosen again
  $("text").focus();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length === 0) return;
  event.preventDefault();
  attach(event.clipboardData.files);
});
let over = 0; // how many elements a dragged file is over
const carries = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => { if (carries(event)) $("drop").hidden = ++over === 0; });
document.addEventListener("dragleave", (event) => { if (carries(event)) $("drop").hidden = --over <= 0; });
document.addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  over = 0;
  $("drop").hidden = true;
  attach(event.dataTransfer.files);
  $("text").focus();
});

call("/v1/models").then((response) => response.json()).then(({ data }) => {
  model = data[0].id;
  $("model").textContent = model;
}).catch((error) => showError(error.message));
