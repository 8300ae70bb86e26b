// Tokens a second of examples/web in headless Chromium: node benchmarks/web.mjs EXPORT [threads]
//
// EXPORT is a folder that `kernelize export` wrote. Two questions are asked; of the second are told the tokens that the
// model took, prompt and answer (`whole`) and from the first of the answer on (`written`), by the clock and by the CPU
// time of the tab (/proc/PID/stat, so on Linux alone).

import { createReadStream, existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { dirname, extname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const web = resolve(dirname(fileURLToPath(import.meta.url)), "../examples/web");
const { chromium } = createRequire(`${web}/`)("playwright-core");
const [folder, threads = "1"] = process.argv.slice(2);
const types = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".css": "text/css", ".json": "application/json" };
const isolated = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

const server = createServer((request, response) => {
  const path = new URL(request.url, "http://localhost").pathname;
  const file = path.startsWith("/model/") ? join(folder, path.slice(7)) : join(web, path === "/" ? "index.html" : path);
  if (!existsSync(file)) return response.writeHead(404).end();
  const head = { "content-type": types[extname(file)] ?? "application/octet-stream", "content-length": statSync(file).size };
  response.writeHead(200, threads === "1" ? head : { ...head, ...isolated });
  return createReadStream(file).pipe(response);
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));

/** CPU seconds of all tabs that descend from this process. */
function seconds() {
  const all = new Map();
  for (const pid of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    try {
      const fields = readFileSync(`/proc/${pid}/stat`, "utf8").replace(/^.*\) /s, "").split(" ");
      const tab = readFileSync(`/proc/${pid}/cmdline`, "utf8").includes("--type=renderer");
      all.set(Number(pid), { parent: Number(fields[1]), tab, ticks: Number(fields[11]) + Number(fields[12]) });
    } catch {
      continue; // it has ended
    }
  }
  const ours = (pid) => pid === process.pid || (all.has(pid) && ours(all.get(pid).parent));
  return [...all].filter(([pid, { tab }]) => tab && ours(pid)).reduce((sum, [, { ticks }]) => sum + ticks, 0) / 100;
}

const executablePath = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage();
page.setDefaultTimeout(300_000);
await page.goto(`http://127.0.0.1:${server.address().port}/?threads=${threads}`);
await page.waitForFunction(() => document.getElementById("status").dataset.ready || !document.getElementById("error").hidden);
if (await page.locator("#error").isVisible()) throw new Error(await page.locator("#error").textContent());
await page.evaluate(() => (document.getElementById("limit").value = 48));
const seen = async () => Number((await page.locator("#seen").textContent()).replaceAll(",", ""));

const now = async () => ({ seen: await seen(), cpu: seconds(), clock: performance.now() / 1000 });

function rate(from, to) {
  const tokens = to.seen - from.seen;
  return { perSecond: tokens / (to.clock - from.clock), perCpuSecond: tokens / (to.cpu - from.cpu) };
}

async function ask(question, answers) {
  const began = await now();
  await page.fill("#question", question);
  await page.keyboard.press("Enter");
  await page.waitForFunction((n) => document.querySelectorAll("li.assistant")[n - 1]?.textContent.trim(), answers, { polling: 5 });
  const first = await now();
  await page.waitForFunction((n) => document.querySelectorAll("li.assistant:not([aria-busy])").length === n, answers);
  const end = await now();
  return { tokens: end.seen - began.seen, whole: rate(began, end), written: rate(first, end) };
}

await ask("Who are you?", 1);
const found = await ask("What is the capital of France, and what is it known for?", 2);
const answer = await page.locator("#messages li.assistant").last().textContent();
console.log(JSON.stringify({ export: folder, threads, ...found, stateBytes: await page.locator("#bytes").getAttribute("data-bytes"), answer }));
await browser.close();
server.close();
