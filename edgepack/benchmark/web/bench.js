// Runs the models of one benchmark, interleaved, and posts times and outputs back.
import * as ort from "./ort/ort.wasm.min.mjs";

const TURN_MS = 5; // browsers' clocks are coarse: the least duration of a turn
const MOST_CALLS = 200;
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  bool: Uint8Array, float16: Uint16Array,
};
const at = (id) => document.getElementById(id);
const breathe = () => new Promise((done) => setTimeout(done));
const bytes = async (name) => {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer.arrayBuffer();
};
const middle = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};
const told = (ms) => (ms >= 1 ? `${ms.toFixed(2)} ms` : `${(1000 * ms).toFixed(0)} µs`);
const stage = (text, share) => {
  at("stage").textContent = text;
  at("progress").value = share;
};

const show = (job, times, cold) => {
  const rows = job.models.map((model, i) => {
    const row = document.createElement("tr");
    const cell = (text, name = "td") => {
      const element = document.createElement(name);
      element.textContent = text;
      if (name === "td") element.className = "num";
      row.append(element);
      return element;
    };
    const head = cell(model.name, "th");
    head.scope = "row";
    head.append(Object.assign(document.createElement("small"), { textContent: `${(model.bytes / 1e3).toFixed(0)} kB` }));
    const measured = times[i].length > 0;
    cell(measured ? told(middle(times[i])) : "–");
    cell(measured ? `${middle(times[i].map((t, k) => times[0][k] / t)).toFixed(2)}×` : "–");
    cell(cold[i] === undefined ? "–" : told(cold[i]));
    return row;
  });
  at("rows").replaceChildren(...rows);
};

const turn = async (session, feed) => {
  const release = (outputs) => Object.values(outputs).forEach((tensor) => tensor.dispose());
  release(await session.run(feed)); // runs with another model's data in the caches
  let calls = 0;
  const started = performance.now();
  let spent = 0;
  do {
    release(await session.run(feed));
    calls += 1;
    spent = performance.now() - started;
  } while (spent < TURN_MS && calls < MOST_CALLS);
  return spent / calls;
};

const measure = async (job, models, feeds) => {
  const sessions = [];
  const cold = [];
  const outputs = [];
  const times = job.models.map(() => []);
  const open = (i) => ort.InferenceSession.create(models[i].slice(0), { executionProviders: ["wasm"] });
  await (await open(0)).release(); // starts the runtime, which is not part of a cold start
  for (let i = 0; i < models.length; i++) {
    stage(`${job.models[i].name}: first run`, i / models.length / 5);
    await breathe();
    const started = performance.now();
    sessions.push(await open(i));
    for (let s = 0; s < feeds.length; s++) {
      const found = await sessions[i].run(feeds[s]);
      if (!s) cold.push(performance.now() - started);
      for (const [name, tensor] of Object.entries(found)) {
        const own = new Uint8Array(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength).slice();
        outputs.push({ model: i, sample: s, name, type: tensor.type, dims: tensor.dims, data: own });
      }
    }
    show(job, times, cold);
  }
  for (let round = 0; round < job.runs; round++) {
    for (let k = 0; k < sessions.length; k++) {
      const i = (round + k) % sessions.length;
      times[i].push(await turn(sessions[i], feeds[round % feeds.length]));
    }
    stage(`Round ${round + 1} of ${job.runs}`, 0.2 + (0.8 * (round + 1)) / job.runs);
    if (round % 5 === 4 || round + 1 === job.runs) show(job, times, cold);
    await breathe();
  }
  return { times, cold, outputs };
};

const browser = () => {
  const agent = navigator.userAgent;
  const known = agent.match(/(Firefox|Edg|OPR|Chrome)\/(\d+)/) ?? agent.match(/(Version)\/(\d+).*Safari/);
  return known ? `${known[1].replace("Version", "Safari").replace("Edg", "Edge")} ${known[2]}` : "a browser";
};

const answer = ({ times, cold, outputs }) => {
  const described = outputs.map(({ data, ...rest }) => ({ ...rest, bytes: data.byteLength }));
  const facts = {
    browser: browser(), agent: navigator.userAgent, system: navigator.platform, cores: navigator.hardwareConcurrency,
    threads: ort.env.wasm.numThreads, isolated: crossOriginIsolated, onnxruntime: ort.env.versions.web ?? ort.env.versions.common,
  };
  const head = new TextEncoder().encode(JSON.stringify({ ...facts, times, cold, outputs: described }));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, head.length, true);
  return new Blob([length.buffer, head, ...outputs.map((o) => o.data)]);
};

const finish = (id, text) => {
  at("stage").textContent = text;
  at("start").textContent = id === "done" ? "Done" : "Failed";
  document.body.dataset.state = id;
};

const run = async (job, models, feeds) => {
  at("start").disabled = true;
  at("start").textContent = "Running …";
  const result = await measure(job, models, feeds);
  stage("Results are being sent.", 1);
  const sent = await fetch("answer", { method: "POST", body: answer(result) });
  if (!sent.ok) throw new Error(`the host refuses the results: ${await sent.text()}`);
  finish("done", "Done: the results are in edgepack's report. You can close this page.");
};

const failed = async (error) => {
  finish("failed", `It failed: ${error.message ?? error}`);
  await fetch("failure", { method: "POST", body: String(error.message ?? error).slice(0, 500) }).catch(() => {});
};

try {
  const job = JSON.parse(new TextDecoder().decode(await bytes("job.json")));
  ort.env.wasm.wasmPaths = new URL("./ort/", location.href).href;
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(job.threads, navigator.hardwareConcurrency || 1) : 1;
  ort.env.logLevel = "error";
  at("where").textContent = `${browser()}, ${ort.env.wasm.numThreads} thread(s)`;
  const models = [];
  for (let i = 0; i < job.models.length; i++) {
    stage(`${job.models[i].name} is being fetched.`, 0);
    models.push(new Uint8Array(await bytes(`model/${i}`)));
  }
  const feeds = [];
  for (const sample of job.feeds) {
    const feed = {};
    for (const { name, type, dims, file } of sample) feed[name] = new ort.Tensor(type, new ARRAYS[type](await bytes(file)), dims);
    feeds.push(feed);
  }
  show(job, job.models.map(() => []), []);
  stage("Ready.", 0);
  at("start").textContent = "Start";
  at("start").disabled = false;
  at("start").addEventListener("click", () => run(job, models, feeds).catch(failed), { once: true });
} catch (error) {
  await failed(error);
}
