// What every page shares: speaking to the app, and making elements.

export const $ = (id) => document.getElementById(id);

/** GET, or POST with a JSON body; throws an Error that carries the app's own words. */
export async function ask(address, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return answer(await reach(address, options));
}

/** POST raw bytes, such as a file. */
export async function send(address, content) {
  return answer(await reach(address, { method: "POST", body: content }));
}

async function reach(address, options) {
  try {
    return await fetch(address, options);
  } catch {
    throw new Error("The app does not answer. Is hma-gym serve still running?");
  }
}

async function answer(response) {
  const value = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(value.error ?? `The app answered ${response.status}.`);
  return value;
}

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

const HOLD_MS = 700;

/** Play over and over, and rest on the last frame each time: that is the one to judge. */
export function loop(video) {
  video.muted = true;
  video.addEventListener("ended", () => setTimeout(() => video.ended && video.play().catch(() => {}), HOLD_MS));
  return video;
}

/** Show what went wrong; without text, take it away. */
export function notice(text = "") {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

export function table(header, rows) {
  const cell = (tag) => (value) => element(tag, { class: typeof value === "number" || /^[\d.%–-]+$/.test(value) ? "number" : null }, value instanceof Node ? value : String(value));
  const numeric = header.map((_, i) => rows.length > 0 && rows.every((row) => typeof row[i] === "number" || /^[\d.%–-]+$/.test(row[i])));
  const head = header.map((text, i) => element("th", { class: numeric[i] ? "number" : null }, text));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell("td"))))));
}
