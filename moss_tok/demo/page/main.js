// Tabs, facts about the codec, and helpers of the tabs.

import { setUpFile } from "./file.js";
import { setUpLive } from "./live.js";
import { setUpSpeak } from "./speak.js";

export const $ = (id) => document.getElementById(id);

// Shows a sentence below the controls of a tab; no text hides it. kind: "", "bad" or "busy".
export function show(id, text = "", kind = "") {
  $(id).textContent = text;
  $(id).className = `message ${kind}`;
  $(id).hidden = !text;
}

// The JSON of a response; throws its error sentence.
export async function request(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error("The demo does not answer: was it ended?");
  }
  const isJson = response.headers.get("content-type")?.startsWith("application/json");
  if (isJson) {
    const value = await response.json();
    if (value.error) throw new Error(value.error);
    return value;
  }
  if (!response.ok) throw new Error(`The demo answers ${response.status} ${response.statusText}.`);
  return response.blob();
}

export function bitrateText(codec, number) {
  const bitrate = codec.bitrate * number;
  const text = bitrate < 1000 ? `${bitrate} bit/s` : `${+(bitrate / 1000).toFixed(2)} kbit/s`;
  return `${number} of ${codec.num_quantizers} · ${text}`;
}

function facts(codec) {
  const channels = { 1: "mono", 2: "stereo" }[codec.num_channels] ?? `${codec.num_channels} channels`;
  return [
    `${codec.sample_rate / 1000} kHz ${channels}`,
    `${codec.frame_rate} frames per second`,
    `${codec.num_quantizers} quantizers of ${codec.codebook_size} codes`,
  ].join(" · ");
}

function setUpTabs() {
  const sections = [...document.querySelectorAll("section[data-tab]")];
  const buttons = sections.map((section) => {
    const button = document.createElement("button");
    button.textContent = section.dataset.tab;
    button.setAttribute("role", "tab");
    button.setAttribute("aria-controls", section.id);
    button.onclick = () => select(section.id);
    document.querySelector("nav").append(button);
    section.setAttribute("role", "tabpanel");
    return button;
  });
  function select(id) {
    sections.forEach((section, i) => {
      section.hidden = section.id !== id;
      buttons[i].setAttribute("aria-selected", section.id === id);
    });
    history.replaceState(null, "", `#${id}`);
  }
  const wanted = location.hash.slice(1);
  select(sections.some((section) => section.id === wanted) ? wanted : sections[0].id);
}

async function main() {
  setUpTabs();
  const codec = await request("/codec");
  $("codec-name").textContent = `· ${codec.name}`;
  $("codec-facts").textContent = facts(codec);
  $("note").textContent = codec.note && `This codec is ${codec.note}.`;
  $("max-seconds").textContent = codec.max_seconds;
  setUpFile(codec);
  setUpLive(codec);
  setUpSpeak(codec);
  document.body.dataset.ready = "yes";
}

main().catch((error) => show("file-message", error.message, "bad"));
