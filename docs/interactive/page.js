// The page around the scheduler: reads the settings, draws both schedules, and says what they mean.
"use strict";

const { serve, summarise, classic } = globalThis.batching;
const form = document.getElementById("controls");
const MS = 1e6;

// Arrivals: 0 means all at once; the other places of the slider are rates from 1 to 1000 requests/s.
const rateOf = (place) => (place === 0 ? 0 : Number((10 ** ((place - 1) * 3 / 29)).toPrecision(2)));

const SHOWN = {
  rate: (place) => (rateOf(place) === 0 ? "all at once" : `${rateOf(place)} requests/s`),
  step: (value) => `${value} ms`,
  row: (value) => `${(value / 100).toFixed(2)} ms`,
  token: (value) => `${(value / 100).toFixed(2)} ms`,
};

const ROWS = [
  ["Duration", "duration", (ns) => seconds(ns)],
  ["Output tokens/s", "throughput", (value) => number(value)],
  ["Steps", "steps", (value) => number(value)],
  ["Slots doing useful work", "utilisation", (value) => `${(100 * value).toFixed(0)} %`],
  ["Time to first token, mean", "meanTtft", (ns) => seconds(ns)],
  ["Latency, mean", "meanLatency", (ns) => seconds(ns)],
  ["Latency, p99", "p99Latency", (ns) => seconds(ns)],
];

function number(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 });
}

function seconds(ns) {
  return ns < 1e9 ? `${number(ns / 1e6)} ms` : `${(ns / 1e9).toFixed(2)} s`;
}

function settings() {
  const read = (name) => Number(form.elements[name].value);
  const names = ["slots", "count", "every", "long", "short", "prompt", "rate", "step", "row", "token"];
  return { ...Object.fromEntries(names.map((name) => [name, read(name)])), prefill: form.elements.prefill.value };
}

function schedules(chosen) {
  const requests = classic({ ...chosen, rate: rateOf(chosen.rate), seed: 1 });
  const cost = { step: chosen.step * MS, row: chosen.row * MS / 100, prompt: chosen.token * MS / 100 };
  const options = { slots: chosen.slots, prefill: chosen.prefill, budget: Math.max(2048, 2 * chosen.slots), cost };
  return ["static", "continuous"].map((policy) => {
    const steps = serve(requests, { ...options, policy });
    const summary = summarise(requests, steps, chosen.slots);
    return { ...summary, policy, steps, throughput: summary.tokens / (summary.duration / 1e9) };
  });
}

/** Return stretches of one kind in one slot: {slot, kind, request, start, end}. */
function stretches(schedule, isLong) {
  const open = new Map(), done = [];
  for (const step of schedule.steps) {
    const parts = [
      ...step.chunks.map((chunk) => [chunk.slot, "prompt", chunk.request]),
      ...step.rows.map((row) => [row.slot, row.grows ? (isLong(row.request) ? "long" : "short") : "held", row.request]),
    ];
    for (const [slot, kind, request] of parts) {
      const last = open.get(slot);
      if (last && last.kind === kind && last.request === request && last.end === step.start) last.end = step.end;
      else {
        const begun = { slot, kind, request, start: step.start, end: step.end };
        open.set(slot, begun);
        done.push(begun);
      }
    }
  }
  return done;
}

function draw(schedule, chosen, until) {
  const canvas = document.getElementById(schedule.policy), style = getComputedStyle(document.documentElement);
  const scale = window.devicePixelRatio || 1, { width, height } = canvas.getBoundingClientRect();
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d"), colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const ticks = 16, row = (height - ticks) / chosen.slots, at = (ns) => (ns / until) * width;
  pen.scale(scale, scale);
  pen.clearRect(0, 0, width, height);
  const looks = { prompt: [colour("ink"), 1], long: [colour(schedule.policy), 1], short: [colour(schedule.policy), 0.45], held: [colour("held"), 1] };
  for (const part of stretches(schedule, (i) => i % chosen.every === 0)) {
    const [fill, alpha] = looks[part.kind];
    pen.globalAlpha = alpha;
    pen.fillStyle = fill;
    const gap = row > 3 ? 1 : 0, left = at(part.start), wide = Math.max(at(part.end) - left - (row > 3 ? 0.5 : 0), 0.5);
    pen.fillRect(left, part.slot * row, wide, row - gap);
    if (part.kind === "held" && row > 3) {
      pen.strokeStyle = colour("rim");
      pen.lineWidth = 0.5;
      pen.strokeRect(left + 0.25, part.slot * row + 0.25, Math.max(wide - 0.5, 0), row - gap - 0.5);
    }
  }
  pen.globalAlpha = 1;
  pen.strokeStyle = colour("ink");
  pen.lineWidth = 1.5;
  pen.beginPath();
  pen.moveTo(Math.min(at(schedule.duration), width - 1), 0);
  pen.lineTo(Math.min(at(schedule.duration), width - 1), height - ticks);
  pen.stroke();
  pen.strokeStyle = colour("rule");
  pen.strokeRect(0.5, 0.5, width - 1, height - ticks - 1);
  pen.fillStyle = colour("quiet");
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "bottom";
  pen.fillText("0", 0, height);
  const end = `done after ${seconds(schedule.duration)}`, size = pen.measureText(end).width;
  pen.fillText(end, Math.max(Math.min(at(schedule.duration), width) - size, 12), height);
  canvas.setAttribute("aria-label", `Slots over time, ${schedule.policy} batching: ${schedule.steps.length} steps, ${end}.`);
}

function answer(fixed, continuous, timed) {
  if (timed) {
    return `The mean time to the first token is ${seconds(continuous.meanTtft)} with continuous batching and ${seconds(fixed.meanTtft)} with static batching.`;
  }
  const ratio = fixed.duration / continuous.duration, shown = ratio.toFixed(2);
  if (shown === "1.00") return "Continuous batching is as fast as static batching.";
  if (ratio < 1) return `Continuous batching takes ${(1 / ratio).toFixed(2)} times as long as static batching.`;
  return `Continuous batching is ${shown} times as fast as static batching.`;
}

function why(fixed, continuous, chosen) {
  const share = fixed.finishedSlotSteps / (fixed.steps.length * chosen.slots);
  const parts = [`With static batching, ${(100 * share).toFixed(0)} % of all slot steps belong to requests that are already done.`];
  if (share < 0.005) parts[0] = "With static batching, no slot waits for a longer request.";
  parts.push(`Continuous batching takes ${number(continuous.steps.length)} steps instead of ${number(fixed.steps.length)}.`);
  return parts.join(" ");
}

function cell(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function show() {
  const chosen = settings();
  for (const label of form.querySelectorAll("label")) {
    const input = label.querySelector("input"), output = label.querySelector("output");
    if (input) output.textContent = (SHOWN[input.name] || String)(Number(input.value));
  }
  const [fixed, continuous] = schedules(chosen), timed = rateOf(chosen.rate) > 0;
  document.getElementById("answer").textContent = answer(fixed, continuous, timed);
  document.getElementById("why").textContent = why(fixed, continuous, chosen);
  const until = Math.max(fixed.duration, continuous.duration);
  for (const schedule of [fixed, continuous]) draw(schedule, chosen, until);
  const body = document.getElementById("figures");
  body.replaceChildren(...ROWS.map(([name, key, text]) => {
    const row = document.createElement("tr"), of = (one) => (key === "steps" ? one.steps.length : one[key]);
    const ratio = of(fixed) ? `${(of(continuous) / of(fixed)).toFixed(2)}×` : "";
    row.append(cell("th", name), cell("td", text(of(fixed))), cell("td", text(of(continuous))), cell("td", ratio));
    return row;
  }));
  const words = [
    `batchbench simulate -b ${chosen.slots} -n ${chosen.count} --long-every ${chosen.every}`,
    `--long-tokens ${chosen.long} --short-tokens ${chosen.short} --prompt-tokens ${chosen.prompt}`,
    ...(timed ? [`--request-rate ${rateOf(chosen.rate)}`] : []),
    ...(chosen.prefill === "separate" ? ["--prefill separate"] : []),
  ];
  const command = document.getElementById("command");
  command.replaceChildren("The same on the command line, where every step costs 1 ms: ", cell("code", words.join(" ")));
}

// In the documentation the page follows the reader's choice of light or dark.
function follow() {
  let theme = "auto";
  try {
    theme = window.parent.document.body.dataset.theme || "auto";
  } catch {
    // the parent is another site
  }
  const dark = theme === "dark" || (theme !== "light" && window.matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.classList.toggle("dark", dark);
  show();
}

form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(show));
window.addEventListener("resize", show);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", follow);
try {
  new MutationObserver(follow).observe(window.parent.document.body, { attributeFilter: ["data-theme"] });
} catch {
  // the parent is another site
}
follow();
