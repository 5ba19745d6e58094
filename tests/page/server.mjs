// A server for the page's test: it answers as `recoup serve` does, and misbehaves on demand (the message says how).
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import http from "node:http";

const PAGE = new URL("../../src/serve/page.html", import.meta.url);

/** The policy that the page is sent with; its script is allowed by its hash, as the server does it. */
export function policy(html) {
  const script = html.match(/<script>([^]*?)<\/script>/)[1];
  const hash = createHash("sha256").update(script).digest("base64");
  return `default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-${hash}'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'`;
}

const MARKDOWN = `Sunlight is *scattered* by the air, and **blue** most of all: the strength goes with the fourth power of the frequency.

| colour | nm | scattered |
|---|---:|---:|
| blue | 450 | 4.3 |
| green | 550 | 1.9 |
| red | 650 | 1 |

1. Light enters the air.
2. Short waves leave the ray:
   - blue to all sides,
   - red hardly.

\`\`\`python
def scattered(nm, reference=650):
    """Rayleigh: the inverse fourth power of the wavelength, which makes a long line that has to scroll by itself."""
    return (reference / nm) ** 4
\`\`\`

> So the sky is blue, and [the sun](https://example.org/sun) yellow.`;

export const HOSTILE = `<img src=x onerror="window.pwned=1"> </script><script>window.pwned=2</script>
[click](javascript:window.pwned=3) [data](data:text/html,<script>window.pwned=4</script>) ![i](https://example.org/i.png)
\`<svg onload=window.pwned=5>\`

| <b>a</b> | [x](javascript:1) |
|---|---|
| <iframe srcdoc="<script>parent.pwned=6</script>"></iframe> | y |

\`\`\`"><img src=x onerror=window.pwned=7>
<style>body{display:none}</style>
\`\`\`
# <a href="javascript:window.pwned=8">h</a>`;

const WORDS = "the a of and to in is was it he for on are as with his they at be this from I have or by one had not but what all were when we there can an your which their said if do will each about how up out them then she many some so these would other into has more her two like him see time could no make than first been its who now people my made over did down only way find use may water long little very after words called just where most know".split(" ");
const idOf = (word) => 10 + (createHash("md5").update(word).digest().readUInt16LE() % 4000);
const vocabulary = new Map();
const tokenize = (text) => (text.match(/\s*\S+|\s+/g) ?? []).map((word) => { const id = idOf(word); vocabulary.set(id, word); return id; });

/** Numbers that look like a model's, the same for the same place of the same model. */
function distribution(model, ids, at, top) {
  const noise = (seed) => createHash("md5").update(`${seed}`).digest().readUInt32LE() / 2 ** 32;
  const shift = model.includes("nvfp4") ? 1 : 0;
  const context = ids.slice(0, at).join();
  const scores = [ids[at], ...WORDS.map((word) => idOf(` ${word}`))].map((id, i) => {
    vocabulary.set(id, vocabulary.get(id) ?? ` ${WORDS[i - 1]}`);
    const base = (i === 0 ? 4 : 0) + 3 * noise(`${context}/${id}`);
    return [id, base + shift * (noise(`${context}/${id}/q`) - 0.5) * (noise(`${context}/hard`) > 0.8 ? 5 : 0.6)];
  });
  const unique = [...new Map(scores.reverse())];
  const sum = Math.log(unique.reduce((total, [, score]) => total + Math.exp(score), 0));
  const sorted = unique.map(([id, score]) => [id, score - sum]).sort((a, b) => b[1] - a[1]);
  const kept = sorted.map(([id, logprob], i) => [id, { logprob, rank: i + 1, decoded_token: vocabulary.get(id) }])
    .filter(([id], i) => i < top || id === ids[at]);
  return Object.fromEntries(kept.map(([id, entry]) => [String(id), entry]));
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Starts it on a free port. Options: key, models, reports (a map of name to text, or null), pace (ms a token). */
export async function serve({ key = null, models = ["books-bf16", "books-nvfp4"], reports = null, pace = 3, port = 0 } = {}) {
  const seen = [];
  const say = (response, status, body, headers = {}) => {
    response.writeHead(status, { "content-type": "application/json", ...headers });
    response.end(typeof body === "string" ? body : JSON.stringify(body));
  };
  const error = (response, status, message, more = {}, headers = {}) =>
    say(response, status, { error: { message, type: "invalid_request_error", param: null, code: null, ...more } }, headers);

  async function answer(request, response, body, chat) {
    const last = chat ? body.messages.at(-1).content : body.prompt;
    const named = (word) => typeof last === "string" && last.includes(word);
    if (!models.includes(body.model)) return error(response, 404, `The model ${body.model} is not here.`, { code: "model_not_found", param: "model" });
    if (body.temperature > 2) return error(response, 400, "temperature is 5, and may be 0 to 2", { param: "temperature" });
    if (named("FULL")) return error(response, 429, "The queue is full: 128 wait.", { type: "overloaded" }, { "retry-after": "2" });
    if (named("BROKEN")) return say(response, 502, "<html><h1>Bad gateway</h1></html>", { "content-type": "text/html" });
    if (body.prompt_logprobs !== undefined) {
      const ids = body.prompt;
      const list = ids.map((_, at) => (at === 0 ? null : distribution(body.model, ids, at, body.prompt_logprobs)));
      return say(response, 200, { choices: [{ index: 0, text: "", finish_reason: "length", prompt_logprobs: list }], usage: { prompt_tokens: ids.length, completion_tokens: 0 } });
    }
    const prompt = tokenize(chat ? body.messages.map((m) => m.content).join("\n") : String(body.prompt));
    response.writeHead(200, { "content-type": "text/event-stream" });
    const id = `${chat ? "chatcmpl" : "cmpl"}-1`;
    const send = (value) => response.write(`data: ${JSON.stringify(value)}\n\n`);
    let first = true;
    const chunk = (delta, more = {}) => {
      const choice = chat ? { index: 0, delta, finish_reason: null } : { index: 0, text: delta.content ?? "", finish_reason: null };
      const top = first && body.return_token_ids ? (chat ? { prompt_token_ids: prompt } : {}) : {};
      if (first && body.return_token_ids && !chat) choice.prompt_token_ids = prompt;
      first = false;
      send({ id, model: body.model, object: "chat.completion.chunk", ...top, choices: [{ ...choice, ...more }] });
    };
    let count = 0;
    const text = async (value, kind = "content") => {
      for (const word of value.match(/\s*\S+|\s+/g) ?? []) {
        if (response.destroyed) return;
        count += 1;
        chunk({ [kind]: word }, body.return_token_ids ? { token_ids: tokenize(word) } : {});
        await sleep(pace * (body.model.includes("nvfp4") ? 0.6 : 1));
      }
    };
    if (chat) chunk({ role: "assistant", content: "" });
    let finish = "stop";
    if (named("THINK") && body.chat_template_kwargs?.enable_thinking !== false) await text("The user wants to know why. Scattering is the word; I should say it plainly.", "reasoning_content");
    if (named("HOSTILE")) await text(HOSTILE);
    else if (named("GONE")) { await text("This goes well until"); await sleep(30); return response.destroy(); }
    else if (named("MIDWAY")) { await text("It begins"); send({ error: { message: "The grammar allows no token here.", type: "server_error", code: 500 } }); return response.end(); }
    else if (named("SLOW")) { for (let i = 0; i < 400 && !response.destroyed; i += 1) { await text(`word ${i} `); await sleep(10); } }
    else if (named("CALL")) {
      await text("I will look.");
      chunk({ tool_calls: [{ index: 0, id: "call_1", type: "function", function: { name: "get_weather", arguments: "" } }] });
      for (const part of ['{"city": "Ro', 'me", "unit":', ' "C"}']) chunk({ tool_calls: [{ index: 0, function: { arguments: part } }] });
      finish = "tool_calls";
    } else if (chat && body.messages.at(-1).role === "tool") await text(`It is ${last} there.`);
    else if (named("LONG")) await text("wordwithoutanyspace".repeat(40) + "\n\n" + MARKDOWN.repeat(3));
    else if (!chat) await text(" the door stood open and the lamp was lit, so that the old man went in and sat down by the fire");
    else await text(MARKDOWN);
    if (body.max_tokens === 7) finish = "length";
    chunk({}, { finish_reason: finish });
    if (body.stream_options?.include_usage) send({ id, choices: [], usage: { prompt_tokens: prompt.length, completion_tokens: count, total_tokens: prompt.length + count } });
    response.end("data: [DONE]\n\n");
  }

  const server = http.createServer(async (request, response) => {
    const path = new URL(request.url, "http://x").pathname;
    if (path === "/") {
      const html = readFileSync(PAGE, "utf8");
      response.writeHead(200, { "content-type": "text/html; charset=utf-8", "content-security-policy": policy(html), "x-content-type-options": "nosniff" });
      return response.end(html);
    }
    if (key && request.headers.authorization !== `Bearer ${key}`) return error(response, 401, "This server asks for a key.", { code: "invalid_api_key" });
    if (path === "/v1/models") return say(response, 200, { object: "list", data: models.map((id) => ({ id, object: "model", owned_by: "recoup", max_model_len: 256, formats: /nvfp4/.test(id) ? "NVFP4" : "BF16", has_chat_template: !id.startsWith("base"), thinking_switch: !id.startsWith("still") })) });
    if (path === "/reports" && reports) return say(response, 200, { reports: Object.entries(reports).map(([name, text], i) => ({ name, bytes: text.length, modified: `2026-11-2${9 - i}T10:00:00Z` })) });
    if (path.startsWith("/reports/") && reports) {
      const name = decodeURIComponent(path.slice(9));
      if (name in reports) return say(response, 200, reports[name], { "content-type": name.endsWith("html") ? "text/html" : "application/json" });
    }
    if (request.method === "POST" && /^\/v1\/(chat\/)?completions$/.test(path)) {
      let text = "";
      for await (const part of request) text += part;
      const body = JSON.parse(text);
      seen.push({ path, body });
      return answer(request, response, body, path.includes("chat"));
    }
    return error(response, 404, `There is nothing at ${path}.`);
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${server.address().port}/`, seen, close: () => { server.closeAllConnections(); server.close(); } };
}
