// The microphone at the codec's sample rate, through an AudioWorklet.

import { show } from "./main.js";

const REASONS = {
  NotFoundError: "No microphone was found.",
  NotAllowedError: "The browser may not use the microphone: allow it beside the address of the page.",
  NotReadableError: "The microphone is used by another program.",
};

// Opens the microphone. After {begin: true}, node.port sends Float32Array blocks of blockSize samples
// as {block}; it takes {samples} to play, see worklet.js. Throws an error with one sentence.
export async function openMicrophone(sampleRate, blockSize) {
  if (!navigator.mediaDevices?.getUserMedia || !window.AudioWorkletNode) {
    throw new Error("This browser cannot record: open the page as http://127.0.0.1 in a current one.");
  }
  const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new Error(REASONS[error.name] ?? `The microphone cannot be opened (${error.message}).`);
  }
  const context = new AudioContext({ sampleRate, latencyHint: "interactive" });
  const close = () => {
    stream.getTracks().forEach((track) => track.stop());
    if (context.state !== "closed") context.close();
  };
  try {
    await context.audioWorklet.addModule("/page/worklet.js");
    const source = context.createMediaStreamSource(stream);
    const options = { processorOptions: { blockSize }, outputChannelCount: [1] };
    const node = new AudioWorkletNode(context, "through", options);
    source.connect(node);
    return { context, source, node, close };
  } catch (error) {
    close();
    throw new Error(`This browser cannot record at ${sampleRate} Hz (${error.message}).`);
  }
}

// Float32Array blocks as the bytes of a WAV file of float samples.
export function toWav(blocks, sampleRate) {
  const size = blocks.reduce((sum, block) => sum + block.length, 0);
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, value) => [...value].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + 4 * size, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 3, true); // IEEE float
  header.setUint16(22, 1, true); // channels
  header.setUint32(24, sampleRate, true);
  header.setUint32(28, 4 * sampleRate, true);
  header.setUint16(32, 4, true);
  header.setUint16(34, 32, true);
  text(36, "data");
  header.setUint32(40, 4 * size, true);
  return new Blob([header, ...blocks], { type: "audio/wav" });
}

// Makes a button record with the microphone; `load` takes the recording as a blob and its name.
export function setUpRecording(button, message, codec, load) {
  const label = button.textContent;
  let microphone = null;
  let blocks = [];

  async function start() {
    blocks = [];
    button.disabled = true; // a second click would open a second microphone
    try {
      microphone = await openMicrophone(codec.sample_rate, 2048);
    } catch (error) {
      show(message, error.message, "bad");
      return;
    } finally {
      button.disabled = false;
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
    button.textContent = label;
    if (blocks.length) load(toWav(blocks, codec.sample_rate), "recording.wav");
  }

  button.onclick = () => (microphone ? stop() : start());
}
