"use strict";
// Histograms of a chosen tensor, tooltips, sorting and filtering of tables.
(() => {
  const SVG = "http://www.w3.org/2000/svg";

  const svg = (name, attributes, text) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Round numbers between two: multiples of 1, 2 or 5 times a power of ten.
  const ticks = (low, high, most) => {
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * (1 - 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  };

  const short = (value) => Number(value.toPrecision(4)).toString();

  // Counts on a logarithmic scale over the values; what the chosen range does not cover is shaded.
  const histogram = (figure, tensor) => {
    const last = tensor.first + tensor.counts.length;
    const low = Math.min(tensor.first * tensor.width, tensor.low);
    const high = Math.max(last * tensor.width, tensor.high);
    const right = (x) => `${(100 * (x - low)) / (high - low)}%`;
    const top = Math.log10(Math.max(...tensor.counts) + 1) || 1;
    const drawing = svg("svg", { width: "100%", height: "100%", overflow: "visible", role: "img" });
    drawing.setAttribute("aria-label", `Histogram of ${tensor.name}, clipped to ${short(tensor.low)} … ${short(tensor.high)}`);
    const shade = (from, to) => {
      if (to > from) drawing.append(svg("rect", { x: right(from), y: 0, width: `${(100 * (to - from)) / (high - low)}%`, height: "100%", class: "clip" }));
    };
    shade(low, tensor.low);
    shade(tensor.high, high);
    for (let k = 0; k <= top; k += Math.max(1, Math.ceil(top / 5))) {
      const y = `${100 - (100 * k) / top}%`;
      drawing.append(svg("line", { x1: 0, x2: "100%", y1: y, y2: y, class: "grid" }));
      drawing.append(svg("text", { x: 0, dx: -8, y, dy: 4, "text-anchor": "end" }, k < 4 ? String(10 ** k) : `10^${k}`));
    }
    tensor.counts.forEach((count, i) => {
      if (!count) return;
      const height = Math.max((100 * Math.log10(count + 1)) / top, 0.5);
      const x = (tensor.first + i) * tensor.width;
      const bar = { x: right(x), y: `${100 - height}%`, width: `${(100 * tensor.width) / (high - low)}%`, height: `${height}%`, class: "count" };
      const element = svg("rect", bar);
      element.dataset.tip = `${short(x)} … ${short(x + tensor.width)}\n${count.toLocaleString("en")} values`;
      drawing.append(element);
    });
    for (const x of ticks(low, high, figure.clientWidth < 500 ? 4 : 8)) {
      drawing.append(svg("text", { x: right(x), y: "100%", dy: 16, "text-anchor": "middle" }, short(x)));
    }
    for (const x of [tensor.low, tensor.high]) {
      drawing.append(svg("line", { x1: right(x), x2: right(x), y1: 0, y2: "100%", class: "edge" }));
    }
    const frame = document.createElement("div");
    frame.className = "frame";
    frame.append(drawing);
    const title = (text, more) => {
      const line = document.createElement("div");
      line.className = `axis-title ${more}`;
      line.textContent = text;
      return line;
    };
    figure.replaceChildren(title("count (logarithmic)", ""), frame, title("value", "x"));
  };

  const facts = (list, tensor) => {
    const middle = (i) => (tensor.first + i + 0.5) * tensor.width;
    const total = tensor.counts.reduce((sum, n) => sum + n, 0);
    const outside = tensor.counts.reduce((sum, n, i) => sum + (middle(i) < tensor.low || middle(i) > tensor.high ? n : 0), 0);
    const rows = [
      ["chosen range", `${short(tensor.low)} … ${short(tensor.high)}`],
      ["observed range", `${short(tensor.min)} … ${short(tensor.max)}, ${total.toLocaleString("en")} values`],
      ["clipped", `about ${short((100 * outside) / total)} % of the values`],
    ];
    list.replaceChildren(...rows.flatMap(([key, value]) => {
      const term = document.createElement("dt");
      const told = document.createElement("dd");
      term.textContent = key;
      told.textContent = value;
      return [term, told];
    }));
  };

  const data = document.getElementById("range-data");
  if (data) {
    const tensors = JSON.parse(data.textContent);
    const chooser = document.getElementById("tensor");
    const show = () => {
      histogram(document.getElementById("histogram"), tensors[chooser.value]);
      facts(document.getElementById("range-facts"), tensors[chooser.value]);
    };
    chooser.addEventListener("change", show);
    document.querySelectorAll("[data-step]").forEach((button) => button.addEventListener("click", () => {
      chooser.value = (Number(chooser.value) + Number(button.dataset.step) + tensors.length) % tensors.length;
      show();
    }));
    show();
  }

  const tip = document.getElementById("tip");
  const hint = (event) => {
    const text = event.target.dataset?.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const room = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - room.width - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - room.height - 8))}px`;
  };
  document.addEventListener("pointermove", hint);
  document.addEventListener("pointerdown", hint);

  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    const value = (row, i) => {
      const text = row.cells[i].textContent;
      const number = parseFloat(text.replaceAll(",", ""));
      return Number.isNaN(number) ? text : number;
    };
    table.querySelectorAll("thead th").forEach((head, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const order = (a, b) => {
          const [x, y] = [value(a, i), value(b, i)];
          if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // text, such as a dash, goes last
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  });

  document.querySelectorAll("[data-filter]").forEach((input) => {
    const table = document.querySelector(`table.${input.dataset.filter}`);
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  });
})();
