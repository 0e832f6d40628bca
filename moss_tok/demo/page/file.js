// The tab "File": a recording, its reconstruction with some quantizers, and its codes.

import { $, bitrateText, request, show } from "./main.js";
import { setUpRecording } from "./microphone.js";
import { frequencies, rows, Tracks } from "./tracks.js";

const PLAYERS = { original: "original", reconstruction: "reconstruction", codes: "reconstruction" };

export function setUpFile(codec) {
  const slider = $("quantizers");
  slider.max = codec.num_quantizers;
  slider.value = codec.num_quantizers;
  let updating = null; // the promise of `showLatest` while it runs
  let isOutdated = false; // the recording or the slider has changed since it began
  const tracks = new Tracks($("result"), PLAYERS);
  for (const track of ["original", "reconstruction"]) tracks.ticks(track, frequencies(codec));
  tracks.ticks("codes", rows(codec.num_quantizers));

  async function load(blob, name) {
    show("file-message", `Encoding ${name} …`, "busy");
    try {
      const url = `/recordings?name=${encodeURIComponent(name)}`;
      const recording = await request(url, { method: "POST", body: blob });
      $("file-name").textContent = name;
      tracks.show(recording);
      await Promise.all([put("original", 0), update()]);
      const cut = recording.file_seconds > recording.seconds + 0.1;
      show("file-message", cut ? `The first ${codec.max_seconds} of ` +
        `${recording.file_seconds.toFixed(0)} seconds are used.` : "");
    } catch (error) {
      show("file-message", error.message, "bad");
    }
  }

  // Sets audio and spectrogram of a track to those with some quantizers; 0: the original.
  async function put(track, number) {
    const { recording } = tracks;
    const base = `/recordings/${recording.id}/${number}`;
    const [audio, picture] = await Promise.all([request(`${base}.wav`), request(`${base}.png`)]);
    if (recording !== tracks.recording) return; // another one was loaded meanwhile
    tracks.putAudio(track, audio);
    tracks.putPicture(track, picture);
  }

  // Shows the slider's position. Positions that it passes meanwhile are not computed.
  function update() {
    $("bitrate").textContent = bitrateText(codec, Number(slider.value));
    if (!tracks.recording) return Promise.resolve();
    isOutdated = true;
    updating ??= showLatest().finally(() => { updating = null; });
    return updating;
  }

  async function showLatest() {
    $("reconstruction").classList.add("waiting");
    try {
      while (isOutdated) {
        isOutdated = false;
        await showPosition(Number(slider.value)).catch((error) => { if (!isOutdated) throw error; });
      }
    } finally {
      $("reconstruction").classList.remove("waiting");
    }
  }

  async function showPosition(number) {
    const { recording } = tracks;
    const base = `/recordings/${recording.id}/${number}`;
    const [codes] = await Promise.all([
      request(`${base}.codes.png`), put("reconstruction", number),
    ]);
    const { distances } = await request(base);
    if (recording !== tracks.recording) return;
    tracks.putPicture("codes", codes);
    $("distances").textContent = Object.entries(distances)
      .map(([name, value]) => `${name.replace("_loss", "")} ${value.toFixed(2)}`).join(" · ");
    $("result").dataset.shown = number; // for tests
  }

  slider.oninput = () => update().catch((error) => show("file-message", error.message, "bad"));
  $("bitrate").textContent = bitrateText(codec, codec.num_quantizers);
  setUpChoice(load);
  setUpRecording($("record"), "file-message", codec, load);
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
