"use strict";

const $ = (id) => document.getElementById(id);
const STATES = {
  fused: ["fused", "good"],
  held: ["thermal held", "fair"],
  a_missing: ["source a missing", "bad"],
  b_missing: ["source b missing", "bad"],
  waiting: ["waiting for cameras", ""],
};
const CAMERA_STATES = { ok: "good", opening: "", silent: "bad", frozen: "fair", lost: "bad", ended: "" };
const POLICIES = {
  range: ["stretch", "keep", "smooth"],
  chroma: ["auto", "a", "b", "mix", "official", "none"],
  tone: ["percentile", "clahe", "full"],
  on_missing: ["hold", "pass", "skip"],
};
const FAULTS = ["corrupt", "losses", "silences", "freezes", "clock_jumps", "clock_refused"];
const COLOURS = ["#5b8def", "#8e7cf0", "#43c6e8", "#ff8f4a", "#46d78b", "#ffc857", "#f07cc0"];
const HISTORY = 240; // points of the chart
const POLL = 500; // ms between two looks at the status
const RETRY = 1000; // ms before a request that failed is made again

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const shown = () =>
  document.hidden ? new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true })) : null;
const number = (value, digits = 1) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const count = (value) => (value ?? 0).toLocaleString("en");

function setBadge(element, [text, kind]) {
  element.textContent = text;
  element.className = `badge ${kind}`;
}

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// ---- pictures: one request at a time, always for the newest frame, so that a slow network costs frames and not time

function unpack(buffer) {
  const view = new DataView(buffer);
  const blocks = [];
  for (let at = 0; at < buffer.byteLength; ) {
    const length = view.getUint32(at, true);
    blocks.push(new Uint8Array(buffer, at + 4, length));
    at += 4 + length;
  }
  return [JSON.parse(new TextDecoder().decode(blocks[0])), ...blocks.slice(1)];
}

async function draw(canvas, jpeg) {
  if (!jpeg.length) return false;
  const picture = await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }));
  if (canvas.width !== picture.width || canvas.height !== picture.height) {
    canvas.width = picture.width;
    canvas.height = picture.height;
  }
  canvas.getContext("2d").drawImage(picture, 0, 0);
  picture.close();
  return true;
}

async function showPictures() {
  let after = 0;
  for (;;) {
    await shown();
    try {
      const response = await fetch(`frame?after=${after}`);
      if (response.status === 204) continue;
      if (!response.ok) throw new Error(await response.text());
      const [head, fused, a, b] = unpack(await response.arrayBuffer());
      // A number that falls behind is a server that was started anew.
      after = head.number;
      await Promise.all([
        draw($("fused-picture"), fused),
        draw($("source-a").querySelector("canvas"), a),
        draw($("source-b").querySelector("canvas"), b),
      ]);
      setBadge($("state"), STATES[head.state]);
    } catch {
      after = 0;
      await pause(RETRY);
    }
  }
}

// ---- numbers

const history = [];

async function showNumbers() {
  for (;;) {
    await shown();
    try {
      const response = await fetch("status.json");
      if (!response.ok) throw new Error(await response.text());
      showStatus(await response.json());
    } catch {
      setBadge($("state"), ["not connected", "bad"]);
    }
    await pause(POLL);
  }
}

function showStatus(status) {
  if (status.state === "waiting") setBadge($("state"), STATES.waiting);
  const latency = status.page.latency_ms;
  $("fps").textContent = number(status.fps);
  $("p50").textContent = number(latency?.p50);
  $("p95").textContent = number(latency?.p95);
  $("skew").textContent = number(status.skew_ms?.p50);
  $("uptime").textContent = duration(status.seconds);
  const picture = $("fused-picture");
  $("fused-facts").textContent = `${picture.width}×${picture.height}`;
  if (latency) history.push(latency);
  if (history.length > HISTORY) history.shift();
  drawChart();
  showStages(status.stages_ms);
  for (const side of ["a", "b"]) showCamera($(`source-${side}`), side, status.sources[side]);
  showCounters(status);
  showEvents(status.events);
  showPolicy(status.policy);
  $("video-toggle").hidden = !status.page.webrtc;
}

function duration(seconds) {
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  return `${Math.floor(seconds / 3600)}:${two((seconds / 60) % 60)}:${two(seconds % 60)}`;
}

function showCamera(figure, side, camera) {
  figure.querySelector("b").textContent = camera ? camera.name : `source ${side}`;
  const badge = figure.querySelector(".badge");
  setBadge(badge, camera ? [camera.state, CAMERA_STATES[camera.state] ?? ""] : ["waiting", ""]);
  badge.title = camera?.reason ?? "";
  figure.classList.toggle("away", !camera || ["silent", "lost", "opening"].includes(camera.state));
  if (!camera) return;
  const facts = [`${number(camera.fps)} frames/s`];
  if (camera.size) facts.push(camera.size.replace("x", "×"), `${camera.depth} bits`, `${camera.clock} clock`);
  if (camera.reason) facts.push(camera.reason);
  figure.querySelector(".facts").textContent = facts.join(" · ");
}

function showStages(stages) {
  const entries = Object.entries(stages).filter(([, times]) => times && times.p50 >= 0.05);
  const bars = entries.map(([, times], i) => {
    const bar = make("div");
    bar.style.flexGrow = times.p50;
    bar.style.background = COLOURS[i % COLOURS.length];
    return bar;
  });
  const names = entries.map(([name, times], i) => {
    const item = make("li");
    const dot = make("i");
    dot.style.background = COLOURS[i % COLOURS.length];
    item.append(dot, `${name} `, make("b", number(times.p50)), " ms");
    return item;
  });
  $("stages").replaceChildren(...bars);
  $("stage-names").replaceChildren(...names);
}

function showCounters(status) {
  const rows = [];
  const row = (name, frames, dropped, faults, title) => {
    const line = make("tr");
    const cell = (value) => make("td", value === null ? "" : count(value), value ? "some" : "");
    const head = make("td", name);
    head.title = title ?? name;
    line.append(head, make("td", count(frames)), cell(dropped), cell(faults));
    rows.push(line);
  };
  for (const camera of Object.values(status.sources)) {
    const faults = FAULTS.reduce((sum, name) => sum + camera[name], 0);
    row(camera.name, camera.frames, camera.dropped, faults, FAULTS.map((name) => `${name}: ${camera[name]}`).join("\n"));
  }
  const missing = (status.states.a_missing ?? 0) + (status.states.b_missing ?? 0);
  row("out", status.frames, null, missing, `fused from one source: ${missing}`);
  for (const sink of status.sinks) row(sink.url, sink.written, sink.dropped, sink.error ? 1 : 0, sink.error);
  $("counters").replaceChildren(...rows);
}

function showEvents(events) {
  if (!events.length) return;
  const items = events.slice(-12).reverse().map((event) => {
    const item = make("li");
    item.append(make("time", new Date(event.time * 1000).toLocaleTimeString("en-GB")));
    item.append(make("span", `${event.source}: ${event.kind.replace("_", " ")}${event.detail ? `, ${event.detail}` : ""}`));
    return item;
  });
  $("events").replaceChildren(...items);
}

function drawChart() {
  const canvas = $("chart");
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const top = niceAbove(Math.max(1, ...history.map((point) => point.p95)));
  const x = (i) => width - ((history.length - 1 - i) * width) / (HISTORY - 1);
  const y = (value) => height - 1 - (value / top) * (height - 16);
  pen.font = "11px system-ui, sans-serif";
  for (const value of [top / 2, top]) {
    pen.fillStyle = "#202934";
    pen.fillRect(0, y(value), width, 1);
    pen.fillStyle = "#8b98a7";
    pen.fillText(`${value} ms`, 0, y(value) - 3);
  }
  const line = (key, colour, filled) => {
    pen.beginPath();
    history.forEach((point, i) => pen.lineTo(x(i), y(point[key])));
    pen.strokeStyle = colour;
    pen.lineWidth = 1.5;
    pen.stroke();
    if (!filled || history.length < 2) return;
    pen.lineTo(width, height);
    pen.lineTo(x(0), height);
    pen.globalAlpha = 0.14;
    pen.fillStyle = colour;
    pen.fill();
    pen.globalAlpha = 1;
  };
  line("p95", "#ff8f4a", false);
  line("p50", "#43c6e8", true);
}

function niceAbove(value) {
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((factor) => factor * step).find((candidate) => candidate >= value);
}

// ---- controls

function showPolicy(policy) {
  $("controls").hidden = !policy;
  if (!policy) return;
  for (const group of document.querySelectorAll(".choices")) {
    const name = group.dataset.policy;
    group.closest(".control").hidden = policy[name] === undefined;
    if (!group.children.length) {
      group.append(...POLICIES[name].map((choice) => choiceButton(name, choice)));
    }
    for (const button of group.children) button.setAttribute("aria-pressed", button.value === String(policy[name]));
  }
  showToneRange(policy.tone);
}

function showToneRange(tone) {
  const inputs = [$("tone-low"), $("tone-high")];
  if (inputs.includes(document.activeElement)) return;
  const limits = String(tone ?? "").includes(":") ? tone.split(":") : ["", ""];
  inputs.forEach((input, i) => (input.value = limits[i]));
}

function choiceButton(name, choice) {
  const button = make("button", choice);
  button.type = "button";
  button.value = choice;
  button.addEventListener("click", () => change({ [name]: choice }));
  return button;
}

async function change(policy) {
  try {
    const response = await fetch("control", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(policy),
    });
    const answer = await response.json();
    $("control-error").textContent = response.ok ? "" : answer.error;
    if (response.ok) showPolicy(answer);
  } catch {
    $("control-error").textContent = "the stream could not be reached";
  }
}

$("tone-range").addEventListener("submit", (event) => {
  event.preventDefault();
  change({ tone: `${$("tone-low").value.trim()}:${$("tone-high").value.trim()}` });
});

$("fullscreen").addEventListener("click", () =>
  document.fullscreenElement ? document.exitFullscreen() : $("fused").requestFullscreen(),
);

// ---- WebRTC, where the server has it: smoother on a slow network than single pictures

let peer = null;

async function startVideo() {
  peer = new RTCPeerConnection({ iceServers: [] });
  peer.addTransceiver("video", { direction: "recvonly" });
  peer.addEventListener("track", (event) => {
    $("fused-video").srcObject = event.streams[0] ?? new MediaStream([event.track]);
  });
  await peer.setLocalDescription(await peer.createOffer());
  // The offer holds this side's addresses, which are gathered meanwhile.
  while (peer.iceGatheringState !== "complete") await pause(50);
  const { type, sdp } = peer.localDescription;
  const response = await fetch("offer", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ type, sdp }),
  });
  if (!response.ok) throw new Error(await response.text());
  await peer.setRemoteDescription(await response.json());
}

async function toggleVideo() {
  const video = peer === null;
  try {
    if (video) await startVideo();
  } catch {
    peer.close();
    peer = null;
    return;
  }
  if (!video) {
    peer.close();
    peer = null;
  }
  $("fused-video").hidden = peer === null;
  $("fused-picture").hidden = peer !== null;
  $("video-toggle").textContent = peer === null ? "WebRTC" : "pictures";
}

$("video-toggle").addEventListener("click", toggleVideo);

showPictures();
showNumbers();
