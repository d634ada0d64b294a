// The canvas of the demo, on which the user paints over the pixels that are missing. `element` is its part of the page.
// props.value is {picture, hole}: the address of a PNG, and a string with a "1" for each missing pixel, else "0".
// Of a value from the server, what is empty stays as it is here.
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const { width, height } = canvas;
const cover = Object.assign(document.createElement("canvas"), { width, height }); // the missing pixels, in color
const colored = cover.getContext("2d");
const covered = colored.createImageData(width, height);
const image = new Image();
const size = element.querySelector("input[type=range]");
const tools = element.querySelectorAll("[data-tool]");
let hole = new Uint8Array(width * height);
let missing = 1; // what the tool writes: 1 for the brush, 0 for the eraser
let last = null; // the last position of the pointer, in pixels of the picture
let url = "";

function show() {
  for (let i = 0; i < hole.length; i++) covered.data.set([249, 115, 22, hole[i] ? 235 : 0], 4 * i);
  colored.putImageData(covered, 0, 0);
  context.clearRect(0, 0, width, height);
  if (url) context.drawImage(image, 0, 0, width, height);
  context.drawImage(cover, 0, 0);
}

function send() {
  props.value = { picture: url, hole: Array.from(hole).join("") };
}

function receive() {
  const value = props.value;
  if (!value) return;
  if (value.hole.length === hole.length) hole = Uint8Array.from(value.hole, Number);
  if (value.picture && value.picture !== url) {
    url = value.picture;
    image.src = url;
  } else show();
  if (!value.picture || !value.hole) send();
}

function position(event) {
  return [(event.offsetX / canvas.clientWidth) * width, (event.offsetY / canvas.clientHeight) * height];
}

function dab(x, y) {
  const radius = Number(size.value) / 2;
  const reach = Math.ceil(radius);
  for (let row = Math.floor(y) - reach; row <= Math.floor(y) + reach; row++) {
    for (let column = Math.floor(x) - reach; column <= Math.floor(x) + reach; column++) {
      const under = row === Math.floor(y) && column === Math.floor(x);
      const near = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 <= radius ** 2;
      const inside = row >= 0 && row < height && column >= 0 && column < width;
      if (inside && (under || near)) hole[row * width + column] = missing;
    }
  }
}

function stroke(event) {
  const [x, y] = position(event);
  const [fromX, fromY] = last || [x, y];
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(x - fromX, y - fromY)));
  for (let i = 1; i <= steps; i++) dab(fromX + ((x - fromX) * i) / steps, fromY + ((y - fromY) * i) / steps);
  last = [x, y];
  show();
}

function end() {
  if (!last) return;
  last = null;
  send();
}

function fill(isMissing) {
  hole = Uint8Array.from(hole, (_, i) => Number(isMissing(i % width, Math.floor(i / width))));
  show();
  send();
}

const actions = {
  brush: () => (missing = 1),
  eraser: () => (missing = 0),
  right: () => fill((column) => column >= width / 2),
  bottom: () => fill((column, row) => row >= height / 2),
  clear: () => fill(() => false),
};

tools.forEach((button) => {
  button.addEventListener("click", () => {
    actions[button.dataset.tool]();
    element.querySelector("[data-tool=brush]").setAttribute("aria-pressed", missing === 1);
    element.querySelector("[data-tool=eraser]").setAttribute("aria-pressed", missing === 0);
  });
});
image.addEventListener("load", show);
canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  stroke(event);
});
canvas.addEventListener("pointermove", (event) => last && stroke(event));
canvas.addEventListener("pointerup", end);
canvas.addEventListener("pointercancel", end);
watch("value", receive);
receive();
