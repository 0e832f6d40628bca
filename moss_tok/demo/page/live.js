// The tab "Live": the microphone through streaming encoder and decoder, with the latency.

import { $, bitrateText, show } from "./main.js";
import { openMicrophone } from "./microphone.js";

const BLOCK_SECONDS = 0.01;
const RESERVE_SECONDS = 0.03; // samples that wait, so that small delays are not heard
const MAX_BEHIND_SECONDS = 1; // then blocks are left out
const PICTURE_SECONDS = 10; // width of all pictures
const FLOOR_DB = -95;
const CEILING_DB = -25;

export function setUpLive(codec) {
  const slider = $("live-quantizers");
  const button = $("start");
  slider.max = codec.num_quantizers;
  slider.value = codec.num_quantizers;
  $("frame").textContent = `${(1000 / codec.frame_rate).toFixed(0)} ms`;
  $("live-codes").height = codec.num_quantizers;
  $("live-codes").width = Math.round(PICTURE_SECONDS * codec.frame_rate);
  slider.oninput = () => {
    $("live-bitrate").textContent = bitrateText(codec, Number(slider.value));
  };
  slider.oninput();
  // Another number of quantizers is another stream.
  slider.onchange = () => { if (session) { session.stop(); start(); } };
  $("monitor").onchange = () => session?.setVolume();
  let session = null;

  async function start() {
    const mine = new Session(codec, Number(slider.value), (error) => {
      if (session !== mine) return; // an earlier one
      session = null;
      button.textContent = "Start";
      button.classList.remove("on");
      show("live-message", error, error ? "bad" : "");
    });
    session = mine;
    button.textContent = "Stop";
    button.classList.add("on");
    show("live-message", "Preparing the streams …", "busy");
    await mine.start();
  }

  button.onclick = () => (session ? session.stop() : start());
}

class Session {
  constructor(codec, numQuantizers, onEnd) {
    this.codec = codec;
    this.numQuantizers = numQuantizers;
    this.onEnd = onEnd;
    this.means = {};
    this.numBehind = 0; // samples that were sent and have not come back
  }

  async start() {
    try {
      const { sample_rate: rate } = this.codec;
      this.microphone = await openMicrophone(rate, Math.round(BLOCK_SECONDS * rate));
    } catch (error) {
      this.stop(error.message);
      return;
    }
    if (this.ended) { this.microphone.close(); return; }
    this.socket = new WebSocket(`ws://${location.host}/live?quantizers=${this.numQuantizers}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.receive(data);
    this.socket.onclose = () => this.stop(this.ended ? "" : "The demo does not answer: was it ended?");
  }

  receive(data) {
    if (typeof data !== "string") {
      const samples = new Float32Array(data);
      this.numBehind -= samples.length;
      this.microphone.node.port.postMessage({ samples });
      return;
    }
    const fields = JSON.parse(data);
    if (fields.error) this.stop(fields.error);
    else if (fields.ready) this.connect();
    else this.showFrames(fields);
  }

  // Sends the microphone's blocks from now on.
  connect() {
    const { context, source, node } = this.microphone;
    const analyser = () => new AnalyserNode(context, { fftSize: 1024, smoothingTimeConstant: 0,
      minDecibels: FLOOR_DB, maxDecibels: CEILING_DB });
    const input = analyser();
    const output = analyser();
    this.volume = new GainNode(context);
    source.connect(input);
    node.connect(output).connect(this.volume).connect(context.destination);
    this.setVolume();
    const reserve = Math.round(RESERVE_SECONDS * context.sampleRate);
    node.port.onmessage = ({ data }) => {
      this.send(data.block);
      if (data.latency !== null) {
        this.showMean("latency", (1000 * data.latency) / context.sampleRate, 0);
      }
    };
    node.port.postMessage({ begin: true, reserve });
    this.pictures = [
      new Scrolling($("live-input"), input), new Scrolling($("live-output"), output),
    ];
    show("live-message");
    requestAnimationFrame((time) => this.draw(time));
  }

  // Leaves the block out if the demo is far behind, so that the latency stays bounded.
  send(block) {
    if (this.numBehind > MAX_BEHIND_SECONDS * this.codec.sample_rate) {
      this.microphone.node.port.postMessage({ leftOut: block.length });
      show("live-message", "This machine is too slow for this codec: parts are left out.");
    } else if (this.socket.readyState === WebSocket.OPEN) {
      this.numBehind += block.length;
      this.socket.send(block);
    }
  }

  setVolume() {
    if (this.volume) this.volume.gain.value = $("monitor").checked ? 1 : 0;
  }

  showFrames({ codes, encode_ms: encode, decode_ms: decode }) {
    const numFrames = codes[0].length;
    this.showMean("encode", encode / numFrames, 1);
    this.showMean("decode", decode / numFrames, 1);
    const canvas = $("live-codes");
    const context = canvas.getContext("2d");
    for (let t = 0; t < numFrames; t++) {
      context.drawImage(canvas, -1, 0);
      context.clearRect(canvas.width - 1, 0, 1, canvas.height);
      codes.forEach((row, q) => {
        context.fillStyle = `hsl(${(300 * row[t]) / this.codec.codebook_size} 75% 55%)`;
        context.fillRect(canvas.width - 1, q, 1, 1);
      });
    }
  }

  // Shows a moving average in ms.
  showMean(id, value, digits) {
    const mean = this.means[id] ?? value;
    this.means[id] = mean + 0.05 * (value - mean);
    $(id).textContent = `${this.means[id].toFixed(digits)} ms`;
  }

  draw(time) {
    if (this.ended) return;
    this.pictures.forEach((picture) => picture.draw(time / 1000));
    requestAnimationFrame((next) => this.draw(next));
  }

  stop(error = "") {
    if (this.ended) return;
    this.ended = true;
    this.socket?.close();
    this.microphone?.close();
    this.onEnd(error);
  }
}

// A spectrogram that moves to the left, as fast as the codes do whatever the screen's refresh rate.
class Scrolling {
  constructor(canvas, analyser) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.analyser = analyser;
    this.levels = new Uint8Array(analyser.frequencyBinCount);
    this.column = this.context.createImageData(1, canvas.height);
    this.position = null; // columns so far
  }

  draw(seconds) {
    const { canvas, context, levels, column } = this;
    const position = Math.floor((seconds * canvas.width) / PICTURE_SECONDS);
    const width = Math.min(position - (this.position ?? position), canvas.width);
    this.position = position;
    if (!width) return;
    this.analyser.getByteFrequencyData(levels);
    context.drawImage(canvas, -width, 0);
    for (let y = 0; y < canvas.height; y++) {
      // Quadratic: low frequencies get more room.
      const height = 1 - y / canvas.height;
      const level = levels[Math.floor(height ** 2 * (levels.length - 1))] / 255;
      column.data.set(color(level), 4 * y);
    }
    for (let x = canvas.width - width; x < canvas.width; x++) context.putImageData(column, x, 0);
  }
}

// Black, violet, orange, white.
function color(level) {
  const red = 255 * Math.min(1, 1.6 * level);
  const green = 255 * Math.max(0, 1.7 * level - 0.7);
  const blue = 255 * Math.max(Math.min(1.5 * level, 0.9 - level), 2.6 * level - 1.6, 0);
  return [red, green, blue, 255];
}
