// The tab "File": a recording, its reconstruction with some quantizers, and its codes.

import { $, bitrateText, request, show } from "./main.js";
import { openMicrophone, toWav } from "./microphone.js";

const TRACKS = ["original", "reconstruction", "codes"];

export function setUpFile(codec) {
  const slider = $("quantizers");
  slider.max = codec.num_quantizers;
  slider.value = codec.num_quantizers;
  let recording = null; // {id, seconds, name}
  let wanted = 0; // counts requests: only the latest is shown

  const image = (track) => $(track).querySelector("img");
  const player = (track) => $(track).querySelector("audio");
  setUpPlayers();
  drawTicks();

  async function load(blob, name) {
    show("file-message", `Encoding ${name} …`, "busy");
    try {
      const url = `/recordings?name=${encodeURIComponent(name)}`;
      recording = { ...(await request(url, { method: "POST", body: blob })), name };
      $("file-name").textContent = name;
      $("result").hidden = false;
      drawTimes();
      await Promise.all([put("original", 0), update()]);
      const cut = recording.file_seconds > recording.seconds + 0.1;
      show("file-message", cut ? `The first ${codec.max_seconds} of ` +
        `${recording.file_seconds.toFixed(0)} seconds are used.` : "");
    } catch (error) {
      show("file-message", error.message, "bad");
    }
  }

  // Sets audio and spectrogram of a track to those with some quantizers; 0: the original.
  async function put(track, number, isWanted = () => true) {
    const base = `/recordings/${recording.id}/${number}`;
    const [audio, picture] = await Promise.all([request(`${base}.wav`), request(`${base}.png`)]);
    if (!isWanted()) return;
    const element = player(track);
    const { currentTime, paused } = element;
    const isSame = element.dataset.id === recording.id;
    replaceUrl(element, audio);
    replaceUrl(image(track), picture);
    element.dataset.id = recording.id;
    if (isSame) element.currentTime = currentTime;
    if (isSame && !paused) element.play();
  }

  function replaceUrl(element, blob) {
    if (element.src) URL.revokeObjectURL(element.src);
    element.src = URL.createObjectURL(blob);
  }

  async function update() {
    const number = Number(slider.value);
    $("bitrate").textContent = bitrateText(codec, number);
    if (!recording) return;
    const mine = ++wanted;
    const isWanted = () => mine === wanted;
    const base = `/recordings/${recording.id}/${number}`;
    $("reconstruction").classList.add("waiting");
    try {
      const [codes] = await Promise.all([
        request(`${base}.codes.png`),
        put("reconstruction", number, isWanted),
      ]);
      const { distances } = await request(base);
      if (!isWanted()) return;
      replaceUrl(image("codes"), codes);
      $("distances").textContent = Object.entries(distances)
        .map(([name, value]) => `${name.replace("_loss", "")} ${value.toFixed(2)}`).join(" · ");
    } finally {
      if (isWanted()) {
        $("reconstruction").classList.remove("waiting");
        $("result").dataset.shown = number; // for tests
      }
    }
  }

  // One player at a time; a line in all pictures shows where it is.
  function setUpPlayers() {
    const players = ["original", "reconstruction"].map(player);
    for (const element of players) {
      element.onplay = () => {
        players.filter((other) => other !== element).forEach((other) => other.pause());
        requestAnimationFrame(() => follow(element));
      };
    }
    for (const track of TRACKS) {
      $(track).querySelector(".view").onclick = (event) => {
        if (!recording) return;
        const box = event.currentTarget.getBoundingClientRect();
        const element = player(track === "original" ? "original" : "reconstruction");
        element.currentTime = ((event.clientX - box.left) / box.width) * recording.seconds;
        element.play();
      };
    }
  }

  function follow(element) {
    $("result").classList.toggle("playing", !element.paused);
    const position = `${(100 * element.currentTime) / recording.seconds}%`;
    document.querySelectorAll("#result .view i").forEach((line) => { line.style.left = position; });
    if (!element.paused) requestAnimationFrame(() => follow(element));
  }

  function drawTicks() {
    const heights = codec.ticks.map(({ label, height }) => [label, height]);
    for (const track of ["original", "reconstruction"]) ticks(track, heights);
    const rows = [1, codec.num_quantizers].map((row) => (
      [row, 1 - (row - 0.5) / codec.num_quantizers]));
    ticks("codes", rows);
  }

  function ticks(track, labels) {
    $(track).querySelector(".ticks").replaceChildren(...labels.map(([label, height]) => {
      const span = document.createElement("span");
      span.textContent = label;
      span.style.bottom = `${100 * height}%`;
      return span;
    }));
  }

  function drawTimes() {
    const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20];
    const step = steps.find((x) => recording.seconds / x <= 8) ?? 20;
    const times = [];
    for (let i = 0; i * step < recording.seconds - step / 2; i++) times.push(i * step);
    times.push(recording.seconds);
    document.querySelectorAll("#result .times").forEach((row) => {
      row.replaceChildren(...times.map((time, i) => {
        const span = document.createElement("span");
        span.textContent = i === times.length - 1 ? `${time.toFixed(1)} s` : +time.toFixed(1);
        span.style.left = `${(100 * time) / recording.seconds}%`;
        return span;
      }));
    });
  }

  slider.oninput = () => update().catch((error) => show("file-message", error.message, "bad"));
  $("bitrate").textContent = bitrateText(codec, codec.num_quantizers);
  setUpChoice(load);
  setUpRecording(codec, load);
}

function setUpChoice(load) {
  const choose = $("choose");
  choose.onchange = () => {
    if (choose.files[0]) load(choose.files[0], choose.files[0].name);
    choose.value = ""; // the same file can be chosen again
  };
  const isOver = (value) => (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", value);
  };
  document.body.ondragover = isOver(true);
  document.body.ondragleave = isOver(false);
  document.body.ondrop = (event) => {
    isOver(false)(event);
    const file = event.dataTransfer.files[0];
    if (file) load(file, file.name);
  };
}

function setUpRecording(codec, load) {
  const button = $("record");
  let microphone = null;
  let blocks = [];

  async function start() {
    blocks = [];
    try {
      microphone = await openMicrophone(codec.sample_rate, 2048);
    } catch (error) {
      show("file-message", error.message, "bad");
      return;
    }
    button.classList.add("on");
    microphone.node.port.onmessage = ({ data }) => {
      blocks.push(data.block);
      const seconds = (blocks.length * data.block.length) / codec.sample_rate;
      button.textContent = `Stop (${seconds.toFixed(0)} s)`;
      if (seconds >= codec.max_seconds) stop();
    };
    microphone.node.port.postMessage({ begin: true });
  }

  function stop() {
    if (!microphone) return;
    microphone.close();
    microphone = null;
    button.classList.remove("on");
    button.textContent = "Record";
    if (blocks.length) load(toWav(blocks, codec.sample_rate), "recording.wav");
  }

  button.onclick = () => (microphone ? stop() : start());
}
