// Sample views, the map of the images, and the nearest neighbours of the chosen one.

function drawSamples() {
  const count = GALLERY.explored.length;
  GALLERY.explored.slice(0, 12).forEach((image, number) => {
    const views = Array.from({ length: GALLERY.views }, (_, i) => viewPicture(i * count + number, i ? `strong view ${i}` : "weak view"));
    by("samples").append(el("figure", {}, ...views, el("figcaption", {}, image < 0 ? "" : titleOf(image))));
  });
}

const SPACES = [["pixels", "by raw pixels"], ["untrained", "by the untrained network"], ["student", "by the student"]];

function drawNeighbours(image) {
  const head = el("div", { class: "chosen-image" }, picture(image), el("div", {}, el("p", {}, nameOf(image)), el("p", { class: "note" }, classOf(image))));
  const rows = SPACES.flatMap(([space, title]) => {
    const near = GALLERY.neighbours[space].nearest[image];
    const same = near.map((other) => GALLERY.labels && GALLERY.labels[other] >= 0 && GALLERY.labels[other] === GALLERY.labels[image]);
    const buttons = near.map((other, i) => { const node = choice(other, same[i] ? "same class" : ""); if (same[i]) node.classList.add("same"); return node; });
    const count = GALLERY.labels && GALLERY.labels[image] >= 0 ? `: ${same.filter(Boolean).length} of ${near.length} of its class` : "";
    return [el("h3", {}, `Nearest ${title}${count}`), el("div", { class: "strip" }, ...buttons)];
  });
  by("neighbours").replaceChildren(head, ...rows);
}

function drawMap() {
  const names = Object.keys(GALLERY.maps);
  let places = [];
  const dots = GALLERY.names.map((_, image) => svg("circle", { r: 7, "data-image": image }));
  // Names of few classes stand in the middle of theirs.
  const titles = (GALLERY.classes && GALLERY.classes.length <= 20 ? GALLERY.classes : []).map((name) => svg("text", { class: "name" }, name));
  const ring = svg("circle", { class: "chosen", r: 16 });
  const drawing = svg("svg", { role: "application", tabindex: 0,
    "aria-label": "Map of the images. Arrow keys go to the nearest image in that direction; Enter chooses it." }, ...dots, ...titles, ring);
  const hint = el("div", { class: "map-hint", hidden: "" });
  by("map").append(drawing);
  document.body.append(hint);
  let at = 0;

  const show = (name) => {
    places = GALLERY.maps[name];
    const [wide, high] = [0, 1].map((axis) => Math.max(...places.map((each) => each[axis])));
    drawing.setAttribute("viewBox", `-30 ${970 - high} ${wide + 60} ${high + 60}`);
    dots.forEach((dot, image) => { dot.setAttribute("cx", places[image][0]); dot.setAttribute("cy", 1000 - places[image][1]); });
    mark(chosen);
    titles.forEach((title, label) => {
      const mine = places.filter((_, image) => GALLERY.labels[image] === label);
      const middle = (axis) => mine.map((each) => each[axis]).sort((a, b) => a - b)[Math.floor(mine.length / 2)];
      if (mine.length) { title.setAttribute("x", middle(0)); title.setAttribute("y", 1000 - middle(1) + 10); }
    });
  };
  const mark = (image) => { ring.setAttribute("cx", places[image][0]); ring.setAttribute("cy", 1000 - places[image][1]); };
  const point = (image) => {
    at = image;
    mark(image);
    const box = dots[image].getBoundingClientRect();
    hint.replaceChildren(picture(image), el("span", {}, titleOf(image)));
    hint.hidden = false;
    hint.style.left = `${Math.min(box.right + 8, document.documentElement.clientWidth - 150) + window.scrollX}px`;
    hint.style.top = `${box.bottom + 8 + window.scrollY}px`;
  };
  const nearest = (x, y, allowed) => {
    let best = -1, least = Infinity;
    places.forEach(([px, py], image) => {
      const [dx, dy] = [px - x, py - y];
      const distance = dx * dx + dy * dy;
      if (distance < least && allowed(dx, dy, image)) [best, least] = [image, distance];
    });
    return best;
  };
  drawing.addEventListener("pointermove", (event) => {
    const corner = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    point(nearest(corner.x, 1000 - corner.y, () => true));
  });
  drawing.addEventListener("pointerleave", () => { hint.hidden = true; mark(chosen); });
  drawing.addEventListener("blur", () => { hint.hidden = true; mark(chosen); });
  drawing.addEventListener("click", () => choose(at));
  drawing.addEventListener("keydown", (event) => {
    const ways = { ArrowLeft: (dx, dy) => -dx > Math.abs(dy), ArrowRight: (dx, dy) => dx > Math.abs(dy),
      ArrowUp: (dx, dy) => dy > Math.abs(dx), ArrowDown: (dx, dy) => -dy > Math.abs(dx) };
    if (event.key in ways) {
      const next = nearest(...places[at], (dx, dy, image) => image !== at && ways[event.key](dx, dy));
      if (next >= 0) point(next);
      event.preventDefault();
    }
    if (event.key === "Enter") choose(at);
  });
  listeners.push((image) => { at = image; mark(image); });

  names.forEach((name, i) => {
    const input = el("input", { type: "radio", name: "projection", value: name, onchange: () => show(name) });
    input.checked = i === Math.min(1, names.length - 1);
    by("projections").append(el("label", {}, input, ` ${name}`));
    if (input.checked) show(name);
  });

  const highlight = () => {
    const text = by("search").value.trim().toLowerCase(), label = by("class") ? by("class").value : "";
    const all = !text && !label;
    const matches = GALLERY.names.map((name, image) => image).filter((image) =>
      nameOf(image).toLowerCase().includes(text) && (!label || GALLERY.labels[image] === Number(label)));
    const on = new Set(all ? [] : matches);
    dots.forEach((dot, image) => dot.setAttribute("class", all ? "" : on.has(image) ? "on" : "off"));
    by("found").textContent = all ? "" : `${matches.length} of ${GALLERY.names.length} images`;
    by("matches").replaceChildren(...(all ? [] : matches.slice(0, 24).map((image) => choice(image))));
  };
  by("search").addEventListener("input", highlight);
  if (by("class")) by("class").addEventListener("change", highlight);
}

if (GALLERY) {
  drawSamples();
  drawMap();
  listeners.push(drawNeighbours);
}
