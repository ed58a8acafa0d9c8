// Opens one page in Chromium and says what it finds there; see look() in browser.py.
import fs from "node:fs";

const task = JSON.parse(process.argv[2]);
const { chromium } = await import(`${task.modules}/playwright-core/index.mjs`);
const quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({ executablePath: task.chromium, args: quiet });
try {
  const viewport = { width: task.width, height: 900 };
  const context = await browser.newContext({ viewport, colorScheme: task.scheme, isMobile: task.width < 500 });
  const page = await context.newPage();
  const messages = [];
  page.on("console", (m) => messages.push(`${m.type()}: ${m.text()}`));
  page.on("pageerror", (e) => messages.push(`error: ${e.message}`));
  page.on("requestfailed", (r) => messages.push(`failed: ${r.url()}`));
  const answer = await page.goto(task.address);
  if (task.press) await page.click(task.press);
  if (task.until) await page.waitForSelector(task.until, { timeout: 240000 });
  const found = await page.evaluate(() => ({
    scroll_width: document.documentElement.scrollWidth,
    isolated: window.crossOriginIsolated,
    text: document.body.innerText,
    charts: [...document.querySelectorAll("[data-chart]")].map((chart) => {
      const room = chart.getBoundingClientRect();
      const marks = [...chart.querySelectorAll(".bar, .dot, .mark, .curve, .count, .heat")].filter((mark) => {
        const size = mark.getBoundingClientRect();
        return size.width > 0 && size.height > 0;
      });
      return { title: chart.dataset.chart, width: room.width, height: room.height, marks: marks.length };
    }),
  }));
  await page.screenshot({ path: task.picture, fullPage: true });
  await page.evaluate(fs.readFileSync(`${task.modules}/axe-core/axe.min.js`, "utf8"));
  const judged = await page.evaluate(() => axe.run());
  const violations = judged.violations
    .filter((v) => ["serious", "critical"].includes(v.impact))
    .map((v) => `${v.id}: ${v.nodes[0].html.slice(0, 200)} ${v.nodes[0].failureSummary}`);
  process.stdout.write(JSON.stringify({ ...found, status: answer?.status() ?? 0, messages, violations }));
} finally {
  await browser.close();
}
