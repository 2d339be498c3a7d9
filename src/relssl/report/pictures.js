"use strict";
// The page's facts, and small helpers: elements are built from text alone, so that no name can become markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const GALLERY = DATA.gallery;
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const by = (id) => document.getElementById(id);
const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))));

// A picture of a sheet: of the images ("thumb") by number, of the views ("view") likewise.
function place(node, sheet, number) {
  const [columns, rows] = GALLERY.grids[sheet];
  const x = columns > 1 ? (number % columns) / (columns - 1) : 0;
  const y = rows > 1 ? Math.floor(number / columns) / (rows - 1) : 0;
  node.style.backgroundPosition = `${100 * x}% ${100 * y}%`;
  return node;
}

const nameOf = (image) => GALLERY.names[image];
const classOf = (image) => (GALLERY.labels && GALLERY.labels[image] >= 0 ? GALLERY.classes[GALLERY.labels[image]] : "");
const titleOf = (image) => nameOf(image) + (classOf(image) ? `, ${classOf(image)}` : "");

function picture(image) {
  if (image < 0) return el("span", { class: "thumb blank", role: "img", "aria-label": "no picture" });
  return place(el("span", { class: "thumb", role: "img", "aria-label": titleOf(image), title: titleOf(image) }), "thumb", image);
}

function viewPicture(number, label) {
  return place(el("span", { class: "view", role: "img", "aria-label": label }), "view", number);
}

// A picture that chooses its image when it is pressed.
function choice(image, extra) {
  const words = titleOf(image) + (extra ? `, ${extra}` : "");
  const node = el("button", { type: "button", class: "thumb", "aria-label": words, title: words, "data-image": image, onclick: () => choose(image) });
  return place(node, "thumb", image);
}

for (const bar of document.querySelectorAll("[data-share]")) bar.style.width = `${100 * bar.dataset.share}%`;

// What depends on the chosen image listens here.
const listeners = [];
let chosen = 0;
function choose(image) {
  chosen = image;
  for (const listener of listeners) listener(image);
  for (const node of document.querySelectorAll("button.thumb")) node.setAttribute("aria-pressed", Number(node.dataset.image) === image);
}
