// Play: keys, thumbs and gamepads become actions; frames come back as they are generated.
//
// Directions are as the camera sees them: it stands before the robot, so +x comes near and +y goes right.

import { $, ask, element, notice, send } from "./common.js";

const IDLE_MS = 5000; // without an action the world stands still after this long
const FULL = 0.8;
const GENTLE = 0.25;
const TURN = 0.4;
const HOLDS = {
  near: [0, 1], away: [0, -1], right: [1, 1], left: [1, -1], up: [2, 1], down: [2, -1], turnleft: [5, 1], turnright: [5, -1],
};
const KEYS = {
  w: "away", s: "near", a: "left", d: "right", r: "up", f: "down", q: "turnleft", e: "turnright",
  arrowup: "away", arrowdown: "near", arrowleft: "left", arrowright: "right", pageup: "up", pagedown: "down",
};

let info = null;
let socket = null;
let chosen = { start: 0, image: null };
let started = false;
let held = new Map(); // direction -> what holds it (keys, buttons)
let gripper = -1;
let gentle = false;
let input = 0; // number of the last action that was sent
let lastAction = "";
let lastMove = 0;
let driving = false;
const waiting = new Map(); // input -> when its key went down
const latencies = [];
const arrivals = [];
window.hmaPlay = { latencies, arrivals, header: null }; // for measuring from outside

// ---------------------------------------------------------------- the wire

function connect() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  socket = new WebSocket(`${scheme}://${location.host}/api/play/drive`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => begin();
  socket.onmessage = (event) => (typeof event.data === "string" ? hear(JSON.parse(event.data)) : show(event.data));
  socket.onclose = () => {
    started = driving = false;
    say("The connection ended. Restart to begin anew.");
  };
}

const tell = (message) => socket.readyState === WebSocket.OPEN && socket.send(JSON.stringify(message));

function begin() {
  if (socket.readyState !== WebSocket.OPEN) return connect();
  notice();
  started = driving = false;
  gripper = -1;
  drawGrip();
  lastAction = "";
  waiting.clear();
  const truth = $("beside").checked && !$("beside").disabled;
  say(truth ? "Starting both worlds …" : "Starting …");
  tell({ type: "start", ...chosen, truth });
}

function hear(message) {
  if (message.type === "ready") {
    started = true;
    $("truthfigure").hidden = !message.truth;
    say("Press a key to drive.");
  } else if (message.type === "saved") {
    const links = message.files.map((name) => element("a", { href: `/api/play/recordings/${name}`, download: name }, name.endsWith(".mp4") ? "mp4" : name.includes("_truth") ? "MuJoCo's HDF5" : "HDF5"));
    $("recordings").replaceChildren("Saved: ", ...links.flatMap((link, i) => (i ? [" · ", link] : [link])));
    $("recordings").title = message.folder;
  } else if (message.error) {
    if (message.type === "paused") driving = false;
    notice(message.error);
  }
}

function show(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const bytes = info.height * info.width * 3;
  header.worlds.forEach((world, index) => {
    paint(index ? $("truth") : $("learned"), new Uint8Array(buffer, 4 + size + index * bytes, bytes));
    tellWorld(index ? $("truthsays") : $("learnedsays"), world, index === 1);
  });
  window.hmaPlay.header = header;
  $("step").textContent = header.step;
  $("cost").textContent = header.step ? `${header.ms.toFixed(0)} ms` : "–";
  $("chance").textContent = header.worlds[0].probability === null ? "no judge" : `${(100 * header.worlds[0].probability).toFixed(0)}%`;
  if (header.step) arrivals.push(performance.now());
  for (const [number, when] of waiting) {
    if (number > header.input) continue;
    waiting.delete(number);
    // Painting happens after the next animation frame's callbacks.
    requestAnimationFrame(() => setTimeout(() => latencies.push(performance.now() - when), 0));
  }
}

function paint(canvas, rgb) {
  if (canvas.width !== info.width || canvas.height !== info.height) {
    canvas.width = info.width;
    canvas.height = info.height;
  }
  const image = new ImageData(info.width, info.height);
  for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
    image.data[j] = rgb[i];
    image.data[j + 1] = rgb[i + 1];
    image.data[j + 2] = rgb[i + 2];
    image.data[j + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function tellWorld(place, world, truth) {
  place.className = world.success ? "won" : "dim";
  place.textContent = world.success ? "lifted" : truth || world.probability !== null ? "not lifted" : "";
}

const say = (text) => ($("state").textContent = text);

// ---------------------------------------------------------------- acting

function action() {
  const values = new Array(info.actions).fill(0);
  const strength = gentle ? GENTLE : FULL;
  for (const direction of held.keys()) {
    const [index, sign] = HOLDS[direction];
    if (index < values.length) values[index] += sign * (index === 5 ? TURN : strength);
  }
  padAction(values, strength);
  if (values.length) values[values.length - 1] = gripper;
  return values.map((value) => Math.max(-1, Math.min(1, Math.round(value * 100) / 100)));
}

/** Send the action if it is another one than before; with the time of a press, measure how long the picture takes. */
function act(pressed) {
  if (!started) return;
  const values = action();
  const text = values.join();
  if (values.slice(0, -1).some(Boolean)) lastMove = performance.now();
  if (text === lastAction && driving) return;
  lastAction = text;
  lastMove = performance.now();
  driving = true;
  input += 1;
  if (pressed !== undefined) waiting.set(input, pressed);
  tell({ type: "action", input, action: values });
  say("Driving.");
}

function hold(direction, by, when) {
  if (!held.has(direction)) held.set(direction, new Set());
  held.get(direction).add(by);
  document.querySelector(`[data-hold="${direction}"]`)?.classList.add("held");
  act(when);
}

function release(direction, by) {
  held.get(direction)?.delete(by);
  if (held.get(direction)?.size) return;
  held.delete(direction);
  document.querySelector(`[data-hold="${direction}"]`)?.classList.remove("held");
  act();
}

function releaseAll() {
  for (const direction of [...held.keys()]) {
    held.delete(direction);
    document.querySelector(`[data-hold="${direction}"]`)?.classList.remove("held");
  }
  act();
}

function grip(when) {
  gripper = -gripper;
  drawGrip();
  act(when);
}

const drawGrip = () => ($("grip").firstChild.textContent = gripper > 0 ? "open" : "close");

function setGentle(value) {
  gentle = value;
  $("slow").setAttribute("aria-pressed", String(gentle));
  if (held.size) act();
}

function pause(why = "Paused. Any key goes on.") {
  if (!driving) return;
  driving = false;
  tell({ type: "pause" });
  say(why);
}

// ---------------------------------------------------------------- gamepad

let padButtons = [];

function padAction(values, strength) {
  const pad = navigator.getGamepads?.().find(Boolean);
  if (!pad) return;
  const axis = (number) => (Math.abs(pad.axes[number] ?? 0) > 0.12 ? pad.axes[number] : 0);
  const moves = [axis(1), axis(0), -axis(3)];
  moves.forEach((value, index) => (values[index] += strength * value));
  values[5] -= TURN * axis(2);
}

function watch() {
  const pad = navigator.getGamepads?.().find(Boolean);
  if (pad) {
    const pressed = pad.buttons.map((button) => button.pressed);
    if (pressed[0] && !padButtons[0]) grip(performance.now());
    if (pressed[9] && !padButtons[9]) begin();
    padButtons = pressed;
    if (driving || pad.axes.some((value) => Math.abs(value) > 0.12)) act();
  }
  if (held.size) lastMove = performance.now();
  if (driving && performance.now() - lastMove > IDLE_MS) pause("Paused, for nothing moved. Any key goes on.");
  requestAnimationFrame(watch);
}

// ---------------------------------------------------------------- the page

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("play").hidden || event.target.closest("input[type=text], select")) return;
  const key = event.key.toLowerCase();
  if (KEYS[key]) {
    if (!event.repeat) hold(KEYS[key], key, event.timeStamp);
  } else if (event.repeat) return;
  else if (key === " ") grip(event.timeStamp);
  else if (key === "enter") begin();
  else if (key === "p") driving ? pause() : act();
  else if (key === "shift") return setGentle(true);
  else return;
  event.preventDefault();
}

function lift(event) {
  const key = event.key.toLowerCase();
  if (KEYS[key]) release(KEYS[key], key);
  if (key === "shift") setGentle(false);
}

function choose(start, image, button) {
  chosen = { start, image };
  document.querySelectorAll(".starts button").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
  $("beside").disabled = image !== null; // nobody knows the state behind a picture
  $("truthchoice").title = image === null ? "" : "MuJoCo cannot begin from a picture.";
  begin();
}

function addStart(source, label, start, image, first = false) {
  const button = element("button", { "aria-label": label, title: label, "aria-pressed": "false", onclick: () => choose(start, image, button) }, element("img", { src: source, alt: "", loading: "lazy" }));
  first ? $("starts").prepend(button) : $("starts").append(button);
  return button;
}

async function upload(file) {
  if (!file) return;
  try {
    if (file.size > 1e6 * info.upload_mb) throw new Error(`The picture has ${(file.size / 1e6).toFixed(1)} MB; at most ${info.upload_mb} are taken. Make it smaller.`);
    const { image } = await send("/api/play/picture", file);
    choose(null, image, addStart(URL.createObjectURL(file), "Your picture", null, image, true));
    $("starts").scrollLeft = 0;
  } catch (error) {
    notice(error.message);
  } finally {
    $("file").value = "";
  }
}

function drawRate() {
  const now = performance.now();
  while (arrivals.length > 2000) arrivals.shift();
  const recent = arrivals.filter((when) => when > now - 2000);
  $("rate").textContent = driving && recent.length > 2 ? ((1000 * (recent.length - 1)) / (recent.at(-1) - recent[0])).toFixed(1) : "–";
  const middle = latencies.slice(-15).sort((a, b) => a - b);
  $("latency").textContent = middle.length ? `${middle[Math.floor(middle.length / 2)].toFixed(0)} ms` : "–";
}

function listen() {
  document.addEventListener("keydown", press);
  document.addEventListener("keyup", lift);
  window.addEventListener("blur", releaseAll);
  document.addEventListener("visibilitychange", () => document.hidden && pause());
  document.querySelectorAll("[data-hold]").forEach((button) => {
    const direction = button.dataset.hold;
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      hold(direction, "pointer", event.timeStamp);
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(end, () => held.has(direction) && release(direction, "pointer"));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
  });
  $("grip").addEventListener("click", (event) => grip(event.timeStamp));
  $("slow").addEventListener("click", () => setGentle(!gentle));
  $("restart").addEventListener("click", begin);
  $("pause").addEventListener("click", () => (driving ? pause() : act()));
  $("beside").addEventListener("change", begin);
  $("file").addEventListener("change", () => upload($("file").files[0]));
  $("saveepisode").addEventListener("click", () => tell({ type: "save" }));
  // A focused button would take space and Enter for itself.
  document.querySelectorAll("#play button").forEach((button) => button.addEventListener("click", () => button.blur()));
}

try {
  info = await ask("/api/play/info");
  $("loading").hidden = true;
  $("play").hidden = false;
  $("truthchoice").hidden = !info.truth;
  for (let i = 0; i < info.starts; i += 1) addStart(`/api/play/starts/${i}`, `Start ${i}`, i, null);
  $("starts").firstChild.setAttribute("aria-pressed", "true");
  listen();
  connect();
  setInterval(drawRate, 250);
  watch();
} catch (error) {
  $("loading").hidden = true;
  notice(error.message);
}
