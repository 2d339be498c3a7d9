// The relation explorer: an image's relation to the memory, the teacher's at any temperature and the student's.

const RELATIONS = GALLERY && GALLERY.relations;
const ROWS = 12;

// All of it follows from stored similarities: p = exp(similarity / temperature - log_sum), where log_sum is over the whole memory.
function relation(number, setting) {
  const stored = RELATIONS.images[number], temperature = RELATIONS.temperatures[setting];
  return {
    slots: stored.slots,
    teacher: stored.teacher.map((value) => Math.exp(value / temperature - stored.log_sum[setting])),
    student: stored.student.map((value) => Math.exp(value / RELATIONS.student_temperature - stored.student_log_sum)),
    neighbours: Math.exp(stored.entropy[setting]),
    divergence: stored.cross[setting] - stored.entropy[setting],
  };
}

function drawExplorer() {
  const slider = by("temperature"), own = RELATIONS.temperatures.indexOf(RELATIONS.teacher_temperature);
  const order = { name: "teacher" };
  const count = GALLERY.explored.length;
  const percent = (share) => (share >= 0.0995 ? (100 * share).toFixed(0) : (100 * share).toFixed(share >= 0.001 ? 1 : 2)) + " %";
  slider.max = RELATIONS.temperatures.length - 1;
  slider.value = own;
  let at = own;

  const known = () => GALLERY.explored.map((image, number) => [image, number]).filter(([image]) => image >= 0);
  const sorted = (key) => known().map(([image, number]) => [key(number), image]).sort((a, b) => a[0] - b[0]);
  const lists = {
    drawn: () => known().map(([image]) => choice(image)),
    certain: () => sorted((n) => RELATIONS.images[n].entropy[at]).map(([value, image]) => choice(image, `${short(Math.exp(value))} neighbours`)),
    uncertain: () => sorted((n) => -RELATIONS.images[n].entropy[at]).map(([value, image]) => choice(image, `${short(Math.exp(-value))} neighbours`)),
    disagree: () => sorted((n) => RELATIONS.images[n].entropy[at] - RELATIONS.images[n].cross[at]).map(([value, image]) => choice(image, `${short(-value)} nats apart`)),
    hubs: () => GALLERY.neighbours.hubs.map(([image, times]) => choice(image, `a neighbour of ${times}`)),
    pairs: () => GALLERY.neighbours.pairs.map(([one, other, cosine]) => el("span", { class: "pair" }, choice(one), choice(other), cosine.toFixed(3))),
  };
  const browse = () => {
    by("gallery").replaceChildren(...lists[by("browse").value]());
    for (const node of by("gallery").querySelectorAll("button")) node.setAttribute("aria-pressed", Number(node.dataset.image) === chosen);
  };

  const bar = (share, most) => {
    const node = el("i", {});
    node.style.width = `${72 * share / most}%`;
    return el("div", { class: "bar" }, node, percent(share));
  };
  const row = (slot, teacher, student, most, image) => {
    const shown = RELATIONS.pictures[slot];
    const node = shown >= 0 ? choice(shown, shown === image ? "an older key of itself" : "") : picture(-1);
    if (shown < 0) node.title = shown === -2 ? "a random direction, from before the first step" : "an image whose picture is not in this page";
    return el("tr", {}, el("td", { class: "left" }, bar(teacher, most)), el("td", { class: "middle" }, node), el("td", {}, bar(student, most)));
  };

  const draw = (image) => {
    const number = GALLERY.explored.indexOf(image), detail = by("detail");
    if (number < 0) {
      detail.replaceChildren(el("div", { class: "chosen-image" }, picture(image), el("p", {}, titleOf(image))),
        el("p", { class: "note" }, `The relations of ${count} images are in this page, and this is none of them; its neighbours are shown with the map.`));
      return;
    }
    const now = relation(number, at);
    by("said").textContent = `${nameOf(image)}: ${short(now.neighbours)} effective neighbours at temperature ${short(RELATIONS.temperatures[at])}`;
    const keys = { teacher: (i) => now.teacher[i], student: (i) => now.student[i], disagreement: (i) => Math.abs(now.teacher[i] - now.student[i]) };
    const places = now.slots.map((_, i) => i).sort((a, b) => keys[order.name](b) - keys[order.name](a)).slice(0, ROWS);
    const most = Math.max(...places.map((i) => Math.max(now.teacher[i], now.student[i])));
    const left = (shares) => Math.max(0, 1 - places.reduce((sum, i) => sum + shares[i], 0));
    const seen = Array.from({ length: GALLERY.views }, (_, i) => {
      const words = i ? `strong view${GALLERY.views > 2 ? ` ${i}` : ""}` : "weak view";
      return el("figure", {}, viewPicture(i * count + number, words), el("figcaption", {}, words));
    });
    const figures = [["teacher's effective neighbours", short(now.neighbours), "neighbours-value"], ["divergence, nats", short(now.divergence), "divergence-value"],
      ["the teacher's first", percent(Math.max(...now.teacher)), "first-value"], ["the student's first", percent(Math.max(...now.student)), "student-value"]];
    const choices = Object.keys(keys).map((name) => {
      const input = el("input", { type: "radio", name: "order", value: name, onchange: () => { order.name = name; draw(chosen); by("detail").querySelector(`input[value="${name}"]`).focus(); } });
      input.checked = order.name === name;
      return el("label", {}, input, ` ${name}`);
    });
    detail.replaceChildren(
      el("div", { class: "seen" }, el("figure", {}, picture(image), el("figcaption", {}, "the image")), ...seen),
      el("p", { class: "note" }, titleOf(image)),
      el("dl", { class: "numbers" }, ...figures.map(([title, value, id]) => el("div", {}, el("dt", {}, title), el("dd", { id }, value)))),
      el("div", { class: "controls" }, el("fieldset", {}, el("legend", {}, "Largest first, by"), ...choices)),
      el("table", { class: "butterfly" },
        el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "left" }, "teacher"), el("th", { scope: "col", class: "middle" }, ""), el("th", { scope: "col" }, "student"))),
        el("tbody", {}, ...places.map((i) => row(now.slots[i], now.teacher[i], now.student[i], most, image)),
          el("tr", { class: "rest" }, el("td", { class: "left" }, percent(left(now.teacher))), el("td", { class: "middle" }, "others"), el("td", {}, percent(left(now.student)))))));
  };

  const turn = () => {
    at = Number(slider.value);
    const words = `${short(RELATIONS.temperatures[at])}${at === own ? ", the run's own" : ""}`;
    by("temperature-value").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    draw(chosen);
  };
  slider.addEventListener("input", turn);
  slider.addEventListener("change", browse);
  by("reset").addEventListener("click", () => { slider.value = own; turn(); browse(); });
  by("browse").addEventListener("change", browse);
  listeners.push(draw);
  browse();
  turn();
}

if (RELATIONS) drawExplorer();
if (GALLERY) choose(Math.max(0, GALLERY.explored[0]));
