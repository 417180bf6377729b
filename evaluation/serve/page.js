"use strict";

// Coordinates are pixels of the original image, until they are drawn.

const element = (id) => document.getElementById(id);
const DRAG = 4; // pixels of the screen: a shorter movement is a click
const PAUSE = 150; // milliseconds after the last key

function colourOf(index) {
  const hue = (8 + index * 137.508) % 360; // the golden angle keeps hues apart
  return `hsl(${hue} 78% ${hue > 40 && hue < 200 ? 32 : 45}%)`; // white is readable on all of them
}

async function ask(path, options) {
  const response = await fetch(path, options);
  const document = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw new Error(document.error);
  return document;
}

const post = (path, body) => ask(path, { method: "POST", body: JSON.stringify(body) });

function load(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("the image cannot be shown"));
    image.src = url;
  });
}

function areaOf({ box: [x1, y1, x2, y2] }) { return (x2 - x1) * (y2 - y1); }

// An image with regions {number, box, label, colour, mask}. Calls handlers.box, point, select and hover.
class Viewer {
  constructor(canvas, handlers) {
    Object.assign(this, { canvas, handlers, regions: [], image: null, hovered: null, selected: null, drag: null });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", () => { this.drag = null; this.draw(); });
    canvas.addEventListener("pointerleave", () => this.hover(null));
    new ResizeObserver(() => this.fit()).observe(canvas.parentElement);
  }

  show(image, width, height) {
    Object.assign(this, { image, width, height, hovered: null, selected: null });
    this.fit();
  }

  fit() {
    if (!this.image) return;
    const room = this.canvas.parentElement, dots = window.devicePixelRatio || 1;
    this.scale = Math.min(room.clientWidth / this.width, room.clientHeight / this.height);
    this.canvas.style.width = `${this.width * this.scale}px`;
    this.canvas.style.height = `${this.height * this.scale}px`;
    this.canvas.width = Math.round(this.width * this.scale * dots);
    this.canvas.height = Math.round(this.height * this.scale * dots);
    this.draw();
  }

  position(event) {
    const edge = this.canvas.getBoundingClientRect();
    const clamp = (value, most) => Math.min(Math.max(value, 0), most);
    return [clamp((event.clientX - edge.left) / this.scale, this.width),
            clamp((event.clientY - edge.top) / this.scale, this.height)];
  }

  // Smallest first: inside of a large region a small one can still be reached.
  under([x, y]) {
    return this.regions.filter(({ box }) => box[0] <= x && x <= box[2] && box[1] <= y && y <= box[3])
      .sort((one, other) => areaOf(one) - areaOf(other));
  }

  down(event) {
    if (!this.image || event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = { from: this.position(event), to: this.position(event), moved: false };
  }

  move(event) {
    if (!this.image) return;
    const at = this.position(event);
    if (!this.drag) return this.hover(this.under(at)[0]?.number ?? null);
    this.drag.to = at;
    const length = Math.max(Math.abs(at[0] - this.drag.from[0]), Math.abs(at[1] - this.drag.from[1])) * this.scale;
    this.drag.moved ||= length >= DRAG;
    this.draw();
  }

  up(event) {
    const drag = this.drag;
    this.drag = null;
    if (!drag) return;
    const [[x1, y1], [x2, y2]] = [drag.from, drag.to];
    if (drag.moved && this.handlers.box) {
      this.handlers.box([Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)]);
    } else if (!drag.moved) {
      const candidates = this.under(drag.from);
      if ((event.shiftKey || !candidates.length) && this.handlers.point) this.handlers.point(drag.from);
      else if (candidates.length) this.cycle(candidates);
    }
    this.draw();
  }

  cycle(candidates) {
    const at = candidates.findIndex((region) => region.number === this.selected);
    this.select(candidates[(at + 1) % candidates.length].number);
  }

  select(number) {
    this.selected = number;
    this.handlers.select?.(number);
    this.draw();
  }

  hover(number) {
    if (number === this.hovered) return;
    this.hovered = number;
    this.handlers.hover?.(number);
    this.draw();
  }

  draw() {
    const pen = this.canvas.getContext("2d");
    if (!this.image) return;
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(this.image, 0, 0, this.canvas.width, this.canvas.height);
    const scale = this.canvas.width / this.width, dots = this.canvas.width / parseFloat(this.canvas.style.width);
    // Large regions first, so that small ones are on top.
    const ordered = [...this.regions].sort((one, other) => areaOf(other) - areaOf(one));
    for (const region of ordered) if (region.mask) this.paint(pen, region, scale);
    for (const region of ordered) this.frame(pen, region, scale, dots);
    const written = [];
    for (const region of ordered.reverse()) this.write(pen, region, scale, dots, written); // small ones first
    if (this.drag?.moved && this.handlers.box) {
      const [[x1, y1], [x2, y2]] = [this.drag.from, this.drag.to];
      pen.setLineDash([6 * dots, 4 * dots]);
      pen.lineWidth = 2 * dots;
      pen.strokeStyle = "#fff";
      pen.strokeRect(x1 * scale, y1 * scale, (x2 - x1) * scale, (y2 - y1) * scale);
      pen.lineDashOffset = 5 * dots;
      pen.strokeStyle = "#1c1e21";
      pen.strokeRect(x1 * scale, y1 * scale, (x2 - x1) * scale, (y2 - y1) * scale);
      pen.setLineDash([]);
      pen.lineDashOffset = 0;
    }
  }

  emphasised(region) {
    return region.number === this.hovered || region.number === this.selected;
  }

  paint(pen, region, scale) {
    const { image, box: [x, y, width, height] } = region.mask;
    const tint = document.createElement("canvas");
    [tint.width, tint.height] = [image.width, image.height];
    const brush = tint.getContext("2d");
    brush.drawImage(image, 0, 0);
    brush.globalCompositeOperation = "source-in";
    brush.fillStyle = region.colour;
    brush.fillRect(0, 0, tint.width, tint.height);
    pen.globalAlpha = this.emphasised(region) ? 0.5 : 0.25;
    pen.drawImage(tint, x * scale, y * scale, width * scale, height * scale);
    pen.globalAlpha = 1;
  }

  frame(pen, region, scale, dots) {
    const [x1, y1, x2, y2] = region.box.map((edge) => edge * scale);
    const width = (this.emphasised(region) ? 3.5 : 2) * dots;
    for (const [colour, line] of [["rgb(20 20 20 / 0.75)", width + 2 * dots], [region.colour, width]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = line;
      pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
  }

  // Above the box, else below it, else inside; a label that would cover another one is left to the hover.
  write(pen, region, scale, dots, written) {
    if (!region.label) return;
    const size = 13.5 * dots, pad = 4 * dots, [x1, y1, , y2] = region.box.map((edge) => edge * scale);
    pen.font = `600 ${size}px system-ui, sans-serif`;
    const width = pen.measureText(region.label).width + 2 * pad, height = size + 2 * pad;
    const left = Math.max(0, Math.min(x1 - dots, this.canvas.width - width));
    const free = (top) => top >= 0 && top + height <= this.canvas.height &&
      written.every(([l, t, w, h]) => left >= l + w || l >= left + width || top >= t + h || t >= top + height);
    let top = [y1 - height, y2, y1 + dots].find(free);
    if (top === undefined) {
      if (!this.emphasised(region)) return;
      top = Math.max(0, Math.min(y1 - height, this.canvas.height - height));
    }
    written.push([left, top, width, height]);
    pen.fillStyle = region.colour;
    pen.fillRect(left, top, width, height);
    pen.fillStyle = "#fff";
    pen.textBaseline = "middle";
    pen.fillText(region.label, left + pad, top + height / 2 + dots / 2);
  }
}

// ---- first tab ----

const opened = { key: null, regions: new Map(), removed: new Set(), request: 0, unreadable: {} };

const viewer = new Viewer(element("canvas"), {
  box: (box) => addRegions({ boxes: [box] }),
  point: (point) => addRegions({ points: [point] }),
  select: markSelected,
  hover: markSelected,
});

function problem(text) { element("problem").textContent = text; }

async function working(text, work) {
  element("busy").textContent = text;
  try { return await work(); } catch (error) { problem(error.message); } finally { element("busy").textContent = ""; }
}

function openImage(file) {
  if (!file) return;
  return working("reading the image…", async () => {
    const limit = page.limits.upload;
    if (file.size > limit) throw new Error(`the file has ${(file.size / 1e6).toFixed(1)} MB, at most ${(limit / 1e6).toFixed(0)} are accepted`);
    const { image, width, height } = await ask("api/images", { method: "POST", body: file });
    const shown = await load(`api/images/${image}`);
    Object.assign(opened, { key: image, regions: new Map(), removed: new Set() });
    problem("");
    element("empty").hidden = true;
    element("everywhere").disabled = false;
    viewer.regions = [];
    viewer.show(shown, width, height);
    list();
  });
}

function addRegions(request) {
  const key = opened.key;
  return working(request.everywhere ? "finding regions…" : "", async () => {
    const { regions } = await post(`api/images/${key}/regions`, request);
    for (const region of regions) {
      if (region.mask) region.mask.image = await load(`data:image/png;base64,${region.mask.png}`);
      if (key === opened.key) opened.regions.set(region.number, { ...region, scores: [] });
    }
    problem(regions.length ? "" : "no region was found; draw a box");
    if (regions.length === 1) viewer.selected = regions[0].number;
    await nameRegions();
  });
}

function typedNames() {
  return [...new Set(element("names").value.split(/[\n,]/).map((name) => name.trim()).filter(Boolean))];
}

async function nameRegions() {
  const request = ++opened.request, key = opened.key, names = typedNames();
  if (!key) return;
  const answer = await post(`api/images/${key}/names`, { names });
  if (request !== opened.request || key !== opened.key) return; // a later answer is on its way
  const reasons = Object.values(answer.unreadable);
  problem(reasons.length ? reasons[0] : "");
  for (const region of opened.regions.values()) region.scores = [];
  answer.regions.forEach((named, number) => { Object.assign(opened.regions.get(number) ?? {}, named); });
  list();
}

function list() {
  const names = typedNames(), items = [...opened.regions.values()].filter(({ number }) => !opened.removed.has(number));
  for (const region of items) {
    const best = region.scores[0];
    region.colour = best ? colourOf(Math.max(0, names.indexOf(best.name))) : "#5f6670";
    region.label = best ? `${best.name} ${best.score.toFixed(2)}` : "";
  }
  viewer.regions = items;
  element("clear").disabled = !items.length;
  element("regions").replaceChildren(...items.map(listItem));
  markSelected();
  viewer.draw();
}

function line(kind, left, right) {
  const row = document.createElement("div");
  row.className = kind;
  for (const text of [left, right]) row.append(Object.assign(document.createElement("span"), { textContent: text }));
  return row;
}

function listItem(region) {
  const item = document.createElement("li"), [best, ...others] = region.scores;
  item.dataset.number = region.number;
  item.style.setProperty("--colour", region.colour);
  item.append(best ? line("best", best.name, best.score.toFixed(2)) : line("best", "type names above", ""));
  if (best) {
    const bar = Object.assign(document.createElement("div"), { className: "bar" });
    bar.style.width = `${Math.max(1, 100 * best.score)}%`;
    item.append(bar, ...others.slice(0, 2).map(({ name, score }) => line("other", name, score.toFixed(2))));
  }
  item.onpointerenter = () => viewer.hover(region.number);
  item.onpointerleave = () => viewer.hover(null);
  item.onclick = () => viewer.select(region.number);
  return item;
}

function markSelected() {
  for (const item of element("regions").children) {
    const number = Number(item.dataset.number);
    item.classList.toggle("selected", number === viewer.selected);
    item.classList.toggle("hover", number === viewer.hovered);
    if (number === viewer.selected) item.scrollIntoView({ block: "nearest" });
  }
  element("remove").disabled = viewer.selected === null;
}

function remove(numbers) {
  for (const number of numbers) opened.removed.add(number);
  viewer.selected = viewer.hovered = null;
  list();
}

let timer;
element("names").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => nameRegions().catch((error) => problem(error.message)), PAUSE);
});
element("file").addEventListener("change", (event) => { openImage(event.target.files[0]); event.target.value = ""; });
element("everywhere").onclick = () => addRegions({ everywhere: true });
element("remove").onclick = () => remove([viewer.selected]);
element("clear").onclick = () => remove([...opened.regions.keys()]);
document.addEventListener("keydown", ({ key, target }) => {
  if (target.matches("textarea, input")) return;
  if (["Delete", "Backspace"].includes(key) && viewer.selected !== null && !element("name-tab").hidden) remove([viewer.selected]);
  if (key === "Escape") viewer.select(null);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // an image that is dropped beside the stage would replace the page
    element("stage").classList.toggle("drop", kind === "dragover");
    if (kind === "drop" && page.method) { choose("name"); openImage(event.dataTransfer.files[0]); }
  });
}

// ---- second tab ----

const shown = { row: null, first: 0, image: null, request: 0 };

const explorer = new Viewer(element("cache-canvas"), {
  select: (number) => {
    element("similar").disabled = number === null || !page.cache.search;
    if (number !== null && page.cache.search) findLike(number);
  },
});

async function exploring(work) {
  element("cache-problem").textContent = "";
  try { await work(); } catch (error) { element("cache-problem").textContent = error.message; }
}

function fillGrid(items, paged) {
  element("grid").replaceChildren(...items.map(({ source, title, detail, row, number }) => {
    const button = document.createElement("button");
    const image = Object.assign(document.createElement("img"), { src: source, loading: "lazy", alt: title });
    button.append(image, Object.assign(document.createElement("span"), { textContent: title, title }));
    button.append(Object.assign(document.createElement("span"), { textContent: detail, className: "soft" }));
    button.onclick = () => { mark(button); exploring(() => showRow(row, number)); };
    return button;
  }));
  element("grid").scrollTop = 0;
  element("earlier").parentElement.hidden = !paged;
}

function mark(button) {
  for (const other of element("grid").children) other.classList.toggle("selected", other === button);
}

async function showImages(first) {
  const request = ++shown.request, { images } = await ask(`api/cache/images?first=${first}`);
  if (request !== shown.request) return;
  shown.first = first;
  fillGrid(images.map(({ row, image_id, regions }) => ({
    source: `api/cache/images/${row}/photo?small`, title: `${image_id}`, detail: `${regions} regions`, row, number: null,
  })), true);
  element("found").textContent = `${page.cache.title}: images ${first + 1} to ${first + images.length} of ${page.cache.images}`;
  element("earlier").disabled = !first;
  element("later").disabled = first + images.length >= page.cache.images;
  if (images.length) { mark(element("grid").firstElementChild); await showRow(images[0].row, null); }
}

async function showHits(query, text) {
  const request = ++shown.request, { hits } = await ask(`api/search?${query}`);
  if (request !== shown.request) return;
  fillGrid(hits.map(({ row, region, name, similarity }) => ({
    source: `api/cache/images/${row}/regions/${region}`, title: name ?? "unnamed", detail: similarity.toFixed(3), row, number: region,
  })), false);
  element("found").textContent = `${hits.length} regions ${text}, nearest first; similarity is the cosine`;
  return hits;
}

async function showRow(row, number) {
  const image = await ask(`api/cache/images/${row}`);
  const names = [...new Set(image.regions.map(({ name }) => name))];
  Object.assign(shown, { row, image });
  explorer.regions = image.regions.map((region) => ({ ...region, label: region.name ?? "", colour: colourOf(names.indexOf(region.name)) }));
  await showLayer();
  explorer.selected = number;
  explorer.draw();
  element("similar").disabled = number === null || !page.cache.search;
  element("cache-caption").textContent = `${image.path}, image ${image.image_id}, ${image.regions.length} regions. ` +
    (page.cache.search ? "Click a region to find others like it." : `For search, run: ${page.cache.index_command}`);
}

async function showLayer() {
  const map = element("show").value, { row, image } = shown;
  if (!image) return;
  const source = map ? `pca?map=${encodeURIComponent(map)}` : "photo";
  const pixels = await load(`api/cache/images/${row}/${source}`);
  if (row !== shown.row || map !== element("show").value) return;
  const { selected } = explorer;
  explorer.show(pixels, image.width, image.height);
  explorer.selected = selected;
}

function findLike(number) {
  const region = shown.image.regions[number];
  return exploring(() => showHits(`row=${shown.row}&region=${number}`, `like ${region.name ?? "region"} (${shown.image.image_id}:${number})`));
}

element("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});

function search() {
  const words = element("words").value.trim();
  return exploring(async () => {
    if (!words) return showImages(0);
    const hits = await showHits(`words=${encodeURIComponent(words)}`, `for “${words}”`);
    if (hits?.length) { mark(element("grid").firstElementChild); await showRow(hits[0].row, hits[0].region); }
  });
}

element("all").onclick = () => { element("words").value = ""; search(); };
element("earlier").onclick = () => exploring(() => showImages(Math.max(0, shown.first - element("grid").children.length)));
element("later").onclick = () => exploring(() => showImages(shown.first + element("grid").children.length));
element("show").onchange = () => exploring(showLayer);
element("similar").onclick = () => findLike(explorer.selected);
element("try").onclick = () => exploring(async () => {
  const { row, image } = shown, photo = await fetch(`api/cache/images/${row}/photo`);
  choose("name");
  await openImage(await photo.blob());
  const scale = viewer.width / image.width; // a large image is reduced on its way
  if (image.regions.length) await addRegions({ boxes: image.regions.map(({ box }) => box.map((edge) => edge * scale)) });
});

// ---- both ----

let page = { limits: {} };

function choose(tab) {
  for (const name of ["name", "cache"]) {
    element(`${name}-tab`).hidden = name !== tab;
    element(`tab-${name}`).setAttribute("aria-selected", name === tab);
  }
  if (tab === "cache" && shown.row === null) exploring(() => showImages(0));
}

const METHODS = {
  head: "named by a trained head",
  dense: "named by CLIP’s dense map, without training",
  crop: "named by CLIP on crops, without training",
};

ask("api/info").then((info) => {
  page = info;
  element("about").textContent = METHODS[info.method] ?? "";
  element("tab-name").hidden = !info.method;
  element("tab-cache").hidden = !info.cache;
  element("try").hidden = !info.method;
  element("names").value = (info.cache?.names ?? []).join("\n");
  for (const name of info.cache?.maps ?? []) element("show").append(new Option(`PCA of ${name}`, name));
  for (const id of ["words", "find"]) element(id).disabled = !info.cache?.search;
  element("tab-name").onclick = () => choose("name");
  element("tab-cache").onclick = () => choose("cache");
  choose(info.method ? "name" : "cache");
  document.body.dataset.ready = "yes";
}).catch((error) => problem(error.message));
