// Asks the page's own worker for answers: of every puzzle the tokens, at one setting, and the milliseconds it took.
async ({ puzzles, loops, steps, rule, backend }) => {
  const { Run } = await import("/run.js");
  const about = await (await fetch("/model/model.json")).json();
  const worker = new Worker("/worker.js", { type: "module" });
  const heard = (isIt) =>
    new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => {
        if (data.type === "error") reject(new Error(data.message));
        if (isIt(data)) resolve(data);
      };
      worker.onerror = (event) => reject(new Error(event.message));
    });
  const ready = heard(({ type }) => type === "ready");
  worker.postMessage({ type: "load", backend: backend ?? "wasm", description: about });
  await ready;
  const answers = [];
  for (const puzzle of puzzles) {
    const clues = [...puzzle].map((char) => Number(char) || 0);
    const request = new Run({ clues, loops, steps, rule }, about).request();
    const started = performance.now();
    const done = heard(({ type, id }) => type === "done" && id === request.id);
    worker.postMessage({ ...request, sides: [loops], every: false });
    answers.push({ tokens: (await done).answers[0], milliseconds: performance.now() - started });
  }
  worker.terminate();
  return answers;
};
