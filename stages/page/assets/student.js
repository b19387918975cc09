// The exported student: x_T → images, by onnxruntime-web.

import * as ort from "onnxruntime-web";

import {standardNormal} from "./noise.js";

export class Student {
  // page: what page.json says.
  static async load(page) {
    const student = new Student();
    student.geometry = page.geometry;
    ort.env.wasm.numThreads = 1; // more need headers that hosts of static files don't send
    const {wasm, integrity} = page.runtime;
    ort.env.wasm.wasmBinary = await download(wasm, {integrity, mode: "cors", credentials: "omit"});
    const executionProviders = page.model.webgpu && "gpu" in navigator ? ["webgpu", "wasm"] : ["wasm"];
    student.device = executionProviders[0];
    student.network = await session(page.model.file, executionProviders);
    student.decoder = page.model.decoder ? await session(page.model.decoder, executionProviders) : null;
    return student;
  }

  // The class that the teacher drew for a seed; null for an unconditional student.
  labelOf(seed) {
    const {labels} = this.geometry;
    return labels.length ? labels[seed % labels.length] : null;
  }

  // Images of some seeds, about [−1, 1]: Float32Array of seeds × C × H × W.
  // label: of all of them; null for the teacher's own.
  async images(seeds, label = null) {
    const {root_seed: root, noise_dtype: dtype, item_shape: shape} = this.geometry;
    const noise = standardNormal(root, seeds, shape[0] * shape[1] * shape[2], dtype);
    const given = {noise: new ort.Tensor("float32", noise, [seeds.length, ...shape])};
    if (this.geometry.labels.length) {
      const labels = seeds.map((seed) => BigInt(label ?? this.labelOf(seed)));
      given.label = new ort.Tensor("int64", BigInt64Array.from(labels), [seeds.length]);
    }
    let {images} = await this.network.run(given);
    if (this.decoder) ({images} = await this.decoder.run({latents: images}));
    return images.getData();
  }
}

const session = async (file, executionProviders) =>
  ort.InferenceSession.create(await download(file), {executionProviders, graphOptimizationLevel: "all"});

async function download(address, options = {}) {
  const answer = await fetch(address, options);
  if (!answer.ok) throw new Error(`${address}: ${answer.status} ${answer.statusText}`);
  return new Uint8Array(await answer.arrayBuffer());
}
