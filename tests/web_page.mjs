// Drives examples/web in Chromium as a person would: node web_page.mjs '{"url": …, "browser": …, "document": …}'.
// Prints one JSON line: what the page said, its errors, the state's bytes as they were read. `pictures`: a folder.

import { createRequire } from "node:module";

const settings = JSON.parse(process.argv[2]);
const { chromium } = createRequire(`${settings.web}/`)("playwright-core");

const browser = await chromium.launch({ executablePath: settings.browser, args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1200, height: 800 }, colorScheme: settings.scheme ?? "light" });
page.setDefaultTimeout(settings.patience ?? 60000);
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (line) => line.type() === "error" && errors.push(line.text()));
const outside = [];
page.on("request", (request) => request.url().startsWith("http") && !request.url().startsWith(new URL(settings.url).origin) && outside.push(request.url()));

const text = (id) => page.locator(`#${id}`).textContent();
const bytes = async () => Number(await page.locator("#bytes").getAttribute("data-bytes"));
const picture = (name) => settings.pictures && page.screenshot({ path: `${settings.pictures}/${name}.png`, fullPage: true });

const said = { errors, outside, bytes: [], answers: [] };
await page.goto(settings.url);
await page.waitForFunction(() => document.getElementById("status").dataset.ready || !document.getElementById("error").hidden);
said.status = await text("status");
if (await page.locator("#error").isVisible()) {
  said.error = await text("error");
} else {
  said.bytes.push(await bytes());
  if (settings.document) {
    await page.fill("#document", settings.document);
    await page.click("#start");
    while (await page.locator("#send").isDisabled()) {
      said.bytes.push(await bytes());
      if (said.bytes.length === settings.stopAfter) await page.click("#stop");
      await page.waitForTimeout(50);
    }
    said.seen = await text("seen");
    said.reading = await text("reading");
    said.line = await page.locator("#line").getAttribute("points");
  }
  for (const question of settings.questions ?? []) {
    await page.evaluate((limit) => (document.getElementById("limit").value = limit), settings.limit ?? 24);
    await page.fill("#question", question);
    await page.keyboard.press("Enter");
    const answered = said.answers.length + 1;
    await page.waitForFunction((n) => document.querySelectorAll("li.assistant:not([aria-busy])").length === n, answered);
    said.answers.push(await page.locator("#messages li.assistant").last().textContent());
    said.bytes.push(await bytes());
    said.rate = await text("rate");
  }
}
await picture(settings.name ?? "page");
await browser.close();
console.log(JSON.stringify(said));
