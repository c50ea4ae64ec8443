"use strict";
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let state = {open: false, objects: [], prompts: {}, queue: {}};
let frame = 0, current = 1, shown = {objects: {}}, playing = null, finished = false, tool = "add";
let zoom = 1, offset = [0, 0], hidden = false, box = null, stroke = null, cross = null;
let waiting = Promise.resolve(), unsaved = 0, loading = null, again = false;

function say(text, bad = false) { $("message").textContent = text; $("message").className = bad ? "bad" : ""; }
async function ask(path, body, method = "POST") {
  const raw = body instanceof Blob;
  const options = method === "GET" ? {} : {method, body: raw ? body : JSON.stringify({...(state.clip ? {clip: state.clip} : {}), ...body}),
    headers: {"Content-Type": raw ? "application/octet-stream" : "application/json"}};
  if (method === "GET" && state.clip) path += (path.includes("?") ? "&" : "?") + "clip=" + encodeURIComponent(state.clip);
  let response;
  try { response = await fetch(path, options); }
  catch { throw new Error("The page's program does not answer. Is it still running?"); }
  const answer = await response.json().catch(() => ({error: `The answer was ${response.status} ${response.statusText}.`}));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}
function tellSaved(failed = false) {
  $("saved").textContent = !state.open ? "" : failed ? "Not saved" : unsaved ? "Saving…" : `Saved · edit ${state.version}`;
  $("saved").className = failed ? "bad" : "";
}
// Edits are done one after the other, in the order of the clicks, each on the state that the one before it left.
function edit(path, body, text) {
  unsaved++;
  tellSaved();
  waiting = waiting.then(async () => {
    say("Working…");
    let failed = false;
    try { take(await ask(path, {version: state.version, ...body})); say(text || ""); }
    catch (error) { failed = true; say(error.message, true); await refresh(); }
    unsaved--;
    tellSaved(failed);
    if (state.shown && state.shown.frame === frame && !loading) put(state.shown); else await show();
  });
  return waiting;
}
async function refresh() { try { take(await ask("state", null, "GET")); } catch (error) { say(error.message, true); } }

function take(news) {
  if (news.clip !== state.clip) { frame = 0; zoom = 1; offset = [0, 0]; current = news.objects?.[0]?.obj ?? 1; shown = {objects: {}}; }
  state = news;
  state.objects ||= []; state.prompts ||= {}; state.queue ||= {};
  if (state.current != null) current = state.current;
  $("opener").hidden = !state.can_open;
  $("empty").hidden = state.open;
  $("view").hidden = !state.open;
  $("title").textContent = state.title || "Annotate";
  document.title = (state.title ? state.title + " · " : "") + "Annotate";
  const {waiting: left = 0, accepted = 0, rejected = 0} = state.queue;
  $("counts").textContent = state.single ? "" : `${left} wait · ${accepted} accepted · ${rejected} rejected`;
  $("nothing").textContent = accepted + rejected ? "Nothing waits for you. Drop another video here" : "Drop a video here";
  $("accept").hidden = $("reject").hidden = state.single;
  $("done").textContent = state.single ? "Done" : "Video done";
  for (const id of ["new", "back", "play", "next", "slider", "done", "skip"]) $(id).disabled = !state.open;
  for (const id of ["forward", "backward", "both", "export"]) $(id).disabled = !state.objects.length;
  for (const id of ["accept", "reject"]) $(id).disabled = !state.objects.some(o => o.obj === current);
  $("undo").disabled = !state.can_undo;
  $("redo").disabled = !state.can_redo;
  tellSaved();
  if (!state.open) return;
  $("slider").max = state.num_frames - 1;
  $("marks").setAttribute("viewBox", `0 0 ${state.width} ${state.height}`);
  if (state.damage) say(state.damage, true);
  if (state.holder) say(`${state.holder} works on this video now; your edits are refused.`, true);
  fit(); drawObjects();
}

// Only the latest frame asked for is fetched: what came between is skipped.
async function show(number = frame) {
  if (!state.open) return;
  frame = Math.max(0, Math.min(state.num_frames - 1, number));
  $("slider").value = frame;
  $("slider").setAttribute("aria-valuetext", `frame ${frame} of ${state.num_frames}`);
  $("place").textContent = `${frame} of 0–${state.num_frames - 1}`;
  if (loading) { again = true; return loading; }
  loading = load();
  await loading;
}
async function load() {
  do {
    again = false;
    const number = frame, clip = state.clip, image = new Image();
    image.src = `frames/${number}?clip=${encodeURIComponent(clip)}`;
    try {
      const [masks] = await Promise.all([ask(`masks/${number}`, null, "GET"), image.decode()]);
      if (number !== frame || clip !== state.clip) { again = true; continue; }
      $("frame").src = image.src;
      $("frame").alt = `Frame ${number}`;
      shown = masks;
      showOverlay();
    } catch (error) {
      const reason = await ask(`frames/${number}`, null, "GET").then(() => error.message, failure => failure.message);
      say(reason, true); stop(); await refresh();
    }
  } while (again);
  loading = null;
  $("view").dataset.frame = frame;
  drawObjects(); drawMarks(); drawTracks();
}
function put(masks) { shown = masks; showOverlay(); drawObjects(); drawMarks(); drawTracks(); }
function showOverlay() {
  if (shown.overlay) $("overlay").src = "data:image/png;base64," + shown.overlay;
  $("overlay").hidden = hidden || !shown.overlay;
}

function fit() {
  if (!state.open) return;
  const room = $("stage").getBoundingClientRect(), gap = room.width > 500 ? 24 : 4;
  const scale = zoom * Math.min((room.width - gap) / state.width, (room.height - gap) / state.height);
  const [width, height] = [state.width * scale, state.height * scale], view = $("view").style;
  // At least a part of the picture stays in sight.
  offset = offset.map((way, axis) => {
    const most = Math.max(0, ([width, height][axis] - [room.width, room.height][axis]) / 2 + gap);
    return Math.max(-most, Math.min(most, way));
  });
  view.width = `${width}px`; view.height = `${height}px`;
  view.left = `${(room.width - width) / 2 + offset[0]}px`; view.top = `${(room.height - height) / 2 + offset[1]}px`;
  $("zoom").textContent = `${Math.round(zoom * 100)} %`;
  drawMarks(); drawTracks();
}
function zoomTo(factor, x, y) {
  const room = $("stage").getBoundingClientRect(), before = zoom;
  zoom = Math.max(1, Math.min(16, factor));
  const middle = [room.left + room.width / 2, room.top + room.height / 2], at = [x ?? middle[0], y ?? middle[1]];
  offset = offset.map((way, axis) => at[axis] - middle[axis] - (at[axis] - middle[axis] - way) * zoom / before);
  fit();
}
const colour = obj => (state.objects.find(o => o.obj === obj) || {colour: "#eceef2"}).colour;

function drawObjects() {
  const list = state.objects.some(o => o.obj === current) ? state.objects : [...state.objects, {obj: current, fresh: true}];
  const names = [...new Set(state.objects.map(o => o.category).filter(Boolean))];
  $("categories").replaceChildren(...names.map(name => Object.assign(document.createElement("option"), {value: name})));
  if ($("objects").contains(document.activeElement) && document.activeElement.tagName === "INPUT") return;  // somebody types there
  $("objects").replaceChildren(...list.map(({obj, fresh, category, status, reason}) => {
    const item = document.createElement("li"), choose = document.createElement("button");
    const swatch = document.createElement("span"), note = document.createElement("span");
    choose.className = "choose";
    choose.setAttribute("aria-pressed", obj === current);
    choose.onclick = () => pick(obj);
    swatch.className = "swatch"; swatch.style.background = fresh ? "transparent" : colour(obj);
    if (fresh) swatch.style.border = "1px dashed";
    note.className = "note"; note.title = reason || "How well the model expects its mask to fit, 0 to 1";
    const here = shown.objects[obj], mark = {accepted: "✓ ", rejected: "✗ "}[status] || "";
    note.textContent = fresh ? "click it" : mark + (!here ? "no mask here" : !here.visible ? "out of sight" : here.score.toFixed(2));
    choose.append(swatch, `Object ${obj}`, note);
    item.append(choose);
    if (!fresh) {
      const name = document.createElement("input"), remove = document.createElement("button");
      Object.assign(name, {type: "text", value: category || "", placeholder: "class", maxLength: 80});
      name.setAttribute("list", "categories");
      name.setAttribute("aria-label", `Class of object ${obj}`);
      name.onchange = () => { name.blur(); edit("name", {obj, category: name.value.trim() || null}, "Named."); };
      remove.textContent = "✕"; remove.className = "small";
      remove.setAttribute("aria-label", `Remove object ${obj}`);
      remove.title = "Remove this object (can be undone)";
      remove.onclick = () => edit("remove", {obj}, `Object ${obj} was removed.`);
      item.append(name, remove);
    }
    return item;
  }));
  const prompt = (state.prompts[frame] || {})[current], hint = $("hint");
  if (!prompt) { hint.textContent = `Click on object ${current}, or drag a box around it.`; return; }
  const parts = [];
  if (prompt.points) parts.push(`${prompt.points.length} click${prompt.points.length > 1 ? "s" : ""}`);
  if (prompt.box) parts.push("a box");
  if (prompt.mask) parts.push("a mask");
  const clear = document.createElement("button");
  clear.className = "small"; clear.textContent = "Clear"; clear.onclick = clearFrame;
  clear.setAttribute("aria-label", `Clear what was said of object ${current} on this frame`);
  hint.replaceChildren(`Object ${current} has ${parts.join(" and ")} here. `, clear);
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
function drawMarks() {
  if (!state.open) return;
  const unit = state.width / Math.max(1, $("view").clientWidth), marks = [];
  const rectangle = ([x0, y0, x1, y1], stroke, dashes) => shape("rect", {x: x0, y: y0, width: x1 - x0, height: y1 - y0,
    fill: "none", stroke, "stroke-width": 2 * unit, "stroke-dasharray": dashes ? `${6 * unit} ${4 * unit}` : "none"});
  for (const [obj, prompt] of Object.entries(state.prompts[frame] || {})) {
    if (prompt.box) marks.push(rectangle(prompt.box, colour(+obj)));
    (prompt.points || []).forEach(([x, y], number) => {
      const on = prompt.labels[number] === 1, arm = 4 * unit, dim = +obj === current ? 1 : .55;
      const group = shape("g", {opacity: dim, stroke: "#fff", "stroke-width": 2 * unit, "stroke-linecap": "round"});
      group.append(shape("circle", {cx: x, cy: y, r: 8 * unit, fill: on ? "#0b8a4a" : "#c62828"}),
        shape("path", {d: `M${x - arm} ${y}H${x + arm}` + (on ? `M${x} ${y - arm}V${y + arm}` : "")}));
      marks.push(group);
    });
  }
  if (box) marks.push(rectangle(box, "#fff", true));
  if (stroke) marks.push(shape("polyline", {points: stroke.map(point => point.join()).join(" "), fill: "none", opacity: .6,
    stroke: tool === "erase" ? "#000" : colour(current), "stroke-width": 2 * $("radius").value, "stroke-linecap": "round", "stroke-linejoin": "round"}));
  if (cross && document.activeElement === $("view")) {
    const d = `M0 ${cross[1]}H${state.width}M${cross[0]} 0V${state.height}`;
    marks.push(shape("path", {d, stroke: "#000", "stroke-width": 3 * unit, opacity: .6}), shape("path", {d, stroke: "#fff", "stroke-width": unit}));
  }
  $("marks").replaceChildren(...marks);
}
// A row an object: a bar where it has masks, red and higher the more uncertain they are, a diamond where it was prompted.
function drawTracks() {
  if (!state.open) return;
  const canvas = $("tracks"), width = canvas.clientWidth, row = 14, ratio = devicePixelRatio || 1;
  const height = state.objects.length * row;
  canvas.style.height = `${height}px`;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const pen = canvas.getContext("2d"), thumb = 8, step = (width - 2 * thumb) / Math.max(1, state.num_frames - 1);
  pen.scale(ratio, ratio);
  state.objects.forEach(({obj, frames, doubts}, index) => {
    const y = index * row + row / 2;
    frames.forEach((number, place) => {
      pen.globalAlpha = .55; pen.fillStyle = colour(obj);
      pen.fillRect(thumb + (number - .5) * step, y - 2, step + .5, 4);
      const doubt = doubts[place] / 100;
      if (doubt < .2) return;
      pen.globalAlpha = .35 + .65 * doubt; pen.fillStyle = "#ff5252";
      pen.fillRect(thumb + (number - .5) * step, y - 6 * doubt, step + .5, 12 * doubt);
    });
    pen.globalAlpha = 1; pen.fillStyle = colour(obj);
    for (const [number, prompts] of Object.entries(state.prompts)) {
      if (!(obj in prompts)) continue;
      const x = thumb + number * step;
      pen.beginPath(); pen.moveTo(x - 5, y); pen.lineTo(x, y - 5); pen.lineTo(x + 5, y); pen.lineTo(x, y + 5); pen.fill();
    }
  });
  pen.fillStyle = "#fff"; pen.fillRect(thumb + frame * step - .5, 0, 1, height);
}
function mostUncertain() {
  const {frames = [], doubts = []} = state.objects.find(o => o.obj === current) || {};
  return frames.length ? frames[doubts.indexOf(Math.max(...doubts))] : frame;
}

function pick(obj) {
  current = obj;
  for (const id of ["accept", "reject"]) $(id).disabled = !state.objects.some(o => o.obj === current);
  drawObjects(); drawMarks();
}
function fresh() { pick(1 + Math.max(0, ...state.objects.map(o => o.obj))); say(`Click on object ${current}, or drag a box around it.`); }
function choose(name) {
  tool = name;
  for (const button of document.querySelectorAll(".tool")) button.setAttribute("aria-pressed", button.id === tool);
  $("radius").hidden = !["brush", "erase"].includes(tool);
  $("view").classList.toggle("pan", tool === "pan");
}
function point(x, y, on) {
  const later = state.objects.some(o => o.obj === current && o.frames.length > 1);
  edit("prompt", {frame, obj: current, points: [[x, y]], labels: [on ? 1 : 0]},
    later ? "Track again to carry this to the other frames." : "Click again to refine, or track.");
}
function clearFrame() {
  if ((state.prompts[frame] || {})[current]) edit("clear", {frame, obj: current}, "Cleared.");
  else say(`There is nothing to clear of object ${current} on this frame.`);
}
function undo() { edit("undo", {}, "Undone."); }
function redo() { edit("redo", {}, "Done again."); }

async function track(direction) {
  await waiting;
  stop();
  try { follow(await ask("track", {direction})); }
  catch (error) { say(error.message, true); }
}
async function follow(job) {
  $("progress").hidden = $("cancel").hidden = false;
  for (const id of ["forward", "backward", "both"]) $(id).disabled = true;
  say("");
  let failure = null;
  try {
    while (job.running) {
      $("progress").max = Math.max(1, job.total);
      $("progress").value = job.done;
      say(`${job.done} of ${job.total} frames`);
      if (job.frame !== null) await show(job.frame);
      await new Promise(wake => setTimeout(wake, 150));
      job = await ask("job", null, "GET");
    }
    failure = job.error;
  } catch (error) { failure = error.message; }
  $("progress").hidden = $("cancel").hidden = true;
  await refresh();
  failure ||= state.damage;
  await show(job.cancelled || job.frame === null ? frame : job.frame);
  say(failure || (job.cancelled ? `Stopped after ${job.done} frames.` : `Tracked ${job.done} frames.`), !!failure);
}
function cancel() { if (!$("cancel").hidden) ask("cancel").catch(error => say(error.message, true)); }

function stop() { clearInterval(playing); playing = null; $("play").textContent = "▶ Play"; $("play").setAttribute("aria-label", "Play"); }
function play() {
  if (playing) return stop();
  if (frame === state.num_frames - 1) show(0);
  $("play").textContent = "❚❚ Pause"; $("play").setAttribute("aria-label", "Pause");
  playing = setInterval(() => frame < state.num_frames - 1 ? loading || show(frame + 1) : stop(), 80);
}
async function open(file) {
  if (!file || !state.can_open) return;
  say(`Opening ${file.name}…`);
  try { take(await ask("open?name=" + encodeURIComponent(file.name), file)); say(""); await show(0); }
  catch (error) { say(error.message, true); }
}
async function save() {
  await waiting;
  const link = document.createElement("a");
  try {
    const response = await fetch(`export?format=${$("format").value}&clip=${encodeURIComponent(state.clip)}`);
    if (!response.ok) throw new Error((await response.json()).error);
    link.href = URL.createObjectURL(await response.blob());
    link.download = decodeURIComponent(response.headers.get("Content-Disposition").split('"')[1]);
  } catch (error) { return say(error.message, true); }
  link.click();
  URL.revokeObjectURL(link.href);
  say(`Saved ${link.download}: the masks of every frame.`);
}
async function decide(decision, obj) {
  await waiting;
  stop();
  try {
    take(await ask("decide", {version: state.version, decision, ...(obj == null ? {} : {obj})}));
    await goOn();
  } catch (error) { say(error.message, true); await refresh(); }
}
// The most uncertain masklet that waits, on the frame where it is most uncertain.
async function goOn() {
  const before = state.clip;
  take(await ask("next"));
  if (!state.open) return say(state.queue.waiting ? "What is left is with others." : "Nothing waits any more.");
  if (state.current == null) pick(state.objects[0]?.obj ?? 1); else pick(state.current);
  await show(state.clip === before || state.objects.length ? mostUncertain() : 0);
  const {reason} = state.objects.find(o => o.obj === current) || {};
  say(reason ? `Object ${current}: ${reason}.` : "");
  const job = await ask("job", null, "GET").catch(() => ({}));
  if (job.running) follow(job);
}
async function done(decision) {
  if (!state.single) return decide(decision);
  await waiting;
  try { await ask("done", {decision}); } catch (error) { return say(error.message, true); }
  finished = true;
  document.querySelectorAll("button, input, select").forEach(element => element.disabled = true);
  say(decision === "skip" ? "Skipped; you may close this page." : "Done. The masks were handed over; you may close this page.");
  // The next video of a series comes under the same address.
  const page = state.page;
  setInterval(() => fetch("state").then(r => r.json()).then(news => news.page !== page && location.reload(), () => {}), 1000);
}

const view = $("view"), fingers = new Map();
const place = event => {
  const room = view.getBoundingClientRect(), clamp = (value, most) => Math.max(0, Math.min(most, value));
  return [clamp((event.clientX - room.left) / room.width * state.width, state.width),
    clamp((event.clientY - room.top) / room.height * state.height, state.height)].map(value => Math.round(value * 10) / 10);
};
const drawing = () => tool === "brush" || tool === "erase";
let press = null, pinch = null;
$("stage").addEventListener("pointerdown", event => {
  if (finished || !state.open || ![0, 1, 2].includes(event.button)) return;
  event.preventDefault();  // arrow keys keep moving through frames
  document.activeElement.blur();
  stop();
  fingers.set(event.pointerId, event);
  try { $("stage").setPointerCapture(event.pointerId); } catch { /* the pointer is gone already */ }
  if (fingers.size === 2) { press = box = stroke = null; pinch = null; return drawMarks(); }
  if (fingers.size > 2) return;
  if (tool === "pan" || event.button === 1) press = {pan: offset.slice(), x: event.clientX, y: event.clientY};
  else if (event.target === $("stage")) press = null;  // beside the picture
  else {
    press = {at: place(event), x: event.clientX, y: event.clientY};
    if (drawing() && event.button === 0) { stroke = [press.at]; drawMarks(); }
  }
});
$("stage").addEventListener("pointermove", event => {
  if (fingers.has(event.pointerId)) fingers.set(event.pointerId, event);
  if (fingers.size === 2) {
    const [a, b] = [...fingers.values()], far = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    const middle = [(a.clientX + b.clientX) / 2, (a.clientY + b.clientY) / 2];
    if (pinch) {
      offset = offset.map((way, axis) => way + middle[axis] - pinch.middle[axis]);
      zoomTo(zoom * far / Math.max(1, pinch.far), ...middle);
    }
    pinch = {far, middle};
    return;
  }
  if (!press) return;
  if (press.pan) { offset = [press.pan[0] + event.clientX - press.x, press.pan[1] + event.clientY - press.y]; return fit(); }
  if (stroke) { stroke.push(place(event)); return drawMarks(); }
  if (drawing() || Math.hypot(event.clientX - press.x, event.clientY - press.y) < 5 && !box) return;
  const [x0, y0] = press.at, [x1, y1] = place(event);
  box = [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
  drawMarks();
});
$("stage").addEventListener("pointerup", event => {
  fingers.delete(event.pointerId);
  if (!press || press.pan) { press = pinch = null; return; }
  const [x, y] = press.at, drawn = box, line = stroke;
  press = box = stroke = pinch = null;
  if (line) edit("brush", {frame, obj: current, stroke: line, radius: +$("radius").value, erase: tool === "erase"}, "Drawn. Track to carry it on.");
  else if (drawn && drawn[0] < drawn[2] && drawn[1] < drawn[3]) edit("prompt", {frame, obj: current, box: drawn}, "Click to refine, or track.");
  else point(x, y, event.button === 0 && !event.shiftKey && tool !== "exclude");
});
$("stage").addEventListener("pointercancel", event => { fingers.delete(event.pointerId); press = box = stroke = pinch = null; drawMarks(); });
$("stage").addEventListener("contextmenu", event => event.preventDefault());
$("stage").addEventListener("wheel", event => {
  if (!state.open) return;
  event.preventDefault();
  zoomTo(zoom * Math.exp(-event.deltaY / 400), event.clientX, event.clientY);
}, {passive: false});
view.addEventListener("focus", () => { cross ||= [state.width / 2, state.height / 2]; drawMarks(); });
view.addEventListener("blur", drawMarks);
view.addEventListener("keydown", event => {
  const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (move) {
    const far = (event.shiftKey ? .05 : .01) * state.width;
    cross = [Math.max(0, Math.min(state.width, cross[0] + move[0] * far)), Math.max(0, Math.min(state.height, cross[1] + move[1] * far))];
    drawMarks();
  } else if (event.key === "Enter") point(cross[0], cross[1], !event.shiftKey && tool !== "exclude");
  else return;
  event.preventDefault(); event.stopPropagation();
});

$("slider").oninput = () => { stop(); show(+$("slider").value); };
$("slider").onchange = () => $("slider").blur();
$("tracks").onclick = event => show(Math.round((event.offsetX - 8) / ($("tracks").clientWidth - 16) * (state.num_frames - 1)));
$("back").onclick = () => { stop(); show(frame - 1); };
$("next").onclick = () => { stop(); show(frame + 1); };
$("play").onclick = play;
$("new").onclick = fresh;
$("undo").onclick = undo;
$("redo").onclick = redo;
$("accept").onclick = () => decide("accept", current);
$("reject").onclick = () => decide("reject", current);
$("skip").onclick = () => state.single ? done("skip") : decide("skip", state.objects.some(o => o.obj === current) ? current : null);
$("done").onclick = () => done("accept");
$("cancel").onclick = cancel;
$("in").onclick = () => zoomTo(zoom * 1.5);
$("out").onclick = () => zoomTo(zoom / 1.5);
$("zoom").onclick = () => { zoom = 1; offset = [0, 0]; fit(); };
for (const button of document.querySelectorAll(".tool")) button.onclick = () => choose(button.id);
for (const id of ["forward", "backward", "both"]) $(id).onclick = () => track(id);
$("export").onclick = save;
$("file").onchange = () => { open($("file").files[0]); $("file").value = ""; };
$("person").onchange = () => {
  document.cookie = `person=${encodeURIComponent($("person").value.trim())}; path=/; max-age=31536000; SameSite=Strict`;
  location.reload();
};
document.addEventListener("dragover", event => event.preventDefault());
document.addEventListener("drop", event => { event.preventDefault(); open(event.dataTransfer.files[0]); });
new ResizeObserver(fit).observe($("stage"));
document.addEventListener("keydown", event => {
  if (finished || !state.open || event.altKey || event.metaKey || event.ctrlKey && !["z", "y"].includes(event.key)) return;
  if (event.target.tagName === "SELECT" || event.target.type === "text") return;
  if (event.target.tagName === "BUTTON" && [" ", "Enter"].includes(event.key)) return;
  const far = event.shiftKey ? 10 : 1, press = id => () => $(id).hidden || $(id).disabled || $(id).click();
  const keys = {ArrowLeft: () => { stop(); show(frame - far); }, ArrowRight: () => { stop(); show(frame + far); }, " ": play,
    Home: () => show(0), End: () => show(state.num_frames - 1), n: fresh, z: undo, y: redo, c: clearFrame, Escape: cancel,
    t: () => track("forward"), r: () => track("backward"), b: () => track("both"), u: () => show(mostUncertain()),
    q: () => choose("add"), w: () => choose("exclude"), e: () => choose("brush"), d: () => choose("erase"), h: () => choose("pan"),
    a: press("accept"), x: press("reject"), s: press("skip"), 0: press("zoom"),
    m: () => { hidden = !hidden; showOverlay(); say(hidden ? "Masks are hidden." : ""); }};
  const act = keys[event.key.length > 1 ? event.key : event.key.toLowerCase()];
  const chosen = state.objects[event.key - 1];
  if (act) act(); else if (chosen) pick(chosen.obj); else return;
  event.preventDefault();
});

(async () => {
  const cookie = document.cookie.split("; ").find(part => part.startsWith("person="));
  $("person").value = cookie ? decodeURIComponent(cookie.slice(7)) : "";
  await refresh();
  if (state.objects.length) pick(state.current ?? state.objects[0].obj);
  const job = state.open ? await ask("job", null, "GET").catch(() => ({})) : {};
  await show(+(Object.keys(state.prompts)[0] ?? 0));
  if (job.running) follow(job);
})();
