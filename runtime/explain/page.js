"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const length = data.chunks[0].actions.length;
const dimensions = data.names.map((_, dimension) => dimension);
const hasPath = data.names.length >= 3;

// Numbers and words ---------------------------------------------------------------------------------------------------

function number(value) {
  if (value === 0 || Math.abs(value) >= 0.001) return String(Number(value.toPrecision(3)));
  return value.toExponential(1).replace("e-", "e−");
}

function counted(amount, noun) {
  return `${amount} ${amount === 1 ? noun.replace(/s$/, "") : noun}`;
}

// Drawing -------------------------------------------------------------------------------------------------------------

/** An element with attributes and children; text is never read as markup. svg: whether it is one of a drawing. */
function make(name, attributes = {}, children = [], svg = false) {
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...[children].flat());
  return element;
}

const draw = (name, attributes, children = []) => make(name, attributes, children, true);
const line = (kind, points) =>
  draw("polyline", { class: kind, points: points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ") });
const words = (x, y, text, anchor = "start") => draw("text", { x, y, "text-anchor": anchor }, text);
const dots = (kind, points) => points.map(([cx, cy]) => draw("circle", { class: kind, cx, cy, r: 2.5 }));

/** Fill a drawing whose text keeps its size, however wide it is. draw: gives its parts for a width. */
function fill(svg, height, label, parts) {
  const width = svg.clientWidth || 300;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", label);
  svg.replaceChildren(...parts(width).flat());
}

function scale(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low)) * (to - from);
}

/** The samples of lines beside their names. */
function legend(id, entries) {
  at(id).replaceChildren(
    ...entries.map(([kind, text]) => {
      const shape =
        kind === "band"
          ? draw("rect", { class: kind, width: 30, height: 12 })
          : line(kind, [
              [0, 6],
              [30, 6],
            ]);
      return make("span", {}, [draw("svg", { viewBox: "0 0 30 12", "aria-hidden": "true" }, shape), text]);
    }),
  );
}

// What is shown -------------------------------------------------------------------------------------------------------

function column(rows, dimension) {
  return rows.map((row) => row[dimension]);
}

/** One dimension: recorded, decoded, the class's mean, and the band that the decoded values must stay in. */
function curve(svg, chunk, prefix, dimension) {
  const recorded = column(chunk.actions, dimension);
  const decoded = column(chunk.decoded[prefix], dimension);
  const mean = data.classes[chunk.class_number]?.mean;
  const bound = data.bounds[data.prefixes[prefix]];
  // Of all prefixes, so that the axis stands still while the slider moves.
  const all = [chunk.actions, ...chunk.decoded, mean ?? []].flatMap((rows) => column(rows, dimension));
  const least = 0.02 * data.units[dimension];
  const middle = (Math.min(...all) + Math.max(...all)) / 2;
  const reach = 1.1 * Math.max(least, Math.max(...all) - middle);
  fill(
    svg,
    120,
    `${data.names[dimension]}: recorded ${recorded.map(number)}; decoded ${decoded.map(number)}`,
    (width) => {
      const x = scale(0, Math.max(1, length - 1), 60, width - 8);
      const y = scale(middle - reach, middle + reach, 102, 8);
      const inside = (value) => Math.min(102, Math.max(8, y(value)));
      const points = (values) => values.map((value, step) => [x(step), y(value)]);
      const parts = [
        line("axis", [
          [60, 8],
          [60, 102],
          [width - 8, 102],
        ]),
      ];
      for (const value of [middle - reach / 1.1, middle, middle + reach / 1.1]) {
        parts.push(words(54, y(value) + 4, number(value), "end"));
      }
      parts.push(words(60, 117, "step 0"), words(width - 8, 117, String(length - 1), "end"));
      if (bound !== undefined) {
        const [low, high] = [data.low[dimension], data.high[dimension]];
        const edge = (sign) =>
          recorded.map((value, step) => {
            const clipped = Math.min(high, Math.max(low, value));
            return [x(step), inside(clipped + sign * bound * data.units[dimension])];
          });
        const ring = [...edge(1), ...edge(-1).reverse()].map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`);
        parts.push(draw("polygon", { class: "band", points: ring.join(" ") }));
      }
      if (mean)
        parts.push(
          line(
            "mean",
            column(mean, dimension).map((value, step) => [x(step), y(value)]),
          ),
        );
      parts.push(line("true", points(recorded)), ...dots("true-dot", points(recorded)));
      parts.push(line("decoded", points(decoded)), ...dots("decoded-dot", points(decoded)));
      return parts;
    },
  );
}

/** Where the first three dimensions lead, added up: [x, y, z] before the first step and behind each. */
function walk(rows) {
  const places = [[0, 0, 0]];
  for (const row of rows) places.push([0, 1, 2].map((axis) => places.at(-1)[axis] + row[axis]));
  return places;
}

/** The third dimension up, the others to the lower right and lower left. */
function project([x, y, z]) {
  return [(x - y) * Math.cos(Math.PI / 6), (x + y) / 2 - z];
}

function path(svg, chunk, prefix) {
  const recorded = walk(chunk.actions).map(project);
  const decodings = chunk.decoded.map((rows) => walk(rows).map(project));
  const all = [...recorded, ...decodings.flat()];
  const [left, top] = [0, 1].map((axis) => Math.min(...column(all, axis)));
  const [right, bottom] = [0, 1].map((axis) => Math.max(...column(all, axis)));
  const ends = [chunk.actions, chunk.decoded[prefix]].map((rows) => walk(rows).at(-1));
  const [end, decodedEnd] = ends.map((place) => place.map(number).join(", "));
  const apart = Math.hypot(...[0, 1, 2].map((axis) => ends[0][axis] - ends[1][axis]));
  const off = data.position_unit ? `${number(1000 * data.position_unit * apart)} mm` : number(apart);
  at("path-end").textContent = `The decoded path ends ${off} off.`;
  fill(svg, 300, `The path ends at ${end} as recorded, at ${decodedEnd} as decoded`, (width) => {
    const size = Math.max(right - left, bottom - top, 1e-9);
    const zoom = Math.min(
      (width - 40) / Math.max(right - left, size * 1e-6),
      250 / Math.max(bottom - top, size * 1e-6),
    );
    const place = ([x, y]) => [width / 2 + (x - (left + right) / 2) * zoom, 150 + (y - (top + bottom) / 2) * zoom];
    const corner = ([x, y]) => [70 + 26 * x, 245 + 26 * y];
    const axes = [
      [1, 0, 0],
      [0, 1, 0],
      [0, 0, 1],
    ].flatMap((direction, axis) => {
      const [x, y] = corner(project(direction.map((value) => value * 1.45)));
      const name = words(x, y + 4, data.names[axis].slice(0, 12), "middle");
      return [line("axis", [corner([0, 0]), corner(project(direction))]), name];
    });
    const [x, y] = place(recorded[0]);
    const decoded = decodings[prefix].map(place);
    return [
      ...axes,
      line("true", recorded.map(place)),
      line("decoded", decoded),
      ...dots("decoded-dot", decoded.slice(1)),
      draw("circle", { class: "true", cx: x, cy: y, r: 5 }),
      words(x + 9, y - 7, "start"),
    ];
  });
}

/** Error against the number of tokens: of this chunk, and of all that were counted. */
function errors(svg, chunk, prefix) {
  const series = [
    ["p99", data.p99],
    ["median", data.median],
    ["decoded", chunk.rms],
  ];
  const values = series.flatMap(([, rows]) => rows).filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...values, 1)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...values, 1e-9))));
  const last = data.prefixes.at(-1);
  const label =
    `RMS error of this chunk ${number(chunk.rms[prefix])}, of half of all below ` +
    `${number(data.median[prefix])}, of 99 % below ${number(data.p99[prefix])}`;
  fill(svg, 260, label, (width) => {
    const x = scale(0, last, 52, width - 12);
    const y = scale(low, high, 222, 10);
    const points = (rows) =>
      rows.map((value, index) => [x(data.prefixes[index]), y(Math.log10(Math.max(value, 10 ** low)))]);
    const parts = [];
    for (let power = low; power <= high; power += 1) {
      parts.push(
        line("axis", [
          [52, y(power)],
          [width - 12, y(power)],
        ]),
      );
      parts.push(
        words(46, y(power) + 4, power < -3 ? `1e−${-power}` : String(Number((10 ** power).toPrecision(1))), "end"),
      );
    }
    const step = Math.max(1, Math.ceil(last / 9 / 5) * 5) * (last < 10 ? 1 / 5 : 1);
    for (let tick = 0; tick <= last; tick += Math.max(1, step)) parts.push(words(x(tick), 238, String(tick), "middle"));
    parts.push(words((52 + width) / 2, 255, data.unit, "middle"));
    const now = x(data.prefixes[prefix]);
    parts.push(
      line("now", [
        [now, 10],
        [now, 222],
      ]),
    );
    for (const [kind, rows] of series) parts.push(line(kind, points(rows)));
    parts.push(...dots("decoded-dot", [points(chunk.rms)[prefix]]));
    return parts;
  });
}

/** The mean of a class: a row of bars for each dimension, one bar a step, against the largest action of the data. */
function classPicture(svg, shown) {
  const row = 26;
  fill(svg, row * data.names.length, `mean of the class: ${shown.words}`, (width) => {
    const x = scale(0, length, 90, width);
    return dimensions.flatMap((dimension) => {
      const zero = row * dimension + row / 2;
      const bars = column(shown.mean, dimension).map((value, step) => {
        const share = Math.max(-1, Math.min(1, value / (data.largest[dimension] || 1)));
        const height = Math.abs(share) * (row / 2 - 2);
        const bar = { class: "bar", x: x(step) + 1, width: Math.max(1, x(1) - x(0) - 2), height };
        return draw("rect", { ...bar, y: share > 0 ? zero - height : zero });
      });
      const name = words(0, zero + 4, data.names[dimension].slice(0, 12));
      return [
        name,
        ...bars,
        line("zero", [
          [90, zero],
          [width, zero],
        ]),
      ];
    });
  });
}

// The page ------------------------------------------------------------------------------------------------------------

function facts(chunk, prefix) {
  const bound = data.bounds[data.prefixes[prefix]];
  const entries = [
    ["Bits a step", number(data.bits[prefix])],
    ["RMS error, normalised", number(chunk.rms[prefix])],
    ["Largest error, normalised", number(chunk.largest[prefix])],
  ];
  if (chunk.position_mm) entries.push(["Mean position error", `${number(chunk.position_mm[prefix])} mm`]);
  if (Object.keys(data.bounds).length) {
    entries.push(["Bound of any error, normalised", bound === undefined ? "none here" : number(bound)]);
  }
  at("facts").replaceChildren(
    ...entries.map(([name, value]) => make("div", {}, [make("dt", {}, name), make("dd", {}, value)])),
  );
}

function tokens(chunk, prefix) {
  const used = data.prefixes[prefix];
  const cells = Array.from({ length: data.prefixes.at(-1) }, (_, index) => chunk.tokens[index] ?? `L${index}`);
  at("tokens").setAttribute(
    "aria-label",
    `${used} of ${counted(cells.length, data.unit)} used: ${cells.slice(0, used)}`,
  );
  at("tokens").replaceChildren(
    ...cells.map((text, index) => make("span", index < used ? { class: "used" } : {}, String(text))),
  );
}

function classPanel(chunk) {
  const shown = data.classes[chunk.class_number];
  at("class").hidden = !shown;
  if (!shown) return;
  const share = shown.share < 0.001 ? "under 0.1" : number(100 * shown.share);
  at("class-title").textContent = `Class ${chunk.class_number}, named by token 0`;
  at("class-words").textContent =
    `${share} % of the chunks in the data. ${shown.mean ? "Its mean" : "Escape"}: ${shown.words}.`;
  for (const id of ["class-picture", "class-note"]) at(id).toggleAttribute("hidden", !shown.mean);
  if (shown.mean) classPicture(at("class-picture"), shown);
}

function curves(chunk, prefix) {
  at("curves")
    .querySelectorAll("svg")
    .forEach((svg, dimension) => curve(svg, chunk, prefix, dimension));
  at("curves")
    .querySelectorAll("figcaption")
    .forEach((caption, dimension) => {
      const squares = chunk.actions.map((row, step) => (row[dimension] - chunk.decoded[prefix][step][dimension]) ** 2);
      const rms = Math.sqrt(squares.reduce((sum, value) => sum + value, 0) / length);
      caption.replaceChildren(make("b", {}, data.names[dimension]), `  RMS error ${number(rms)}`);
    });
}

function show() {
  const chunk = data.chunks[at("chunk").value];
  const prefix = Number(at("amount").value);
  const used = data.prefixes[prefix];
  const said = `${used} of ${counted(data.prefixes.at(-1), data.unit)}, ${number(data.bits[prefix])} bits a step`;
  at("amount").setAttribute("aria-valuetext", said);
  at("said").textContent =
    `${said}. RMS error of this chunk ${number(chunk.rms[prefix])}; half of all chunks are below ` +
    `${number(data.median[prefix])}, 99 % below ${number(data.p99[prefix])}.`;
  facts(chunk, prefix);
  tokens(chunk, prefix);
  classPanel(chunk);
  curves(chunk, prefix);
  if (hasPath) path(at("path"), chunk, prefix);
  errors(at("errors"), chunk, prefix);
}

function setUp() {
  const groups = new Map();
  data.chunks.forEach((chunk, index) => {
    const name = `Episode ${chunk.episode}`;
    if (!groups.has(name)) groups.set(name, make("optgroup", { label: name }));
    const steps = length === 1 ? `step ${chunk.step}` : `steps ${chunk.step} to ${chunk.step + length - 1}`;
    groups.get(name).append(make("option", { value: index }, `${name}, ${steps}`));
  });
  at("chunk").replaceChildren(...groups.values());
  at("amount").max = data.prefixes.length - 1;
  const bounded = data.prefixes.flatMap((prefix, index) => (prefix in data.bounds ? [index] : []));
  at("marks").replaceChildren(...bounded.map((index) => make("option", { value: index })));
  at("amount").value = bounded[0] ?? 0;
  at("curves").replaceChildren(
    ...dimensions.map(() => make("figure", {}, [make("figcaption"), draw("svg", { role: "img" })])),
  );
  const lines = [
    ["true", "recorded"],
    ["decoded", "decoded"],
  ];
  const more = [];
  if (Object.values(data.classes).some((shown) => shown.mean)) more.push(["mean", "mean of the class"]);
  if (bounded.length)
    more.push(["band", `bound, at ${bounded.map((index) => data.prefixes[index]).join(", ")} ${data.unit}`]);
  legend("curves-legend", [...lines, ...more]);
  legend("path-legend", lines);
  legend("errors-legend", [
    ["decoded", "RMS of this chunk"],
    ["median", "half of all are below"],
    ["p99", "99 % are below"],
  ]);
  at("path-section").hidden = !hasPath;
  at("path-note").textContent =
    `The first three dimensions (${data.names.slice(0, 3).join(", ")}), added up step by ` +
    "step. Where they are changes of position, this is the way of the gripper.";
  for (const name of ["amount", "chunk"]) at(name).addEventListener("input", show);
  new ResizeObserver(() => requestAnimationFrame(show)).observe(document.body);
  show();
}

setUp();
