// The tab "Speak": a text, spoken while it is sampled, then with its spectrogram and codes.

import { $, bitrateText, request, show } from "./main.js";
import { setUpRecording } from "./microphone.js";
import { frequencies, rows, Tracks } from "./tracks.js";

const RESERVE_SECONDS = 0.2; // audio that waits, so that small delays are not heard
const MAX_RESERVE_SECONDS = 3;
const CUT = "The speech was cut at the longest duration for its text.";
const PLAYERS = { speech: "speech", "speech-codes": "speech" };

export function setUpSpeak(codec) {
  $("speak-missing").hidden = Boolean(codec.speaker);
  $("speak-form").hidden = !codec.speaker;
  if (!codec.speaker) return;
  const spoken = { ...codec, num_quantizers: codec.speaker.num_quantizers };
  const slider = $("speak-quantizers");
  slider.max = spoken.num_quantizers;
  slider.value = spoken.num_quantizers;
  slider.oninput = () => {
    $("speak-bitrate").textContent = bitrateText(spoken, Number(slider.value));
  };
  slider.oninput();
  const tracks = new Tracks($("spoken"), PLAYERS);
  tracks.ticks("speech", frequencies(codec));
  const voice = setUpVoice(codec);
  const button = $("say");
  let session = null; // that samples
  let player = null; // of the latest session
  tracks.players.forEach((element) => element.addEventListener("play", () => player?.close()));

  function start() {
    const wish = {
      text: $("text").value,
      num_quantizers: Number(slider.value),
      seed: Math.trunc(Number($("seed").value)),
      prompt: voice.id,
      prompt_text: voice.id ? $("voice-text").value : "",
    };
    tracks.pause();
    player?.close();
    player = new Player(codec.sample_rate);
    const mine = new Session(wish, player, async (result, error) => {
      if (session !== mine) return; // an earlier one
      session = null;
      button.textContent = "Speak";
      button.classList.remove("on");
      const cut = result && !result.ended ? CUT : "";
      show("speak-message", error || cut, error ? "bad" : "");
      if (result) await put(result, wish.num_quantizers);
    });
    session = mine;
    button.textContent = "Stop";
    button.classList.add("on");
    show("speak-message", "Preparing …", "busy");
  }

  async function put(recording, number) {
    try {
      const base = `/recordings/${recording.id}`;
      const urls = [`${base}/0.wav`, `${base}/0.png`, `${base}/${number}.codes.png`];
      const [audio, spectrogram, codes] = await Promise.all(urls.map((url) => request(url)));
      tracks.show(recording);
      tracks.putAudio("speech", audio);
      tracks.putPicture("speech", spectrogram);
      tracks.putPicture("speech-codes", codes);
      tracks.ticks("speech-codes", rows(number));
      $("spoken").dataset.shown = recording.id; // for tests
    } catch (error) {
      show("speak-message", error.message, "bad");
    }
  }

  $("speak-form").onsubmit = (event) => {
    event.preventDefault();
    if (!session) {
      start();
      return;
    }
    player.close();
    session.stop();
  };
}

// The recording of the voice; its id is "" without one.
function setUpVoice(codec) {
  const voice = { id: "" };

  async function load(blob, name) {
    show("speak-message", `Encoding ${name} …`, "busy");
    try {
      const url = `/recordings?name=${encodeURIComponent(name)}`;
      const recording = await request(url, { method: "POST", body: blob });
      set(recording.id, `${name}, ${recording.seconds.toFixed(1)} s`);
      show("speak-message");
    } catch (error) {
      show("speak-message", error.message, "bad");
    }
  }

  function set(id, name) {
    voice.id = id;
    $("voice-name").textContent = name;
    $("voice").hidden = !id;
  }

  $("choose-voice").onchange = (event) => {
    const { files } = event.target;
    if (files[0]) load(files[0], files[0].name);
    event.target.value = ""; // the same file can be chosen again
  };
  $("remove-voice").onclick = () => set("", "");
  setUpRecording($("record-voice"), "speak-message", codec, load);
  return voice;
}

// One text that is sampled. onEnd gets the result, or null and an error sentence.
class Session {
  constructor(wish, player, onEnd) {
    this.player = player;
    this.onEnd = onEnd;
    this.ended = false;
    this.began = performance.now();
    this.numSamples = 0;
    this.socket = new WebSocket(`ws://${location.host}/speak`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.socket.send(JSON.stringify(wish));
    this.socket.onmessage = ({ data }) => this.receive(data);
    this.socket.onclose = () => this.stop(null, "The demo does not answer: was it ended?");
  }

  receive(data) {
    if (this.ended) return;
    if (typeof data !== "string") {
      this.play(new Float32Array(data));
      return;
    }
    const result = JSON.parse(data);
    if (result.error) this.stop(null, result.error);
    else this.stop(result);
  }

  play(samples) {
    this.player.play(samples);
    const now = performance.now();
    if (!this.numSamples) {
      this.first = now;
      this.firstSamples = samples.length;
      $("speak-first").textContent = `${((now - this.began) / 1000).toFixed(2)} s`;
      $("speak-speed").textContent = "–";
      $("speak-numbers").hidden = false;
    }
    this.numSamples += samples.length;
    const { sampleRate } = this.player;
    const length = `${(this.numSamples / sampleRate).toFixed(1)} s`;
    $("speak-length").textContent = length;
    show("speak-message", `Speaking: ${length}`, "busy");
    const seconds = (this.numSamples - this.firstSamples) / sampleRate;
    if (seconds) {
      const speed = (1000 * seconds) / (now - this.first);
      $("speak-speed").textContent = Number(speed.toPrecision(2));
    }
  }

  stop(result = null, error = "") {
    if (this.ended) return;
    this.ended = true;
    this.socket.close();
    this.onEnd(result, error);
  }
}

// Plays blocks of samples one after another.
class Player {
  constructor(sampleRate) {
    this.sampleRate = sampleRate;
    this.context = new AudioContext({ sampleRate });
    this.reserve = RESERVE_SECONDS;
    this.next = 0; // the sample of the context's time at which the next block begins
  }

  play(samples) {
    const { context, sampleRate } = this;
    if (context.state === "closed") return;
    const buffer = new AudioBuffer({ length: samples.length, sampleRate });
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(context.destination);
    const now = context.currentTime * sampleRate;
    if (this.next < now) {
      this.next = Math.round(now + this.reserve * sampleRate);
      this.reserve = Math.min(2 * this.reserve, MAX_RESERVE_SECONDS); // fewer, longer pauses
    }
    source.start(this.next / sampleRate);
    this.next += samples.length;
  }

  close() {
    if (this.context.state !== "closed") this.context.close();
  }
}
