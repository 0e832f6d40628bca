// After {begin} it sends what it hears in blocks, and plays the samples that come back.
//
// Sample i that comes back is sample i that was sent, so the latency is the number of samples
// captured since the first one sent, less those played and those left out.

const PATIENCE = 0.25; // seconds of waiting samples beyond the start, after which some are skipped

class Through extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.block = new Float32Array(options.processorOptions.blockSize);
    this.filled = 0;
    this.began = false;
    this.captured = 0; // samples since it began
    this.queue = []; // Float32Arrays
    this.waiting = 0; // samples in the queue
    this.at = 0; // of the first array
    this.played = 0; // or left out
    this.reserve = 0; // samples that must wait before playing begins
    this.playing = false;
    this.port.onmessage = ({ data }) => {
      if (data.begin) {
        this.began = true;
        this.reserve = data.reserve ?? 0;
      }
      if (data.leftOut) this.played += data.leftOut;
      if (data.samples) {
        this.queue.push(data.samples);
        this.waiting += data.samples.length;
      }
    };
  }

  process([input], [output]) {
    const out = output[0];
    if (this.began) this.capture(input[0] ?? new Float32Array(out.length));
    this.skip();
    if (!this.playing && this.waiting > this.reserve + out.length) this.playing = true;
    if (this.playing && this.waiting < out.length) this.playing = false; // wait for the reserve again
    if (this.playing) {
      for (let i = 0; i < out.length; i++) out[i] = this.next();
    }
    return true;
  }

  capture(samples) {
    this.captured += samples.length;
    for (const sample of samples) {
      this.block[this.filled++] = sample;
      if (this.filled === this.block.length) {
        this.port.postMessage({
          block: this.block,
          latency: this.playing ? this.captured - this.played : null,
        });
        this.block = new Float32Array(this.block.length);
        this.filled = 0;
      }
    }
  }

  // Catches up after a delay.
  skip() {
    while (this.waiting > 2 * this.reserve + PATIENCE * sampleRate) this.next();
  }

  next() {
    const first = this.queue[0];
    const sample = first[this.at++];
    if (this.at === first.length) {
      this.queue.shift();
      this.at = 0;
    }
    this.waiting--;
    this.played++;
    return sample;
  }
}

registerProcessor("through", Through);
