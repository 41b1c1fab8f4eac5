// Label: one large looping video, or twelve small ones. The page moves on only when the app has confirmed that the
// verdict is on disk.

import { $, ask, element, loop, notice } from "./common.js";

const AHEAD = 4;
const GRID = 12;
const KEYS = { s: "success", f: "failure", u: "unsure" };
const WORDS = { success: "Success", failure: "Failure", unsure: "Unsure" };
const CYCLE = { "": "success", success: "failure", failure: "unsure", unsure: "" };

let queue = null; // { id, name }
let annotator = "";
let grid = false;
let items = []; // what this person holds, the current one first
let progress = null;
let busy = false; // one request at a time, so that the order of verdicts is the order of keys
let idle = Promise.resolve(); // done when the request under way is
let times = []; // when verdicts were confirmed
let marks = []; // of the grid
let here = 0; // the grid's current tile
const videos = new Map(); // item -> promise of an object URL

// ---------------------------------------------------------------- who and what

async function welcome() {
  const queues = (await ask("/api/queues")).filter((one) => !one.error);
  $("nothing").hidden = queues.length > 0;
  $("welcome").hidden = queues.length === 0;
  $("work").hidden = true;
  $("queue").replaceChildren(...queues.map((one) => element("option", { value: one.id }, `${one.name} (${one.items})`)));
  $("name").value = localStorage.getItem("annotator") ?? "";
  const last = localStorage.getItem("queue");
  const known = queues.find((one) => one.id === last);
  if (known) $("queue").value = last;
  return known;
}

async function enter() {
  annotator = $("name").value.trim();
  queue = { id: $("queue").value, name: $("queue").selectedOptions[0].textContent.replace(/ \(\d+\)$/, "") };
  localStorage.setItem("annotator", annotator);
  localStorage.setItem("queue", queue.id);
  $("title").textContent = queue.name;
  $("who").textContent = annotator;
  items = [];
  times = [];
  await refill();
  $("welcome").hidden = true;
  $("work").hidden = false;
  draw();
}

const post = (what, body) => ask(`/api/queues/${queue.id}/${what}`, { annotator, ...body });

async function refill() {
  const count = grid ? GRID : AHEAD;
  const answer = await post("next", { count });
  const held = new Set(items.map((one) => one.item));
  items.push(...answer.items.filter((one) => !held.has(one.item)));
  progress = answer.progress;
  items.slice(0, count).forEach((one) => load(one.item));
}

/** The video as an object URL, fetched once, ahead of its turn. */
function load(item) {
  if (!videos.has(item)) {
    const fetched = fetch(`/api/queues/${queue.id}/videos/${item}`).then(async (response) => {
      if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? "The video cannot be loaded.");
      return URL.createObjectURL(await response.blob());
    });
    fetched.catch(() => videos.delete(item));
    videos.set(item, fetched);
  }
  return videos.get(item);
}

function forget(item) {
  videos.get(item)?.then(URL.revokeObjectURL, () => {});
  videos.delete(item);
}

// ---------------------------------------------------------------- what is shown

function draw() {
  const empty = items.length === 0;
  $("single").hidden = grid || empty;
  $("grid").hidden = !grid || empty;
  $("done").hidden = !empty;
  $("one").setAttribute("aria-pressed", String(!grid));
  $("many").setAttribute("aria-pressed", String(grid));
  $("hintone").hidden = grid || empty;
  $("hintmany").hidden = !grid || empty;
  if (empty) finish();
  else if (grid) drawGrid();
  else drawOne();
  drawProgress();
}

function finish() {
  $("video").removeAttribute("src");
  const others = progress.items - progress.complete;
  $("donetext").textContent = `You judged ${progress.mine} of ${progress.items} videos.` + (others ? ` ${others} wait for others.` : " Nothing is left for anyone.");
}

async function drawOne() {
  const current = items[0].item;
  if ($("video").dataset.item === current) return;
  $("video").dataset.item = current;
  $("video").autoplay = true; // until it is stopped, which may be before it is there
  try {
    const address = await load(current);
    if (items[0]?.item !== current) return;
    $("video").src = address;
    if ($("video").autoplay) run(true);
  } catch (error) {
    notice(error.message);
  }
}

function drawGrid() {
  const shown = items.slice(0, GRID);
  marks = shown.map(() => "");
  here = 0;
  $("tiles").replaceChildren(...shown.map((one, index) => {
    const video = loop(element("video", { autoplay: true, playsinline: true }));
    load(one.item).then((address) => (video.src = address), (error) => notice(error.message));
    const tile = element("button", { class: "tile", "aria-label": `Video ${index + 1}`, onclick: () => mark(index, CYCLE[marks[index]]) }, video);
    return tile;
  }));
  drawMarks();
}

function drawMarks() {
  [...$("tiles").children].forEach((tile, index) => {
    tile.dataset.mark = marks[index];
    tile.classList.toggle("here", index === here);
    tile.querySelector("span")?.remove();
    if (marks[index]) tile.append(element("span", { class: { success: "yes", failure: "no", unsure: "unsure" }[marks[index]] }, WORDS[marks[index]]));
  });
  $("save").disabled = !marks.some(Boolean);
  $("rest").disabled = marks.every(Boolean);
}

function mark(index, verdict) {
  marks[index] = verdict;
  here = index;
  drawMarks();
}

function drawProgress() {
  if (!progress) return;
  const total = progress.mine + progress.left;
  $("bar").style.width = `${total ? (100 * progress.mine) / total : 100}%`;
  $("count").textContent = `${progress.mine} judged, ${progress.left} left`;
  const recent = times.slice(-20);
  if (recent.length < 3) {
    $("pace").textContent = "";
    return;
  }
  const perMinute = (60000 * (recent.length - 1)) / Math.max(1, recent.at(-1) - recent[0]);
  const minutes = progress.left / perMinute;
  $("pace").textContent = `${perMinute.toFixed(0)} a minute` + (progress.left ? `, about ${minutes < 1 ? "a minute" : `${Math.ceil(minutes)} minutes`} left` : "");
}

// ---------------------------------------------------------------- what is done

/** One request at a time; a failure is said and changes nothing on the page. */
function exclusively(action) {
  if (busy) return idle;
  busy = true;
  const run = async () => {
    try {
      await action();
      notice();
    } catch (error) {
      $("saved").textContent = "";
      notice(error.message);
    } finally {
      busy = false;
    }
  };
  idle = run();
  return idle;
}

async function save(verdicts) {
  $("saved").textContent = "saving …";
  const answer = await post("verdicts", { verdicts });
  progress = answer.progress;
  const now = performance.now();
  times.push(...verdicts.map(() => now));
  const judged = new Set(verdicts.map((one) => one.item));
  items = items.filter((one) => !judged.has(one.item));
  judged.forEach(forget);
  $("saved").textContent = `✓ ${verdicts.length === 1 ? WORDS[verdicts[0].verdict] : `${verdicts.length} verdicts`} saved`;
  if (items.length < (grid ? 1 : 3) && progress.left > items.length) await refill();
  draw();
}

const judge = (verdict) => exclusively(async () => {
  if (!items.length) return;
  flash(verdict);
  await save([{ item: items[0].item, verdict }]);
});

const saveGrid = () => exclusively(async () => {
  const verdicts = items.slice(0, GRID).map((one, index) => ({ item: one.item, verdict: marks[index] })).filter((one) => one.verdict);
  if (!verdicts.length) return;
  await save(verdicts);
  if (items.length && items.length < GRID) {
    await refill();
    draw();
  }
});

/** Waits for what is being saved: a verdict can be taken back the moment that it was given. */
const undo = () => idle.then(() => exclusively(takeBack));

async function takeBack() {
  const answer = await post("undo", {});
  progress = answer.progress;
  const back = new Set(answer.items.map((one) => one.item));
  items = [...answer.items, ...items.filter((one) => !back.has(one.item))];
  times.splice(-answer.items.length || times.length, answer.items.length);
  $("saved").textContent = answer.items.length ? `↶ ${answer.items.length === 1 ? "one verdict" : `${answer.items.length} verdicts`} taken back` : "nothing to take back";
  draw();
}

function flash(verdict) {
  const button = document.querySelector(`#single [data-verdict="${verdict}"]`);
  button.classList.add("lit");
  setTimeout(() => button.classList.remove("lit"), 160);
}

function markOrJudge(verdict) {
  if (!grid) return judge(verdict);
  mark(here, verdict);
  here = Math.min(here + 1, marks.length - 1);
  drawMarks();
}

/** Let the video play, or stop it: also one that is still on its way. */
function run(plays) {
  $("video").autoplay = plays;
  if (plays) $("video").play().catch(() => {}); // a browser that forbids playing shows the first frame
  else $("video").pause();
}

function step(direction) {
  const video = $("video");
  const { fps, frames } = items[0];
  run(false);
  const frame = Math.min(frames - 1, Math.max(0, Math.floor(video.currentTime * fps + 1e-3) + direction));
  video.currentTime = (frame + 0.5) / fps;
}

function press(event) {
  if ($("work").hidden || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
  const key = event.key.toLowerCase();
  const columns = getComputedStyle($("tiles")).gridTemplateColumns.split(" ").length;
  const moves = grid ? { arrowleft: -1, arrowright: 1, arrowup: -columns, arrowdown: columns } : { arrowleft: -1, arrowright: 1 };
  if (KEYS[key] && !event.repeat) markOrJudge(KEYS[key]);
  else if (key === "z" && !event.repeat) undo();
  else if (key === "enter" && grid && !event.repeat) saveGrid();
  else if (key === " " && !grid && items.length) run($("video").paused);
  else if (moves[key] && items.length) {
    if (grid) {
      here = Math.min(marks.length - 1, Math.max(0, here + moves[key]));
      drawMarks();
    } else step(moves[key]);
  } else return;
  event.preventDefault();
}

function showFrame() {
  if (items.length && !grid) {
    const { fps, frames } = items[0];
    const frame = Math.min(frames - 1, Math.floor($("video").currentTime * fps + 1e-3));
    $("frame").textContent = `${frame + 1} / ${frames}`;
  }
  requestAnimationFrame(showFrame);
}

const show = (asGrid) => exclusively(async () => {
  grid = asGrid;
  $("video").dataset.item = "";
  await refill();
  draw();
});

$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  exclusively(enter);
});
$("leave").addEventListener("click", () => exclusively(async () => void (await welcome())));
for (const [id, asGrid] of [["one", false], ["many", true]]) {
  $(id).addEventListener("click", () => {
    $(id).blur(); // a focused button would take space and Enter for itself
    show(asGrid);
  });
}
$("save").addEventListener("click", saveGrid);
$("rest").addEventListener("click", () => {
  marks = marks.map((verdict) => verdict || "failure");
  drawMarks();
});
document.querySelectorAll("[data-verdict]").forEach((button) => button.addEventListener("click", () => markOrJudge(button.dataset.verdict)));
document.querySelectorAll("[data-undo]").forEach((button) => button.addEventListener("click", undo));
document.addEventListener("keydown", press);
loop($("video"));

try {
  const known = await welcome();
  if (known && $("name").value) await enter();
} catch (error) {
  notice(error.message);
}
showFrame();
