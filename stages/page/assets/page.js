// Fills the page from page.json and samples the student. Text from there is set as text, never as markup.

import {Student} from "./student.js";

const COLUMNS = 8;
const NUM = COLUMNS * COLUMNS;
const AT_ONCE = 16; // images per pass, between which the page is drawn
const MOST = Number.MAX_SAFE_INTEGER - NUM; // largest first seed that numbers hold exactly

const find = (id) => document.getElementById(id);

function made(tag, text, parent) {
  const element = document.createElement(tag);
  element.textContent = text;
  parent?.append(element);
  return element;
}

// Draws images on a canvas, COLUMNS per row and a pixel apart.
class Sheet {
  constructor(canvas, [channels, height, width], num) {
    Object.assign(this, {channels, height, width});
    canvas.width = COLUMNS * (width + 1) - 1;
    canvas.height = Math.ceil(num / COLUMNS) * (height + 1) - 1;
    this.canvas = canvas.getContext("2d");
  }

  place(index) {
    return [(index % COLUMNS) * (this.width + 1), Math.floor(index / COLUMNS) * (this.height + 1)];
  }

  // values: in [−1, 1], C × H × W from `offset` on.
  draw(index, values, offset) {
    const {channels, height, width} = this;
    const size = height * width;
    const image = new ImageData(width, height);
    for (let pixel = 0; pixel < size; pixel++) {
      for (let colour = 0; colour < 3; colour++) {
        image.data[4 * pixel + colour] = values[offset + (colour % channels) * size + pixel] * 127.5 + 127.5;
      }
      image.data[4 * pixel + 3] = 255;
    }
    this.canvas.putImageData(image, ...this.place(index));
  }

  // One image of a sprite sheet whose images lie side by side, `columns` per row.
  copy(index, sprite, number, columns) {
    const {height, width} = this;
    const from = [(number % columns) * width, Math.floor(number / columns) * height];
    this.canvas.drawImage(sprite, ...from, width, height, ...this.place(index), width, height);
  }

  clear() {
    this.canvas.clearRect(0, 0, this.canvas.canvas.width, this.canvas.canvas.height);
  }
}

async function picture(file) {
  const image = new Image();
  image.src = file;
  await image.decode();
  return image;
}

function describe(page) {
  document.title = page.title;
  find("title").textContent = page.title;
  for (const paragraph of page.summary) made("p", paragraph, find("summary"));
  find("attribution").textContent = page.attribution ?? "";
  find("shown").hidden = !page.pictures.length;
  for (const {file, caption} of page.pictures) {
    const figure = made("figure", "", find("pictures"));
    const image = made("img", "", figure);
    Object.assign(image, {src: file, alt: caption, loading: "lazy"});
    made("figcaption", caption, figure);
  }
  for (const [name, value] of page.facts) {
    made("dt", name, find("facts"));
    made("dd", value, find("facts"));
  }
  find("citation").textContent = page.citation;
  if (page.scores) tabulate(page.scores);
}

function tabulate({columns, rows, notes}) {
  const head = made("tr", "", find("scores").createTHead());
  for (const column of columns) made("th", column, head).scope = "col";
  const body = find("scores").createTBody();
  for (const [name, ...cells] of rows) {
    const line = made("tr", "", body);
    made("th", name, line).scope = "row";
    for (const cell of cells) made("td", cell, line);
  }
  for (const note of notes) made("p", note, find("notes"));
  find("measured").hidden = false;
}

class Samples {
  constructor(page, student, teacher) {
    Object.assign(this, {page, student, teacher, order: 0});
    const {image_shape: shape} = page.geometry;
    this.sheet = new Sheet(find("student-sheet"), shape, NUM);
    this.beside = teacher && new Sheet(find("teacher-sheet"), shape, NUM);
  }

  // The class that was asked for; null for the teacher's own.
  get label() {
    return find("class").value === "" ? null : Number(find("class").value);
  }

  async show(first) {
    const order = ++this.order;
    const seeds = Array.from({length: NUM}, (_, index) => first + index);
    this.showTeacher(seeds);
    this.sheet.clear();
    find("student-sheet").setAttribute("aria-label", `the student's images of seeds ${first} to ${first + NUM - 1}`);
    const size = this.page.geometry.image_shape.reduce((a, b) => a * b);
    let taken = 0;
    for (let done = 0; done < NUM; done += AT_ONCE) {
      const start = performance.now();
      const values = await this.student.images(seeds.slice(done, done + AT_ONCE), this.label);
      taken += performance.now() - start;
      if (order !== this.order) return; // another seed was asked for meanwhile
      for (let index = 0; index < AT_ONCE; index++) this.sheet.draw(done + index, values, index * size);
      await new Promise(requestAnimationFrame);
    }
    const {bytes, form} = this.page.model;
    find("status").textContent =
      `Seeds ${first} to ${first + NUM - 1}: ${(taken / NUM).toFixed(1)} ms per image, noise included, on this ` +
      `device (${this.student.device === "webgpu" ? "WebGPU" : "one thread"}); the student has ` +
      `${(bytes / 1e6).toFixed(2)} MB (${form}).`;
    document.body.dataset.shown = `${first}/${this.label ?? ""}`;
  }

  // The teacher's images of these seeds, where the page has them.
  showTeacher(seeds) {
    if (!this.teacher) return;
    const {seeds: known, columns, sprite} = this.teacher;
    this.beside.clear();
    let shown = 0;
    seeds.forEach((seed, index) => {
      const number = known.indexOf(seed);
      if (number < 0 || (this.label !== null && this.label !== this.student.labelOf(seed))) return;
      this.beside.copy(index, sprite, number, columns);
      shown++;
    });
    find("teacher-figure").hidden = !shown;
  }
}

// A seed's recorded states, the teacher's above and the student's submodules' below.
async function walk({states, image_shape: shape}) {
  const {seeds, timesteps, teacher, student} = states;
  const sprites = await Promise.all([picture(teacher), picture(student)]);
  const sheets = ["walk-teacher", "walk-student"].map((id) => new Sheet(find(id), [3, ...shape.slice(1)], 1));
  for (const id of ["walk-teacher", "walk-student"]) [find(id).height, find(id).width] = shape.slice(1);
  for (const seed of seeds) made("option", seed, find("walk-seed"));
  find("walk-state").max = timesteps.length - 1;
  const draw = () => {
    const state = Number(find("walk-state").value);
    const number = find("walk-seed").selectedIndex * timesteps.length + state;
    sheets.forEach((sheet, index) => sheet.copy(0, sprites[index], number, timesteps.length));
    const noise = timesteps[state] < 0 ? "noise" : `noise at timestep ${timesteps[state]} of the teacher`;
    const name = state === timesteps.length - 1 ? "x₀, the image" : noise;
    find("walk-name").textContent = state ? name : `${name}: where both begin`;
  };
  find("walk-seed").addEventListener("change", draw);
  find("walk-state").addEventListener("input", draw);
  find("walk").hidden = false;
  draw();
}

async function start() {
  const answer = await fetch("page.json");
  const page = await answer.json();
  describe(page);
  find("unserved").remove();
  find("sample").hidden = false;
  for (const {label, name} of page.classes) made("option", name, find("class")).value = label;
  find("class-choice").hidden = !page.classes.length;
  const teacher = page.teacher && {...page.teacher, sprite: await picture(page.teacher.images)};
  if (page.teacher?.states) await walk({...page.teacher, image_shape: page.geometry.image_shape});
  find("status").textContent = "Loading the student …";
  const samples = new Samples(page, await Student.load(page), teacher);
  const seed = find("seed");
  const again = () => {
    const first = Math.min(Math.max(Math.floor(Number(seed.value)) || 0, 0), MOST);
    seed.value = first;
    return samples.show(first);
  };
  const fresh = () => {
    seed.value = 2 ** 32 + crypto.getRandomValues(new Uint32Array(1))[0]; // beyond what caches are built from
    return again();
  };
  for (const [id, event, action] of [["seed", "change", again], ["class", "change", again], ["fresh", "click", fresh]]) {
    find(id).disabled = false;
    find(id).addEventListener(event, () => action().catch(complain));
  }
  await again();
}

function complain(error) {
  console.error(error);
  find("status").textContent = `This did not work: ${error.message}`;
}

start().catch(complain);
