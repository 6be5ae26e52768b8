# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
`loopmdm generate --data` on many rows: is the file the same for any number of processes, batch size and kill, and how
fast are batches beside a loop over single rows? The bundled model fills in blanks of random lines of digits, as the
command does it, in processes of its own. Results are written after every part.

    python benchmarks/rows.py --output benchmarks/results/rows.json
"""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import begin, in_turn, make_parser, write_result
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import generate_rows

MODEL = Path(__file__).resolve().parent.parent  # the bundled one
SIZES = {"greedy": (64, 7, 1), "drawn": (64, 7)}
OPTIONS = {"num_loops": 2, "max_denoising_steps": 2}
FLAGS = [part for name, value in OPTIONS.items() for part in ("--" + name.replace("_", "-"), str(value))]
SETTINGS = {"greedy": FLAGS, "drawn": [*FLAGS, "--do-sample"]}


def write_data(path: Path, count: int, seed: int) -> None:
    """Lines of 9 to 27 digits, of which one to nine are blank; every hundredth line is not JSON."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            cells = generator.choices("123456789", k=generator.randint(9, 27))
            for place in generator.sample(range(len(cells)), generator.randint(1, 9)):
                cells[place] = "."
            file.write("{\n" if number % 100 == 50 else json.dumps({"text": "".join(cells)}) + "\n")


class Command:
    """`loopmdm generate` on the data in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, output: str, *options: str, processes: int = 1, **environment: str) -> subprocess.Popen:
        """The command, with torchrun for several processes."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "loopmdm_cli", "generate", str(MODEL)]
        offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [*command, "--data", "in.jsonl", "--output", output, *options],
            cwd=self.folder,
            env={**os.environ, **offline, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, output: str, *options: str, processes: int = 1) -> dict[str, Any]:
        """Runs it to its end: the wall time from the start of the run, with loading, and the file's hash."""
        return self.finish(output, [self.start(output, *options, processes=processes)])

    def run_by_hand(self, output: str, *options: str, machines: int) -> dict[str, Any]:
        """The same with a launch for each of several machines, which know of each other by their environment alone."""
        return self.finish(output, self.start_by_hand(output, *options, machines=machines))

    def start_by_hand(self, output: str, *options: str, machines: int) -> list[subprocess.Popen]:
        ranks = [{"RANK": str(rank), "WORLD_SIZE": str(machines)} for rank in range(machines)]
        return [self.start(output, *options, **rank) for rank in ranks]

    def finish(self, output: str, processes: list[subprocess.Popen]) -> dict[str, Any]:
        while processes[0].poll() is None and not (self.folder / f"{output}.run" / "run.json").exists():
            time.sleep(0.01)
        started = time.perf_counter()
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        seconds = time.perf_counter() - started
        digest = hashlib.sha256((self.folder / output).read_bytes()).hexdigest()
        print(f"  {output}: {seconds:.1f} s, {digest[:12]}", flush=True)
        return {"output": output, "seconds": seconds, "sha256": digest}

    def run_killed(self, output: str, seconds: float, kills: int, seed: int, *options: str) -> dict[str, Any]:
        """
        Kills it by turns of one process and of two (without a launcher, whose processes outlive it), each time at a
        random moment after a batch was finished; then runs it to its end.
        """
        generator, done = random.Random(seed), []
        while len(done) < kills:
            number, before = 1 + len(done) % 2, self.finished(output)
            started = self.start_by_hand(output, *options, machines=number)
            while started[0].poll() is None and self.finished(output) == before:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, seconds / kills / 4))
            was_alive = [process.poll() is None for process in started]
            for process in started:
                process.kill()
                process.communicate()
            if not any(was_alive):
                break
            done.append(self.finished(output))
            print(f"  kill {len(done)}: {done[-1]} batches are finished", flush=True)
        return {"kills": len(done), "finished_batches": done, **self.run(output, *options)}

    def finished(self, output: str) -> int:
        """Batches in the files of a run."""
        parts = (self.folder / f"{output}.run").glob("*-*.jsonl")
        return sum(line.endswith(b"\n") and line != b"\n" for path in parts for line in path.open("rb"))


def throughput(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """CPU seconds on one thread, in turns, for the first rows: the fastest round of each, loading included."""
    lines = (folder / "in.jsonl").read_text().splitlines()[:count]
    (folder / "few.jsonl").write_text("\n".join(lines))
    numbers = itertools.count()

    def in_batches(size: int) -> None:
        generate_rows(str(MODEL), folder / "few.jsonl", folder / f"few-{next(numbers)}", batch_size=size, **OPTIONS)

    def one_by_one() -> None:
        model = LoopMDMForMaskedLM.from_pretrained(MODEL).eval()
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        for text in (json.loads(line)["text"] for line in lines if line != "{"):
            tokens = model.generate(tokenizer(text, return_tensors="pt")["input_ids"], **OPTIONS)
            tokenizer.decode(tokens[0], skip_special_tokens=True)

    runs = {
        "loop over single rows": one_by_one,
        **{f"batches of {size}": partial(in_batches, size) for size in (1, 7, 64)},
    }
    torch.set_num_threads(1)
    seconds, _ = in_turn(runs, repeats, clock="cpu", what="throughput")
    best = {name: min(taken) for name, taken in seconds.items()}
    loop = best["loop over single rows"]
    return {name: {"cpu_seconds": taken, "times_the_loop": loop / taken} for name, taken in best.items()}


def differing(one: Path, other: Path) -> int:
    """How many lines of two files differ."""
    pairs = zip(one.read_bytes().splitlines(), other.read_bytes().splitlines(), strict=True)
    return sum(a != b for a, b in pairs)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other, whose seconds say little")
    parser.add_argument("--throughput-rows", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    begin(args)
    results: dict[str, Any] = {}

    def record(name: str, part: Any) -> None:
        results[name] = part
        write_result(args, results=results, torch_threads=torch.get_num_threads())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "in.jsonl", args.rows, args.seed)
        command, options = Command(folder), [*SETTINGS["drawn"], "--batch-size", "64"]
        runs = {
            f"{setting}, batches of {size}": partial(
                command.run, f"{setting}-{size}", *flags, "--batch-size", str(size)
            )
            for setting, flags in SETTINGS.items()
            for size in SIZES[setting]
        }
        runs |= {f"{n} processes": partial(command.run, f"drawn-by-{n}", *options, processes=n) for n in (2, 4)}
        runs["2 launches by hand"] = partial(command.run_by_hand, "drawn-by-hand", *options, machines=2)
        found = {}
        with ThreadPoolExecutor(args.at_once) as pool:
            futures = {pool.submit(run): name for name, run in runs.items()}
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                record("runs", found)
        for run in found.values():
            whole = folder / f"{run['output'].partition('-')[0]}-64"
            run["rows_that_differ"] = differing(folder / run["output"], whole)
        record("runs", found)
        if args.kills:
            killed = command.run_killed(
                "killed", found["drawn, batches of 64"]["seconds"], args.kills, args.seed, *options
            )
            record("killed", {**killed, "rows_that_differ": differing(folder / "killed", folder / "drawn-64")})
        record("throughput", throughput(folder, args.throughput_rows, args.repeats))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
