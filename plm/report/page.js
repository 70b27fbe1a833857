// The report of `plm fold`: a table of proteins, and of the chosen one its structure, pLDDT and PAE.
"use strict";

// AlphaFold's bands of pLDDT, and dark green to white for 0 Å to the largest error: as in the PNG files.
const BANDS = [[90, "#0053D6", "above 90"], [70, "#65CBF3", "70 to 90"], [50, "#FFDB13", "50 to 70"], [0, "#FF7D45", "below 50"]];
const GREENS = [[0, 68, 27], [0, 109, 44], [35, 139, 69], [65, 171, 93], [116, 196, 118], [161, 217, 155], [199, 233, 192], [229, 245, 224], [247, 252, 245]];
const CHAINS = ["#4C78A8", "#F58518", "#54A24B", "#B279A2", "#E45756", "#72B7B2", "#9D755D", "#EECA3B"];

const band = (plddt) => BANDS.find(([least]) => plddt >= least)[1];

/** From 0 to 1 to red, green and blue. */
function green(share) {
  const at = Math.min(Math.max(share, 0), 1) * (GREENS.length - 1);
  const low = Math.min(Math.floor(at), GREENS.length - 2);
  return GREENS[low].map((value, i) => Math.round(value + (at - low) * (GREENS[low + 1][i] - value)));
}

/** Bytes from base64 of what zlib made of them. */
async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** What stands in the page about one protein: text of its structure, pLDDT per residue, PAE in cells of `step` residues. */
async function decode(json) {
  const told = JSON.parse(json);
  const structure = new TextDecoder().decode(await unpack(told.structure));
  const residues = told.chains.flatMap(({ name, sequence, start }) => [...sequence].map((letter, i) => `${name} ${letter}${start + i}`));
  return { ...told, structure, residues, pae: await unpack(told.pae) };
}

/** The first residue of every chain but the first. */
function borders(protein) {
  let end = 0;
  return protein.chains.slice(0, -1).map(({ sequence }) => (end += sequence.length));
}

/** Round steps for about five numbers along an axis from 1 to `length`. */
function ticks(length) {
  const rough = length / 5, size = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const step = [1, 2, 5, 10].map((times) => times * size).find((each) => each >= rough) || 1;
  return Array.from({ length: Math.floor(length / step) }, (_, i) => (i + 1) * step);
}

const BOX = { left: 42, top: 8, bottom: 38 };

function frame(canvas, width, length) {
  const context = canvas.getContext("2d"), height = canvas.height - BOX.top - BOX.bottom;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = "#667080";
  context.textAlign = "center";
  for (const residue of ticks(length)) {
    context.fillText(residue, BOX.left + (residue - 0.5) / length * width, BOX.top + height + 14);
  }
  return [context, height];
}

function drawLine(canvas, protein) {
  const length = protein.plddt.length, width = canvas.width - BOX.left - 8;
  const [context, height] = frame(canvas, width, length);
  const x = (i) => BOX.left + (i + 0.5) / length * width, y = (value) => BOX.top + (1 - value / 100) * height;
  context.textAlign = "right";
  let top = 100;
  for (const [least, colour] of BANDS) {
    context.globalAlpha = 0.22;
    context.fillStyle = colour;
    context.fillRect(BOX.left, y(top), width, y(least) - y(top));
    context.globalAlpha = 1;
    context.fillStyle = "#667080";
    context.fillText(least, BOX.left - 6, y(least) + 4);
    top = least;
  }
  context.fillText(100, BOX.left - 6, y(100) + 8);
  context.textAlign = "center";
  context.fillText("residue", BOX.left + width / 2, canvas.height - 6);
  context.strokeStyle = "#262626";
  context.lineWidth = 1.3;
  const starts = [0, ...borders(protein), length];
  for (let chain = 0; chain + 1 < starts.length; chain++) {
    context.beginPath();
    for (let i = starts[chain]; i < starts[chain + 1]; i++) context.lineTo(x(i), y(protein.plddt[i]));
    context.stroke();
  }
  context.lineWidth = 1;
  for (const start of borders(protein)) context.strokeRect(x(start - 0.5), BOX.top, 0, height);
  return (left) => Math.floor((left - BOX.left) / width * length);
}

function drawMap(canvas, protein) {
  const length = protein.plddt.length, size = canvas.height - BOX.top - BOX.bottom;
  const [context] = frame(canvas, size, length);
  const cells = Math.ceil(length / protein.step), image = context.createImageData(cells, cells);
  protein.pae.forEach((value, i) => image.data.set([...green(value / protein.most), 255], 4 * i));
  const small = Object.assign(document.createElement("canvas"), { width: cells, height: cells });
  small.getContext("2d").putImageData(image, 0, 0);
  const covered = cells * protein.step / length * size; // the last cell may reach over the end
  context.save();
  context.beginPath();
  context.rect(BOX.left, BOX.top, size, size);
  context.clip();
  context.imageSmoothingEnabled = false;
  context.drawImage(small, BOX.left, BOX.top, covered, covered);
  context.restore();
  context.strokeStyle = "#262626";
  context.strokeRect(BOX.left, BOX.top, size, size);
  for (const start of borders(protein)) {
    const at = start / length * size;
    context.strokeRect(BOX.left + at, BOX.top, 0, size);
    context.strokeRect(BOX.left, BOX.top + at, size, 0);
  }
  context.textAlign = "right";
  for (const residue of ticks(length)) context.fillText(residue, BOX.left - 6, BOX.top + (residue - 0.5) / length * size + 4);
  context.textAlign = "center";
  context.fillText("scored residue", BOX.left + size / 2, canvas.height - 6);
  const bar = BOX.left + size + 22;
  for (let i = 0; i < size; i++) {
    context.fillStyle = `rgb(${green(1 - i / size)})`;
    context.fillRect(bar, BOX.top + i, 12, 1.5);
  }
  context.fillStyle = "#667080";
  context.textAlign = "left";
  const most = protein.most * protein.unit;
  for (const error of [0, 10, 20, 30]) context.fillText(`${error} Å`, bar + 17, BOX.top + (1 - error / most) * size + 4);
  return (place, from) => Math.floor((place - from) / size * length);
}

/** Bring the page to life. */
function start() {
  const element = (id) => document.getElementById(id);
  const body = document.querySelector("tbody");
  let protein, viewer, model, line, map, chosen;

  element("bands").append("pLDDT", ...BANDS.map(([, colour, text]) => {
    const label = document.createElement("span");
    label.innerHTML = `&ensp;<i style="background:${colour}"></i>${text}`;
    return label;
  }));
  try {
    viewer = $3Dmol.createViewer(element("viewer"), { backgroundColor: "white" });
  } catch (error) {
    element("viewer").innerHTML = '<p class="fault">This browser shows no 3-D pictures (WebGL is off).</p>';
  }

  function style() {
    if (!viewer || !model) return;
    const chains = protein.chains.map(({ name }) => name), shown = element("style").value;
    const ofChain = (atom) => CHAINS[Math.max(chains.indexOf(atom.chain), 0) % CHAINS.length];
    const how = { colorfunc: element("colour").value === "chain" ? ofChain : (atom) => band(atom.b) };
    viewer.setStyle({}, {
      ...(shown !== "stick" && { cartoon: how }),
      ...(shown !== "cartoon" && { stick: { ...how, radius: 0.15 } }),
    });
    viewer.render();
  }

  async function choose(row) {
    chosen = row;
    for (const each of body.rows) each.setAttribute("aria-selected", each === row);
    let found;
    try {
      found = await decode(element(row.dataset.of).textContent);
    } catch (error) {
      element("name").textContent = `This browser cannot unpack the page: ${error.message}`;
      return;
    }
    if (chosen !== row) return; // another one was chosen meanwhile
    protein = found;
    element("name").textContent = protein.id;
    element("about").textContent = protein.about;
    line = drawLine(element("line"), protein);
    map = drawMap(element("map"), protein);
    element("line-says").textContent = "pLDDT";
    element("map-says").textContent = protein.step > 1 ? `PAE, means of ${protein.step} × ${protein.step} residues` : "PAE";
    if (!viewer) return;
    viewer.removeAllModels();
    model = viewer.addModel(protein.structure, protein.layout);
    style();
    viewer.zoomTo();
    viewer.render();
  }

  for (const row of body.rows) {
    row.addEventListener("click", () => choose(row));
    row.addEventListener("keydown", (event) => event.key === "Enter" && choose(row));
  }
  document.querySelectorAll("th button").forEach((button, column) => {
    let way = 1;
    const value = (row) => row.cells[column].textContent;
    const compare = (a, b) => (column ? Number(value(b)) - Number(value(a)) : value(a).localeCompare(value(b)));
    button.addEventListener("click", () => {
      body.append(...[...body.rows].sort((a, b) => way * compare(a, b)));
      way = -way;
    });
  });
  element("style").addEventListener("change", style);
  element("colour").addEventListener("change", style);
  element("line").addEventListener("mousemove", (event) => {
    const i = line ? line(event.offsetX) : -1;
    if (protein && protein.residues[i]) element("line-says").textContent = `pLDDT of ${protein.residues[i]}: ${protein.plddt[i].toFixed(1)}`;
  });
  element("map").addEventListener("mousemove", (event) => {
    if (!map) return;
    const [i, j] = [map(event.offsetY, BOX.top), map(event.offsetX, BOX.left)];
    if (!protein.residues[i] || !protein.residues[j]) return;
    const cells = Math.ceil(protein.plddt.length / protein.step), cell = (k) => Math.floor(k / protein.step);
    const error = protein.pae[cell(i) * cells + cell(j)] * protein.unit;
    element("map-says").textContent = `PAE of ${protein.residues[j]}, once ${protein.residues[i]} is aligned: ${error.toFixed(1)} Å`;
  });
  if (body.rows.length) choose(body.rows[0]);
}

if (typeof document !== "undefined") start();
