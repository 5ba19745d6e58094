// The page at `/` in a headless Chromium, against a server that misbehaves (server.mjs). Run by scripts/page-check.sh.
//
// RECOUP_URL   a real server instead, for the tests that it can answer; its first two models are compared
// PAGE_SHOTS   a folder for screenshots
import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { after, before, describe, test } from "node:test";
import { serve } from "./server.mjs";

const require = createRequire(new URL("../../target/page/", import.meta.url));
const { chromium } = require("playwright-core");
const AXE = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const CHROMIUM = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
const SHOTS = process.env.PAGE_SHOTS;
if (SHOTS) mkdirSync(SHOTS, { recursive: true });

let browser;
before(async () => { browser = await chromium.launch({ executablePath: CHROMIUM, args: ["--no-sandbox"] }); });
const servers = [];
after(async () => { await browser.close(); for (const server of servers) server.close(); });

/** A page on a server of its own, which fails the test for any error of the script or breach of the policy. */
async function opened(options = {}, { width = 1280, height = 860, scheme = "light", path = "", first = async () => {} } = {}) {
  const server = await serve(options);
  servers.push(server);
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: scheme, acceptDownloads: true, serviceWorkers: "block" });
  context.setDefaultTimeout(30000);
  const page = await context.newPage();
  const faults = [];
  const elsewhere = [];
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (message) => { if (message.type() === "error" && !/Failed to load resource|ERR_|net::/.test(message.text())) faults.push(message.text()); });
  page.on("request", (request) => { if (!request.url().startsWith(server.url) && !/^(data|blob|about):/.test(request.url())) elsewhere.push(request.url()); });
  await first(page);
  await page.goto(server.url + path);
  return {
    page, server,
    say: async (text) => { await page.fill("#message", text); await page.press("#message", "Enter"); },
    ended: () => page.waitForFunction(() => document.getElementById("send").textContent === "Send"),
    shot: (name) => SHOTS && page.screenshot({ path: `${SHOTS}/${name}-${scheme}-${width}.png` }),
    close: async () => {
      await context.close();
      server.close();
      assert.deepEqual(faults, []);
      assert.deepEqual(elsewhere, [], "the page asked another server");
    },
  };
}

/** No rule of axe is broken, contrast and names of controls among them. */
async function accessible(page, where) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => window.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] }));
  assert.deepEqual(violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html.slice(0, 120)).join(" | ")}`), [], where);
}
const noSideways = async (page, where) => {
  const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(content <= window, `${where}: ${content} pixels of content in a window of ${window}`);
};
const answers = (page) => page.locator(".message.assistant");

describe("chat", () => {
  test("a message streams in, is drawn as Markdown and counted", async () => {
    const { page, server, say, ended, close } = await opened({ pace: 15 });
    await say("Why is the sky blue?");
    await page.waitForFunction(() => document.querySelector(".message.assistant .md")?.textContent.length > 10);
    const early = await answers(page).locator(".md").textContent();
    assert.ok(!early.includes("yellow"), "it came in one piece");
    await ended();
    const answer = answers(page);
    assert.equal(await answer.locator("table tbody tr").count(), 3);
    assert.equal(await answer.locator("ol > li").count(), 2);
    assert.equal(await answer.locator("ol ul > li").count(), 2);
    assert.match(await answer.locator("pre code").textContent(), /^def scattered\(nm[^]*\*\* 4$/);
    assert.equal(await answer.locator("a").getAttribute("href"), "https://example.org/sun");
    assert.equal(await answer.locator("a").getAttribute("rel"), "noopener noreferrer");
    assert.match(await answer.locator(".numbers").textContent(), /^\d+ tokens · [\d.,]+ tokens\/s · first after \d+ ms$/);
    assert.equal(server.seen.length, 1);
    const { body } = server.seen[0];
    assert.deepEqual(body.messages, [{ role: "user", content: "Why is the sky blue?" }]);
    assert.deepEqual(Object.keys(body).sort(), ["messages", "model", "stream", "stream_options"], "what was not set is not sent");
    assert.match(await page.locator("#spoken").textContent(), /fourth power/);
    await close();
  });

  test("Shift+Enter starts a line, Enter sends, Escape stops", async () => {
    const { page, server, ended, close } = await opened();
    await page.fill("#message", "SLOW");
    await page.press("#message", "Shift+Enter");
    await page.keyboard.type("second line");
    assert.equal(server.seen.length, 0);
    await page.press("#message", "Enter");
    await page.waitForFunction(() => document.querySelector(".md")?.textContent.includes("word 3"));
    await page.keyboard.press("Escape");
    await ended();
    assert.equal(server.seen[0].body.messages[0].content, "SLOW\nsecond line");
    assert.match(await answers(page).locator(".numbers").textContent(), /stopped/);
    const kept = await answers(page).locator(".md").textContent();
    await page.waitForTimeout(200);
    assert.equal(await answers(page).locator(".md").textContent(), kept, "it went on after it was stopped");
    await close();
  });

  test("the stop button stops", async () => {
    const { page, say, ended, close } = await opened();
    await say("SLOW");
    await page.waitForFunction(() => document.querySelector(".md")?.textContent.includes("word 2"));
    await page.click("#send");
    await ended();
    assert.match(await answers(page).locator(".numbers").textContent(), /stopped/);
    await close();
  });

  test("settings are sent, and kept over a reload", async () => {
    const { page, server, say, ended, close } = await opened();
    await page.click("#settings-button");
    for (const [name, value] of Object.entries({ system: "Be brief.", temperature: "0.5", top_p: "0.9", top_k: "40", min_p: "0.05", seed: "7", max_tokens: "7" })) await page.fill(`#set-${name}`, value);
    await page.selectOption("#set-thinking", "false");
    await page.reload();
    await say("THINK of it");
    await ended();
    const { messages, stream, stream_options, model, ...rest } = server.seen[0].body;
    assert.deepEqual(rest, { temperature: 0.5, max_tokens: 7, top_p: 0.9, top_k: 40, min_p: 0.05, seed: 7, chat_template_kwargs: { enable_thinking: false } });
    assert.deepEqual(messages[0], { role: "system", content: "Be brief." });
    assert.deepEqual([stream, stream_options, model], [true, { include_usage: true }, "books-bf16"]);
    assert.match(await answers(page).locator(".numbers").textContent(), /cut at the token limit/);
    assert.equal(await page.locator(".thinking:visible").count(), 0);
    await close();
  });

  test("thinking is folded away, and opens", async () => {
    const { page, say, ended, close } = await opened();
    await say("THINK about the sky");
    await ended();
    const thinking = answers(page).locator("details.thinking");
    assert.equal(await thinking.evaluate((node) => node.open), false);
    await thinking.locator("summary").click();
    assert.match(await thinking.textContent(), /Scattering is the word/);
    assert.ok(!(await answers(page).locator(".md").textContent()).includes("Scattering is the word"));
    await close();
  });

  test("an edited message forgets what followed, and regenerating asks again", async () => {
    const { page, server, say, ended, close } = await opened();
    await say("first");
    await ended();
    await say("second");
    await ended();
    assert.equal(server.seen[1].body.messages.length, 3);
    await page.locator(".message.user").first().getByRole("button", { name: "Edit" }).click();
    await page.fill("#edited", "other first");
    await page.press("#edited", "Enter");
    await ended();
    assert.deepEqual(server.seen[2].body.messages, [{ role: "user", content: "other first" }]);
    assert.equal(await page.locator(".message").count(), 2);
    await page.getByRole("button", { name: "Regenerate" }).click();
    await ended();
    assert.deepEqual(server.seen[3].body, server.seen[2].body);
    assert.equal(await page.locator(".message").count(), 2);
    await close();
  });

  test("a call of a tool is shown, and its result goes back", async () => {
    const { page, server, say, ended, close } = await opened();
    await page.click("#settings-button");
    await page.fill("#set-tools", '[{"type": "function", "function": {"name": "get_weather"}}]');
    await say("CALL the weather");
    await ended();
    assert.match(await page.locator("details.call").textContent(), /Calls get_weather\{\n {2}"city": "Rome",\n {2}"unit": "C"\n\}/);
    await page.getByLabel("Result of get_weather").fill("21 C");
    await page.getByRole("button", { name: "Send the result" }).click();
    await ended();
    const { messages, tools } = server.seen[1].body;
    assert.equal(tools[0].function.name, "get_weather");
    assert.deepEqual(messages[1].tool_calls, [{ id: "call_1", type: "function", function: { name: "get_weather", arguments: '{"city": "Rome", "unit": "C"}' } }]);
    assert.deepEqual(messages[2], { role: "tool", content: "21 C", tool_call_id: "call_1" });
    assert.match(await answers(page).last().textContent(), /It is 21 C there/);
    await page.fill("#set-tools", "[{");
    await say("again");
    assert.match(await page.locator(".note").textContent(), /no JSON/);
    await close();
  });

  test("nothing that a model writes is markup", async () => {
    const { page, say, ended, close } = await opened({ models: ["<img src=x onerror=window.pwned=9>", "b"] });
    await say("HOSTILE <b>bold</b>");
    await ended();
    await page.waitForTimeout(200);
    const md = answers(page).locator(".md");
    assert.equal(await page.evaluate(() => window.pwned), undefined);
    assert.equal(await md.locator("img, script, iframe, svg, style, [onerror], [onload]").count(), 0);
    const links = await md.locator("a").evaluateAll((all) => all.map((link) => link.getAttribute("href")));
    assert.deepEqual(links, ["https://example.org/i.png"], "no link but of http, https and mailto; a picture is one too");
    assert.match(await md.textContent(), /<img src=x onerror="window\.pwned=1">[^]*javascript:window\.pwned=3/);
    assert.equal(await page.locator(".user b").count(), 0);
    await close();
  });

  test("errors say what the server said", async () => {
    const { page, say, ended, close } = await opened();
    const note = () => answers(page).last().locator(".note").textContent();
    for (const [text, expected] of [
      ["FULL", /^429: The queue is full: 128 wait\. Try again in 2 s\.$/],
      ["BROKEN", /^502: <html><h1>Bad gateway<\/h1><\/html>$/],
      ["MIDWAY", /^The grammar allows no token here\.$/],
      ["GONE", /^The connection (broke|ended) before the answer/],
    ]) {
      await say(text);
      await ended();
      assert.match(await note(), expected);
    }
    assert.match(await answers(page).nth(2).locator(".md").textContent(), /It begins/, "what had come stays");
    assert.match(await answers(page).nth(3).locator(".md").textContent(), /goes well until/, "what had come stays");
    await page.click("#settings-button");
    await page.fill("#set-temperature", "5");
    await say("hot");
    await ended();
    assert.match(await note(), /temperature is 5/);
    assert.equal(await page.locator("#set-temperature").getAttribute("aria-invalid"), "true");
    await page.fill("#set-temperature", "1");
    await answers(page).last().getByRole("button", { name: "Try again" }).click();
    await ended();
    assert.equal(await answers(page).last().locator(".note").count(), 0);
    await close();
  });

  test("a model without a template continues plain text; thinking is not switched where it cannot be", async () => {
    const { page, server, say, ended, close } = await opened({ models: ["base-model", "still-model"] });
    await page.getByRole("button", { name: "It was a dark and stormy night, and" }).click();
    await ended();
    assert.equal(server.seen[0].path, "/v1/completions");
    assert.equal(server.seen[0].body.prompt, "It was a dark and stormy night, and");
    assert.match(await answers(page).textContent(), /the door stood open/);
    await page.click("#settings-button");
    await page.selectOption("#set-thinking", "true");
    await page.selectOption("#model", "still-model");
    assert.equal(await page.locator("#set-thinking").isDisabled(), true);
    await page.click("#fresh");
    await say("hello");
    await ended();
    assert.deepEqual([server.seen[1].path, server.seen[1].body.chat_template_kwargs], ["/v1/chat/completions", undefined]);
    await page.selectOption("#set-format", "plain");
    await say(" more");
    await ended();
    assert.match(server.seen[2].body.prompt, /^hello[^]* more$/);
    await close();
  });

  test("a server that is gone is told, and found again", async () => {
    const { page, server, say, ended, close } = await opened();
    await page.waitForSelector(".starts");
    const port = Number(new URL(server.url).port);
    server.close();
    await say("hello");
    await ended();
    assert.match(await page.locator(".note").textContent(), /does not answer/);
    const again = await serve({ port });
    await page.getByRole("button", { name: "Try again" }).click();
    await ended();
    assert.equal(await page.locator(".note").count(), 0);
    again.close();
    await close();
  });

  test("a key is asked for once, kept for the tab, and asked again when wrong", async () => {
    const { page, say, ended, close } = await opened({ key: "secret-key" });
    await page.waitForSelector("#key-dialog[open]");
    await page.fill("#key", "wrong");
    await page.press("#key", "Enter");
    await page.waitForFunction(() => document.getElementById("key-text").textContent.includes("not one of"));
    await page.fill("#key", "secret-key");
    await page.press("#key", "Enter");
    await page.waitForSelector(".starts");
    await page.reload();
    await page.waitForSelector(".starts");
    await say("hello");
    await ended();
    assert.equal(await page.locator(".note").count(), 0);
    assert.equal(await page.evaluate(() => Object.values(localStorage).join().includes("secret-key")), false);
    assert.equal(await page.evaluate(() => location.href.includes("secret-key")), false);
    await page.click("#settings-button");
    await page.getByRole("button", { name: "Forget the API key" }).click();
    await say("more");
    await page.waitForSelector("#key-dialog[open]");
    await page.keyboard.press("Escape");
    await ended();
    assert.match(await page.locator(".note").textContent(), /401/);
    await close();
  });

  test("the conversation is exported as JSON", async () => {
    const { page, say, ended, close } = await opened();
    await say("THINK, then CALL");
    await ended();
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#export")]);
    assert.match(download.suggestedFilename(), /^chat-\d{4}-\d\d-\d\d-\d\d-\d\d\.json$/);
    const saved = JSON.parse(readFileSync(await download.path(), "utf8"));
    assert.equal(saved.model, "books-bf16");
    assert.deepEqual(saved.messages.map((m) => m.role), ["user", "assistant"]);
    assert.equal(saved.messages[1].tool_calls[0].function.name, "get_weather");
    assert.match(saved.messages[1].reasoning_content, /Scattering/);
    assert.ok(saved.messages[1].statistics.tokens > 0);
    await close();
  });
});

describe("compare", () => {
  test("two answers, and where the distributions part", async () => {
    const { page, server, shot, close } = await opened({}, { path: "#compare" });
    await page.fill("#prompt", "It was a dark night");
    await page.press("#prompt", "Enter");
    await page.waitForSelector(".chips");
    const [one, two] = server.seen.map(({ body }) => body);
    assert.deepEqual([one.model, two.model].sort(), ["books-bf16", "books-nvfp4"]);
    assert.ok(one.return_token_ids && two.return_token_ids && one.temperature === 0 && one.max_tokens === 128);
    const scored = server.seen.filter(({ body }) => body.prompt_logprobs);
    assert.deepEqual(scored.map(({ body }) => body.model).sort(), ["books-bf16", "books-nvfp4"]);
    assert.deepEqual(scored[0].body.prompt, scored[1].body.prompt);
    assert.equal(scored[0].body.max_tokens, 0);
    const verdict = await page.locator(".verdict").textContent();
    const [, place] = /first part at token (\d+) of books-bf16’s answer: books-bf16 expects “.+” \([\d.]+ %\), books-nvfp4 “/.exec(verdict);
    assert.match(verdict, /same token comes first at \d+ of 109\. Mean KL over the 10 most probable tokens: at least 0\.\d{4} nats/);
    const chips = page.locator(".chips .chip");
    assert.equal(await chips.count(), 109);
    assert.equal(await page.locator(".chips .first").count(), 1);
    assert.equal(await chips.evaluateAll((all) => all.findIndex((chip) => chip.classList.contains("other"))), Number(place) - 1);
    await chips.nth(4).click();
    assert.match(await page.locator(".tops h3").textContent(), /^Token 5: /);
    await page.keyboard.press("ArrowRight");
    assert.match(await page.locator(".tops h3").textContent(), /^Token 6: /);
    assert.equal(await page.locator(".chips [tabindex='0']").count(), 1, "one stop of the tab key");
    const shares = await page.locator(".tops td.p").allTextContents();
    assert.ok(shares.length >= 20 && shares.every((text) => /%$/.test(text)));
    await shot("compare");
    await page.selectOption("#along", { index: 1 });
    await page.waitForFunction(() => /of books-nvfp4’s answer/.test(document.querySelector(".verdict")?.textContent));
    await accessible(page, "compare");
    await close();
  });

  test("KL and shares are those of the numbers that the server gave", async () => {
    // Two places that can be computed by hand: p = (.5, .25 | .25), q = (.25, .5 | .25): KL = .25 ln 2; then the same twice.
    const log = Math.log;
    const entry = (p, rank, text) => ({ logprob: log(p), rank, decoded_token: text });
    const place = (p, q) => ({ 5: entry(p, p >= q ? 1 : 2, "x"), 6: entry(q, p >= q ? 2 : 1, "y") });
    const { page, close } = await opened({}, { path: "#compare", first: (page) => page.route("**/v1/**completions", async (route) => {
      const body = route.request().postDataJSON();
      if (body.prompt_logprobs === undefined) {
        const chunk = { choices: [{ index: 0, delta: { content: "xx" }, token_ids: [5, 5], finish_reason: "stop" }], prompt_token_ids: [1] };
        return route.fulfill({ contentType: "text/event-stream", body: `data: ${JSON.stringify(chunk)}\n\ndata: [DONE]\n\n` });
      }
      const first = body.model === "books-bf16" ? place(0.5, 0.25) : place(0.25, 0.5);
      return route.fulfill({ json: { choices: [{ prompt_logprobs: [null, first, place(0.5, 0.25)] }] } });
    }) });
    await page.fill("#prompt", "p");
    await page.press("#prompt", "Enter");
    await page.waitForSelector(".chips");
    const titles = await page.locator(".chips .chip").evaluateAll((all) => all.map((chip) => chip.title));
    assert.deepEqual(titles, [`KL ≥ ${(0.25 * log(2)).toFixed(4)}`, "KL ≥ 0.0000"]);
    assert.match(await page.locator(".verdict").textContent(), new RegExp(`token 1 of[^]*same token comes first at 1 of 2[^]*${(0.125 * log(2)).toFixed(4)} nats`));
    assert.deepEqual(await page.locator(".tops td.p").allTextContents(), ["50 %", "25 %", "25 %", "50 %"]);
    await close();
  });

  test("one model: how to load two", async () => {
    const { page, close } = await opened({ models: ["only"] }, { path: "#compare" });
    await page.waitForSelector("#compare pre");
    assert.match(await page.locator("#compare").textContent(), /has not two models[^]*recoup serve \S+ \S+/);
    await close();
  });

  test("Escape stops both, and another comparison can begin", async () => {
    const { page, server, close } = await opened({}, { path: "#compare" });
    await page.fill("#prompt", "SLOW");
    await page.press("#prompt", "Enter");
    await page.waitForFunction(() => [...document.querySelectorAll(".side .md")].filter((md) => /word 2/.test(md.textContent)).length === 2);
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: "Compare", exact: true }).waitFor();
    assert.equal(await page.locator(".side .stat", { hasText: "stopped" }).count(), 2);
    assert.equal(server.seen.filter(({ body }) => body.prompt_logprobs).length, 0, "nothing is scored of what was stopped");
    await page.fill("#prompt", "again");
    await page.press("#prompt", "Enter");
    await page.waitForSelector(".chips");
    await close();
  });

  test("an error of one side is told beside the other's answer", async () => {
    const { page, close } = await opened({}, { path: "#compare", first: (page) => page.route("**/v1/chat/completions", (route) =>
      route.request().postDataJSON().model === "books-nvfp4" ? route.fulfill({ status: 500, json: { error: { message: "No pages are left." } } }) : route.continue()) });
    await page.fill("#prompt", "x");
    await page.press("#prompt", "Enter");
    await page.waitForSelector(".side.b .note");
    await page.waitForFunction(() => document.querySelector(".side.a .md").textContent.includes("yellow"));
    assert.match(await page.locator(".side.b .note").textContent(), /500: No pages are left\./);
    await close();
  });
});

describe("reports", () => {
  const reports = {
    "run report.html": `<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>R</title><style>p{color:rgb(1, 2, 3)}</style></head><body><p>KL is .06</p><script>parent.pwned=1;document.body.textContent="script ran"</script><img src="https://example.org/x.png"></body></html>`,
    "results.json": '{"acc": 0.5}',
  };
  test("a report is shown where it can reach nothing", async () => {
    const { page, close } = await opened({ reports }, { path: "#reports" });
    await page.getByRole("button", { name: /run report\.html/ }).click();
    const frame = page.frameLocator("iframe");
    assert.equal(await frame.locator("p").textContent(), "KL is .06");
    assert.equal(await frame.locator("p").evaluate((p) => getComputedStyle(p).color), "rgb(1, 2, 3)");
    assert.equal(await page.locator("iframe").getAttribute("sandbox"), "");
    assert.equal(await page.evaluate(() => window.pwned), undefined);
    await page.getByRole("button", { name: "All reports" }).click();
    await page.getByRole("button", { name: /results\.json/ }).click();
    assert.equal(await page.locator("#reports pre").textContent(), '{\n  "acc": 0.5\n}');
    await close().catch((error) => assert.match(error.message, /Content Security Policy|script/i, "only the report's own script and picture may be refused"));
  });

  test("without a folder, how to give one", async () => {
    const { page, close } = await opened({}, { path: "#reports" });
    await page.waitForSelector("#reports pre");
    assert.match(await page.locator("#reports").textContent(), /recoup serve MODEL --reports FOLDER/);
    await close();
  });
});

describe("look", () => {
  test("tabs by arrow keys, one tab stop, each with its address", async () => {
    const { page, close } = await opened();
    await page.focus("#tab-chat");
    await page.keyboard.press("ArrowRight");
    assert.equal(await page.evaluate(() => document.activeElement.id), "tab-compare");
    assert.equal(await page.locator("#compare").isVisible(), true);
    assert.match(page.url(), /#compare$/);
    await page.keyboard.press("ArrowLeft");
    await page.keyboard.press("ArrowLeft");
    assert.equal(await page.evaluate(() => document.activeElement.id), "tab-reports");
    assert.equal(await page.locator("[role=tab][tabindex='0']").count(), 1);
    const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
    assert.equal(outline, "solid", "focus can be seen");
    await close();
  });

  for (const scheme of ["light", "dark"]) {
    for (const [width, height] of [[1280, 860], [360, 740]]) {
      test(`${scheme}, ${width} pixels: accessible, and nothing sideways`, async () => {
        const { page, say, ended, shot, close } = await opened({ reports: { "a-rather-long-name-of-a-report-of-some-folder.html": "<p>x", "results.json": "{}" } }, { width, height, scheme });
        await page.waitForSelector(".starts");
        await accessible(page, "start");
        await shot("start");
        await say("LONG THINK, and then a word that no line can hold: " + "x".repeat(300));
        await ended();
        await say("CALL");
        await ended();
        const below = await page.evaluate(() => innerHeight - document.getElementById("composer").getBoundingClientRect().bottom);
        assert.ok(Math.abs(below) < 1, `the composer is ${below} pixels from the bottom`);
        await page.click("#settings-button");
        await noSideways(page, "chat");

        await accessible(page, "chat");
        await shot("chat");
        await page.click("#tab-compare");
        await page.fill("#prompt", "LONG");
        await page.press("#prompt", "Enter");
        await page.waitForSelector(".chips");
        await noSideways(page, "compare");
        await accessible(page, "compare");
        await page.locator(".verdict").scrollIntoViewIfNeeded();
        await shot("parts");
        await page.click("#tab-reports");
        await page.waitForSelector(".reports");
        await noSideways(page, "reports");
        await accessible(page, "reports");
        await shot("reports");
        const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
        const was = await background();
        await page.click("#theme");
        assert.notEqual(await background(), was, "the switch changes the colours");
        await page.reload();
        assert.notEqual(await background(), was, "and they stay");
        await close();
      });
    }
  }

  test("who wants no motion gets none", async () => {
    const { page, close } = await opened();
    await page.emulateMedia({ reducedMotion: "reduce" });
    await page.fill("#message", "SLOW");
    await page.press("#message", "Enter");
    await page.waitForSelector(".streaming, .waiting");
    const running = await page.evaluate(() => document.getAnimations().length);
    assert.equal(running, 0);
    await page.keyboard.press("Escape");
    await close();
  });

  test("the page is one file within its size, with one script and one style", () => {
    const html = readFileSync(new URL("../../src/serve/page.html", import.meta.url), "utf8");
    assert.ok(Buffer.byteLength(html) <= 60 * 1024, `${Buffer.byteLength(html)} bytes`);
    assert.equal(html.match(/<script/g).length, 1);
    assert.equal(html.match(/<style/g).length, 1);
    assert.doesNotMatch(html, /innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function/);
    assert.doesNotMatch(html, /\son[a-z]+="/, "no handler in markup");
  });
});

describe("a real server", { skip: !process.env.RECOUP_URL && "RECOUP_URL is not set" }, () => {
  test("chat, and compare where there are two models", async () => {
    const page = await browser.newPage();
    const faults = [];
    page.on("pageerror", (error) => faults.push(error.message));
    await page.goto(process.env.RECOUP_URL);
    await page.waitForSelector(".starts");
    await page.click("#settings-button");
    await page.selectOption("#set-format", "plain");
    await page.fill("#set-max_tokens", "24");
    await page.fill("#message", "It was a dark and stormy night, and");
    await page.press("#message", "Enter");
    await page.waitForSelector(".message.assistant .numbers");
    await page.waitForFunction(() => document.getElementById("send").textContent === "Send");
    assert.equal(await page.locator(".note").count(), 0, await page.locator(".note").allTextContents().then(String));
    assert.match(await page.locator(".numbers").textContent(), /^\d+ tokens/);
    if (await page.locator("#model option").count() > 1) {
      await page.click("#tab-compare");
      await page.fill("#prompt", "It was a dark and stormy night, and");
      await page.fill("#compare-tokens", "48");
      await page.press("#prompt", "Enter");
      await page.waitForSelector(".chips, .note", { timeout: 60000 });
      assert.equal(await page.locator(".note").count(), 0, await page.locator(".note").allTextContents().then(String));
      if (SHOTS) await page.screenshot({ path: `${SHOTS}/real-compare.png`, fullPage: true });
    }
    assert.deepEqual(faults, []);
    await page.close();
  });
});
