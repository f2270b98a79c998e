// What is wrong with a page for someone who looks at it: a list of sentences, empty if nothing is.
// The window must be as high as the page, so that elementFromPoint sees all of it.
const wrong = new Set(), width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > width) wrong.add(`the page scrolls sideways: ${document.documentElement.scrollWidth} of ${width} pixels`);

function parsed(colour) {  // [red, green, blue, alpha], 0 to 1
  const parts = colour.match(/[\d.]+/g).map(Number);
  return colour.startsWith("rgb") ? [parts[0] / 255, parts[1] / 255, parts[2] / 255, parts[3] ?? 1] : [...parts.slice(0, 3), parts[3] ?? 1];
}
function over(top, below) { return [0, 1, 2].map(n => top[n] * top[3] + below[n] * (1 - top[3])).concat(1); }
function background(element) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const colour = parsed(getComputedStyle(e).backgroundColor);
    layers.push(colour);
    if (colour[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [1, 1, 1, 1]);
}
function luminance(colour) {
  const [r, g, b] = colour.slice(0, 3).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(element) {
  const style = getComputedStyle(element), below = background(element);
  const text = over(parsed(element.closest("svg") ? style.fill : style.color), below);
  const [high, low] = [luminance(text), luminance(below)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}
function scroller(element) {  // the nearest box around it that scrolls sideways, for everyone to see
  for (let e = element.parentElement; e; e = e.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(e).overflowX) && e.scrollWidth > e.clientWidth) return e;
  return null;
}
function clipped(element, box) {
  for (let e = element; e; e = e.parentElement) {
    const style = getComputedStyle(e), own = e.getBoundingClientRect();
    if (style.overflowX === "hidden" && (box.left < own.left - 1 || box.right > own.right + 1)) return true;
    if (style.overflowY === "hidden" && (box.top < own.top - 1 || box.bottom > own.bottom + 1)) return true;
  }
  return false;
}

const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const text = node.textContent.trim(), element = node.parentElement;
  if (!text || element.closest("style, .unseen")) continue;
  const head = element.closest("thead");
  if (head && getComputedStyle(head).position === "absolute") {  // a narrow page: each cell has its own head
    const heads = [...head.querySelectorAll("th")].map(cell => cell.textContent.trim());
    for (const cell of head.parentElement.querySelectorAll("tbody td")) {
      const shown = getComputedStyle(cell, "::before");
      if (shown.display === "none" || shown.content.replace(/^"|\s*"$/g, "") !== heads[cell.cellIndex]) wrong.add(`no head: ${cell.innerText}`);
    }
    continue;
  }
  const range = document.createRange();
  range.selectNodeContents(node);
  const boxes = [...range.getClientRects()].filter(box => box.width > 0 && box.height > 0);
  const style = getComputedStyle(element), said = `${element.tagName} “${text.slice(0, 60)}”`;
  if (!boxes.length || style.visibility !== "visible" || Number(style.opacity) < 0.5) { wrong.add(`hidden: ${said}`); continue; }
  if (contrast(element) < 4.5) wrong.add(`contrast ${contrast(element).toFixed(2)}: ${said}`);
  if (boxes[0].height < 9) wrong.add(`letters of ${boxes[0].height.toFixed(1)} pixels: ${said}`);
  const drawing = element.closest("svg");
  if (drawing) {
    const own = drawing.getBoundingClientRect();
    if (boxes.some(at => at.left < own.left - 2 || at.right > own.right + 2)) wrong.add(`cut: ${said}`);
  }
  if (!/\d/.test(text)) continue;
  seen += 1;
  const box = scroller(element);
  for (const at of boxes) {
    if (box) { const own = box.getBoundingClientRect(); if (own.left < 0 || own.right > width + 1) wrong.add(`scrolls outside: ${said}`); continue; }
    if (at.left < -1 || at.right > width + 1 || at.top < 0) { wrong.add(`outside: ${said}`); continue; }
    if (clipped(element, at)) wrong.add(`cut: ${said}`);
    const hit = document.elementFromPoint((at.left + at.right) / 2, (at.top + at.bottom) / 2);
    if (!hit || !(hit.contains(element) || element.contains(hit) || (drawing && hit.closest("svg") === drawing)))
      wrong.add(`covered by ${hit && hit.tagName}: ${said}`);
  }
}
if (!seen) wrong.add("no numbers");

for (const picture of document.images) if (!picture.complete || !picture.naturalWidth || picture.width < 40) wrong.add(`no picture: ${picture.alt}`);
for (const picture of document.images) if (!picture.alt) wrong.add("a picture without words");
for (const drawing of document.querySelectorAll("svg")) {
  const box = drawing.getBoundingClientRect();
  if (box.width < 100 || box.height < 60 || drawing.querySelectorAll("path").length < 4) wrong.add(`no drawing: ${drawing.ariaLabel}`);
  if (!drawing.ariaLabel) wrong.add("a drawing without words");
}
let level = 0;
for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
  const own = Number(heading.tagName[1]);
  if (own > level + 1) wrong.add(`heading ${own} after ${level}: ${heading.innerText}`);
  level = own;
}
const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
if (new Set(ids).size < ids.length) wrong.add("an id is there twice");
if (document.querySelector("script, link[rel=stylesheet], iframe, [src^=http]")) wrong.add("not self-contained");
return [...wrong];
