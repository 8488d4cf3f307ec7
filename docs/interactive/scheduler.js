// A port of batchbench's scheduler: static and continuous batching, step by step. Times are whole
// nanoseconds. tests/test_interactive.py compares every step with batchbench's own.
"use strict";

(function () {
  // A policy decides which waiting requests join, and which finished requests give up their slots.
  // `admit` returns how many of the queue's first requests join, and when to ask again.
  const POLICIES = {
    static: {
      admit(view) {
        if (view.running > 0) return [0, null];
        if (view.waiting.length < view.free) {
          const closes = view.waiting[0].due + view.maxWait;
          if (view.now < closes) return [0, closes];
        }
        return [Math.min(view.waiting.length, view.free), null];
      },
      releases: (view) => view.running === 0,
    },
    continuous: {
      admit: (view) => [Math.min(view.waiting.length, view.free), null],
      releases: () => true,
    },
  };

  function costOf(cost, rows, chunks) {
    let time = cost.step + cost.row * rows;
    for (const chunk of chunks) time += cost.prompt * (chunk.stop - chunk.start);
    return Math.max(time, 1);
  }

  /**
   * Serve requests and return every step.
   *
   * requests: [{prompt, output, due}], in the order of `due` (ns); all lengths at least 1.
   * options: policy ("static" or "continuous"), slots, prefill ("separate" or "mixed"), budget (most
   *   tokens of a mixed pass), maxWait (ns), cost {step, row, prompt} (ns per step, per decoding row
   *   and per prompt token).
   * A step is {start, end, chunks: [{request, slot, start, stop}], rows: [{request, slot, grows}],
   *   waiting}; a row that does not grow belongs to a finished request that holds its slot.
   */
  function serve(requests, options) {
    const { policy, slots, prefill = "separate", budget = 2048, maxWait = 0, cost } = options;
    const decides = POLICIES[policy];
    const occupant = new Array(slots).fill(null); // {request, left, prompt: tokens computed}
    const queue = [];
    const newcomers = []; // slots whose prompt is not fully computed, in the order of admission
    const steps = [];
    let now = 0, arrived = 0, begin = 0;

    const held = () => occupant.filter((one) => one !== null);
    const view = () => ({
      now, maxWait,
      waiting: queue.slice(begin),
      free: occupant.filter((one) => one === null).length,
      running: held().filter((one) => one.left > 0).length,
    });

    function admit() {
      const state = view();
      if (!state.waiting.length || !state.free) return null;
      const [count, askAgain] = decides.admit(state);
      for (let i = 0; i < count; i++) {
        const slot = occupant.indexOf(null); // the lowest free slot
        const request = queue[begin++];
        occupant[slot] = { request: request.index, left: request.output, prompt: 0, size: request.prompt };
        newcomers.push(slot);
      }
      return askAgain;
    }

    function nextChunks(decoding) {
      let room = prefill === "mixed" ? budget - decoding : Infinity;
      const chunks = [];
      for (const slot of newcomers) {
        const { request, prompt, size } = occupant[slot];
        const stop = prompt + Math.min(room, size - prompt);
        chunks.push({ request, slot, start: prompt, stop });
        room -= stop - prompt;
        if (room <= 0) break;
      }
      return chunks;
    }

    for (;;) {
      while (arrived < requests.length && requests[arrived].due <= now) {
        queue.push({ ...requests[arrived], index: arrived++ });
      }
      if (decides.releases(view())) {
        for (let slot = 0; slot < slots; slot++) if (occupant[slot]?.left === 0) occupant[slot] = null;
      }
      const askAgain = admit();
      let rows = [];
      occupant.forEach((one, slot) => {
        if (one !== null && one.prompt === one.size) rows.push({ request: one.request, slot, grows: one.left > 0 });
      });
      const chunks = nextChunks(rows.length);
      if (chunks.length && prefill === "separate") rows = [];
      if (!chunks.length && !rows.some((row) => row.grows)) {
        const times = [askAgain, requests[arrived]?.due].filter((time) => time != null);
        if (!times.length) return steps;
        now = Math.max(now, Math.min(...times));
        continue;
      }
      const end = now + costOf(cost, rows.length, chunks);
      steps.push({ start: now, end, chunks, rows, waiting: queue.length - begin });
      now = end;
      for (const row of rows) if (row.grows) occupant[row.slot].left -= 1;
      for (const chunk of chunks) {
        const one = occupant[chunk.slot];
        one.prompt = chunk.stop;
        if (one.prompt === one.size) {
          one.left -= 1; // the last piece of a prompt yields the first token
          newcomers.shift();
        }
      }
    }
  }

  /** Return what the steps of one policy amount to; times in ns. */
  function summarise(requests, steps, slots) {
    const first = new Array(requests.length), last = new Array(requests.length);
    let useful = 0, held = 0;
    for (const step of steps) {
      for (const row of step.rows) {
        if (!row.grows) { held += 1; continue; }
        useful += 1;
        last[row.request] = step.end;
      }
      for (const chunk of step.chunks) {
        if (chunk.stop < requests[chunk.request].prompt) continue;
        useful += 1;
        first[chunk.request] = last[chunk.request] = step.end;
      }
    }
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const duration = steps.length ? steps[steps.length - 1].end : 0;
    const latencies = last.map((end, i) => end - requests[i].due).sort((a, b) => a - b);
    const place = 0.99 * (latencies.length - 1), below = Math.floor(place);
    const above = latencies[Math.min(below + 1, latencies.length - 1)];
    return {
      steps: steps.length,
      duration,
      tokens: useful,
      utilisation: steps.length ? useful / (steps.length * slots) : 0,
      finishedSlotSteps: held,
      meanTtft: mean(first.map((end, i) => end - requests[i].due)),
      meanLatency: mean(latencies),
      p99Latency: latencies[below] + (place - below) * (above - latencies[below]),
    };
  }

  /** A small generator of numbers in [0, 1): mulberry32. */
  function generator(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /**
   * Return the classic workload: every `every`th request is long, the first included. With a rate
   * (requests/s) they form a Poisson process, scaled so that the run has exactly this rate.
   */
  function classic({ count, every, long, short, prompt, rate = 0, seed = 0 }) {
    const random = generator(seed);
    const times = [0];
    for (let i = 1; i < count; i++) times.push(times[i - 1] - Math.log1p(-random()));
    const scale = rate > 0 && count > 1 ? ((count - 1) / rate / times[count - 1]) * 1e9 : 0;
    return times.map((time, i) => ({
      prompt, output: i % every === 0 ? long : short, due: Math.round(time * scale),
    }));
  }

  const batching = { serve, summarise, classic };
  if (typeof module !== "undefined") module.exports = batching;
  else globalThis.batching = batching;
})();
