// The page: what a person does becomes a message to the worker, what the worker says becomes text.

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const base = new URL(`${(query.get("model") ?? "model").replace(/\/+$/, "")}/`, location.href).href;
const cores = Math.max(1, Math.floor((navigator.hardwareConcurrency || 2) / 2));
const threads = crossOriginIsolated ? Number(query.get("threads") ?? cores) : 1; // more need shared memory
const worker = new Worker("worker.js", { type: "module" });
const points = []; // [tokens seen, bytes]
let answer = null;

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const perSecond = (rate) => `${rate.toFixed(1)} tokens/s`;

function busy(what, can) {
  $("status").textContent = what;
  for (const id of ["question", "send", "reset", "document", "file", "start"]) $(id).disabled = !can;
  $("stop").disabled = can || !answer && what !== "Reading …";
  if (can) $("progress").hidden = true;
}

function progress(done, total) {
  $("progress").hidden = false;
  if (total) [$("progress").max, $("progress").value] = [total, done];
  else $("progress").removeAttribute("value");
}

function measured({ seen, bytes }) {
  $("seen").textContent = seen.toLocaleString("en");
  $("bytes").textContent = megabytes(bytes);
  $("bytes").dataset.bytes = bytes;
  points.push([seen, bytes]);
  const [right, top] = [Math.max(...points.map((p) => p[0]), 1), 2 * Math.max(...points.map((p) => p[1]))];
  $("line").setAttribute("points", points.map(([x, y]) => `${(240 * x) / right},${89 - (89 * y) / top}`).join(" "));
}

function message(kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  $("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = false;
}

function finished() {
  answer?.removeAttribute("aria-busy");
  if (answer?.textContent === "") answer.remove();
  answer = null;
}

const told = {
  loading({ what, loaded, total }) {
    $("status").textContent = what === "weights" ? `Loading weights: ${megabytes(loaded)}` : "Preparing …";
    progress(loaded, total);
  },
  ready({ source, precision, ...state }) {
    measured(state);
    busy(`${source}, ${precision}, ${threads === 1 ? "one thread" : `${threads} threads`}`, true);
    $("status").dataset.ready = "yes";
    $("question").focus();
  },
  reading({ done, total, rate, ...state }) {
    measured(state);
    $("reading").textContent = perSecond(rate);
    if (total > 64) progress(done, total);
  },
  read({ stopped, seen, ...state }) {
    measured({ seen, ...state });
    message("note", `${stopped ? "Stopped" : "Read"} at ${seen.toLocaleString("en")} tokens. Ask about it.`);
    $("document").value = "";
    busy("Ready", true);
  },
  text({ text, rate, ...state }) {
    measured(state);
    answer.textContent += text;
    if (rate) $("rate").textContent = perSecond(rate);
  },
  answered(state) {
    measured(state);
    finished();
    busy("Ready", true);
    $("question").focus();
  },
  reset(state) {
    points.length = 0;
    $("messages").replaceChildren();
    measured(state);
  },
  error({ message: text }) {
    finished();
    fail(text);
    busy($("status").dataset.ready ? "Ready" : "No model", Boolean($("status").dataset.ready));
  },
};

worker.onmessage = ({ data: { type, ...content } }) => told[type](content);
worker.onerror = (event) => {
  event.preventDefault();
  told.error({ message: `a script cannot be loaded${event.message ? `: ${event.message}` : ""}; was \`npm ci\` run in this folder?` });
};

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question) return;
  $("error").hidden = true;
  $("question").value = "";
  message("user", question);
  answer = message("assistant", "");
  answer.setAttribute("aria-busy", "true");
  busy("Writing …", false);
  const [temperature, limit] = [Number($("temperature").value), Number($("limit").value) || 256];
  worker.postMessage({ type: "ask", question, temperature, limit });
});

$("read").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("error").hidden = true;
  const [file] = $("file").files;
  const text = $("document").value.trim() || (file ? await file.text() : "");
  if (!text.trim()) return fail("There is no text to read: paste some, or choose a file.");
  busy("Reading …", false);
  worker.postMessage({ type: "read", text });
});

$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});

$("temperature").addEventListener("input", () => ($("warmth").textContent = $("temperature").value));
$("stop").addEventListener("click", () => worker.postMessage({ type: "stop" }));
$("reset").addEventListener("click", () => worker.postMessage({ type: "reset" }));
worker.postMessage({ type: "load", base, threads });
