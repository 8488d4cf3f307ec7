"use strict";
document.documentElement.classList.add("js");

(() => {
  const tip = document.querySelector(".tip");

  // Times are microseconds since the start of the trial.
  function spell(micro) {
    const [size, name] = micro >= 1e6 ? [1e6, "s"] : micro >= 1e3 ? [1e3, "ms"] : [1, "\u00b5s"];
    return `${(micro / size).toLocaleString("en", { maximumSignificantDigits: 4 })} ${name}`;
  }

  function rows(bars, i) {
    const [due, came, first, done, freed] = ["due", "admitted", "first", "done", "freed"].map((c) => bars[c][i]);
    const details = [
      ["slot", bars.slot[i]],
      ["prompt", `${bars.prompt[i].toLocaleString("en")} tokens`],
      ["output", `${bars.output[i].toLocaleString("en")} tokens`],
      ["due", spell(due)],
      ["queued", spell(Math.max(0, came - due))],
      ["prefill", spell(first - came)],
      ["decode", spell(done - first)],
    ];
    if (freed > done) details.push(["slot held when done", spell(freed - done)]);
    details.push(["TTFT", spell(first - due)], ["E2E latency", spell(done - due)], ["done at", spell(done)]);
    return details;
  }

  function nice(span, most) {
    const rough = span / most, size = 10 ** Math.floor(Math.log10(rough));
    return size * [1, 2, 5, 10].find((m) => size * m >= rough * (1 - 1e-9));
  }

  // The last label must not stand out over the edge of the page. Of two that would touch, the later
  // one is shown; the other keeps its mark.
  function settle(axis) {
    const labels = [...axis.querySelectorAll("span")].reverse();
    labels.forEach((label, n) => label.classList.toggle("last", n === 0 && labels.length > 1 && parseFloat(label.style.left) > 92));
    let free = Infinity;
    labels.forEach((label) => {
      const box = label.getBoundingClientRect(), crowded = box.right + 8 > free;
      label.classList.toggle("crowded", crowded);
      if (!crowded) free = box.left;
    });
  }

  function begin(group) {
    const whole = Number(group.dataset.window), unit = Number(group.dataset.unit);
    const section = group.closest("section"), details = section.querySelector(".details");
    const axis = group.querySelector(".ticks");
    let from = 0, to = whole, chosen = null;

    const charts = [...group.querySelectorAll(".chart")].map((element) => {
      const bars = JSON.parse(element.querySelector("script").textContent);
      const bySlot = Array.from({ length: Number(element.dataset.rows) }, () => []);
      bars.request.forEach((_, i) => bySlot[bars.slot[i]].push(i));
      bySlot.forEach((slot) => slot.sort((a, b) => bars.admitted[a] - bars.admitted[b]));
      return { element, bars, bySlot, svg: element.querySelector("svg"), mark: element.querySelector(".mark"), end: element.querySelector(".end") };
    });

    function place() {
      charts.forEach((chart) => {
        chart.svg.setAttribute("viewBox", `${(from / whole) * 1e4} 0 ${((to - from) / whole) * 1e4} 10000`);
        if (chart.end) {
          const at = (chart.end.dataset.at * whole - from) / (to - from);
          chart.end.hidden = at < 0 || at > 1.001;
          chart.end.style.left = `${at * 100}%`;
        }
        const i = chosen && chosen.chart === chart ? chosen.i : null;
        chart.mark.hidden = i === null;
        if (i !== null) {
          const left = Math.max(0, (chart.bars.admitted[i] - from) / (to - from));
          const right = Math.min(1, (chart.bars.freed[i] - from) / (to - from));
          chart.mark.hidden = right < left;
          const height = 100 / chart.bySlot.length;
          Object.assign(chart.mark.style, { left: `${left * 100}%`, width: `max(4px, ${(right - left) * 100}%)`, top: `${chart.bars.slot[i] * height}%`, height: `${height}%` });
        }
      });
    }

    function scale() {
      const step = nice((to - from) / unit, 5), labels = [];
      const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
      for (let n = Math.ceil(from / unit / step - 1e-9); n * step * unit <= to * (1 + 1e-9); n++) labels.push(n * step);
      axis.replaceChildren(...labels.map((value, n) => {
        const label = document.createElement("span");
        const text = value === 0 ? "0" : value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
        label.textContent = n === labels.length - 1 ? `${text} ${group.dataset.unitName}` : text;
        label.style.left = `${((value * unit - from) / (to - from)) * 100}%`;
        return label;
      }));
      settle(axis);
    }

    function zoom(factor, centre) {
      const span = Math.min(whole, Math.max(whole / 2000, (to - from) * factor));
      const share = (centre - from) / (to - from);
      from = Math.min(Math.max(0, centre - share * span), whole - span);
      to = from + span;
      place();
      scale();
    }

    function middle() {
      return chosen ? chosen.chart.bars.admitted[chosen.i] : (from + to) / 2;
    }

    function say(chart, i) {
      details.textContent = `${chart.element.dataset.name}, request ${chart.bars.request[i].toLocaleString("en")}: ${rows(chart.bars, i).map((row) => row.join(" ")).join(" \u00b7 ")}`;
    }

    function choose(chart, i) {
      chosen = { chart, i };
      const { admitted, freed } = chart.bars;
      if (freed[i] < from || admitted[i] > to) {
        const span = to - from;
        from = Math.min(Math.max(0, admitted[i] - span / 4), whole - span);
        to = from + span;
        scale();
      }
      say(chart, i);
      place();
    }

    function clear() {
      chosen = null;
      tip.hidden = true;
      place();
    }

    function under(chart, event) {
      const box = chart.element.getBoundingClientRect();
      const time = from + ((event.clientX - box.left) / box.width) * (to - from);
      const slot = Math.floor(((event.clientY - box.top) / box.height) * chart.bySlot.length);
      const near = ((to - from) / box.width) * 3;
      let best = null, distance = near;
      for (const i of chart.bySlot[slot] || []) {
        const gap = Math.max(chart.bars.admitted[i] - time, time - chart.bars.freed[i], 0);
        if (gap < distance) [best, distance] = [i, gap];
      }
      return best;
    }

    function show(chart, i, event) {
      const head = document.createElement("b");
      head.textContent = `${chart.element.dataset.name}: request ${chart.bars.request[i].toLocaleString("en")}`;
      tip.replaceChildren(head, ...rows(chart.bars, i).map(([name, value]) => {
        const row = document.createElement("div");
        row.append(Object.assign(document.createElement("span"), { textContent: name }), Object.assign(document.createElement("span"), { textContent: value }));
        return row;
      }));
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 6))}px`;
      tip.style.top = `${event.clientY + 18 + box.height < innerHeight ? event.clientY + 18 : Math.max(4, event.clientY - box.height - 14)}px`;
    }

    function step(chart, key) {
      if (!chosen || chosen.chart !== chart) return chart.bars.request.length ? chart.bars.request.keys().next().value : null;
      const { bars, bySlot } = chart, i = chosen.i;
      const own = bySlot[bars.slot[i]], at = own.indexOf(i);
      if (key === "ArrowRight") return own[Math.min(at + 1, own.length - 1)];
      if (key === "ArrowLeft") return own[Math.max(at - 1, 0)];
      if (key === "Home") return own[0];
      if (key === "End") return own[own.length - 1];
      const way = key === "ArrowDown" ? 1 : -1;
      for (let slot = bars.slot[i] + way; bySlot[slot]; slot += way) {
        if (bySlot[slot].length) {
          return bySlot[slot].reduce((a, b) => (Math.abs(bars.admitted[b] - bars.admitted[i]) < Math.abs(bars.admitted[a] - bars.admitted[i]) ? b : a));
        }
      }
      return i;
    }

    charts.forEach((chart) => {
      const { element } = chart;
      element.addEventListener("pointermove", (event) => {
        const i = under(chart, event);
        if (i === null) return clear();
        choose(chart, i);
        show(chart, i, event);
      });
      element.addEventListener("pointerleave", clear);
      element.addEventListener("blur", clear);
      element.addEventListener("wheel", (event) => {
        if (!event.ctrlKey) return;
        event.preventDefault();
        const box = element.getBoundingClientRect();
        zoom(event.deltaY > 0 ? 1.25 : 0.8, from + ((event.clientX - box.left) / box.width) * (to - from));
      }, { passive: false });
      element.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        if (event.key === "+" || event.key === "=") zoom(0.5, middle());
        else if (event.key === "-") zoom(2, middle());
        else if (event.key === "0") zoom(Infinity, middle());
        else if (event.key === "Escape") clear();
        else if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) {
          const i = step(chart, event.key);
          if (i !== null) choose(chart, i);
        } else return;
        event.preventDefault();
      });
    });
    section.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
      zoom({ in: 0.5, out: 2, all: Infinity }[button.dataset.zoom], middle());
    }));
  }

  const settleAll = () => document.querySelectorAll(".ticks").forEach(settle);
  settleAll();
  addEventListener("resize", settleAll);
  document.querySelectorAll(".timelines").forEach(begin);
})();
