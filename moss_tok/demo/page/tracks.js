// Pictures under each other with one time axis, and the players that move over them.

export class Tracks {
  // box: the element with the figures; playerOf: id of each figure -> id of the one with its player.
  constructor(box, playerOf) {
    this.box = box;
    this.recording = null; // {id, seconds}
    this.players = [...box.querySelectorAll("audio")];
    for (const element of this.players) {
      element.onplay = () => {
        this.players.filter((other) => other !== element).forEach((other) => other.pause());
        requestAnimationFrame(() => this.follow(element));
      };
    }
    for (const [track, owner] of Object.entries(playerOf)) {
      this.find(track, ".view").onclick = (event) => {
        if (!this.recording) return;
        const frame = event.currentTarget.getBoundingClientRect();
        const element = this.find(owner, "audio");
        element.currentTime = ((event.clientX - frame.left) / frame.width) * this.recording.seconds;
        element.play();
      };
    }
  }

  find(track, selector) {
    return this.box.querySelector(`#${track} ${selector}`);
  }

  // The recording that is shown from now on.
  show(recording) {
    this.recording = recording;
    this.drawTimes();
    this.box.hidden = false;
  }

  // Replaces the audio of a track; that of the same recording goes on where it was.
  putAudio(track, blob) {
    const element = this.find(track, "audio");
    const { currentTime, paused } = element;
    const isSame = element.dataset.id === this.recording.id;
    replaceUrl(element, blob);
    element.dataset.id = this.recording.id;
    if (isSame) element.currentTime = currentTime;
    if (isSame && !paused) element.play();
  }

  putPicture(track, blob) {
    replaceUrl(this.find(track, "img"), blob);
  }

  pause() {
    this.players.forEach((element) => element.pause());
  }

  // A line in all pictures shows where a player is.
  follow(element) {
    this.box.classList.toggle("playing", !element.paused);
    const position = `${(100 * element.currentTime) / this.recording.seconds}%`;
    this.box.querySelectorAll(".view i").forEach((line) => { line.style.left = position; });
    if (!element.paused) requestAnimationFrame(() => this.follow(element));
  }

  // Labels of the vertical axis: [text, height from 0 to 1], ...
  ticks(track, labels) {
    this.find(track, ".ticks").replaceChildren(...labels.map(([label, height]) => {
      const span = document.createElement("span");
      span.textContent = label;
      span.style.bottom = `${100 * height}%`;
      return span;
    }));
  }

  drawTimes() {
    const { seconds } = this.recording;
    const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20];
    const step = steps.find((x) => seconds / x <= 8) ?? 20;
    const times = [0];
    for (let i = 1; i * step <= seconds - step; i++) times.push(i * step); // room for the last one
    times.push(seconds);
    this.box.querySelectorAll(".times").forEach((row) => {
      row.replaceChildren(...times.map((time, i) => {
        const span = document.createElement("span");
        span.textContent = i === times.length - 1 ? `${time.toFixed(1)} s` : +time.toFixed(1);
        span.style.left = `${(100 * time) / seconds}%`;
        return span;
      }));
    });
  }
}

// Labels of the frequencies of a spectrogram.
export function frequencies(codec) {
  return codec.ticks.map(({ label, height }) => [label, height]);
}

// Labels of the first and the last row of a picture of codes.
export function rows(number) {
  return [...new Set([1, number])].map((row) => [row, 1 - (row - 0.5) / number]);
}

function replaceUrl(element, blob) {
  if (element.src) URL.revokeObjectURL(element.src);
  element.src = URL.createObjectURL(blob);
}
