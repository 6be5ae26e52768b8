# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
`loopmdm generate --data` on many rows: is the file the same for any number of processes, batch size and kill, and how
fast are batches beside a loop over single rows? A random model continues texts of random words and lengths, as the
command does it, in processes of one thread. The figures are in docs/generation.md. It takes about half an hour on two
cores.

    python benchmarks/rows.py --output benchmarks/results/rows.json

With `--bundled` the bundled model fills in one to eight blanks of grids and of their beginnings, for batches of three
sizes and one, two and four processes:

    python benchmarks/rows.py --bundled --rows 10000 --output benchmarks/results/rows_bundled.json
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import begin, in_turn, load, make_parser, save_word_model, write_result

from loopmdm.evaluation import generate_rows

WORDS = [f"w{number}" for number in range(253)]
SIZES = {"greedy": (64, 7, 1), "drawn": (64, 7)}
SETTINGS = {
    "greedy": ["--max-new-tokens", "8", "--max-denoising-steps", "4"],
    "drawn": ["--max-new-tokens", "8", "--max-denoising-steps", "4", "--do-sample"],
}


def write_data(path: Path, count: int, seed: int) -> None:
    """Texts of 1 to 100 words; every hundredth line is not JSON."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, 100)))
            file.write("{\n" if number % 100 == 50 else json.dumps({"text": text}) + "\n")


def write_grids(path: Path, count: int, seed: int) -> None:
    """Grids, or their first 20 cells or more, without 1 to 8 of their digits; every hundredth line is not JSON."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            digits, bands, stacks = (
                generator.sample(*args) for args in (("123456789", 9), (range(3), 3), (range(3), 3))
            )
            order = [(3 * (r % 3) + bands[r // 3] + 3 * stacks[c // 3] + c) % 9 for r in range(9) for c in range(9)]
            cells = [digits[place] for place in order[: generator.randint(20, 81)]]
            for place in generator.sample(range(len(cells)), generator.randint(1, 8)):
                cells[place] = "."
            file.write("{\n" if number % 100 == 50 else json.dumps({"text": "".join(cells)}) + "\n")


class Command:
    """`loopmdm generate` on the model and the data in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, output: str, *options: str, processes: int = 1, **environment: str) -> subprocess.Popen:
        """The command, with torchrun for several processes."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "loopmdm_cli", "generate", "model"]
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
        process = self.start(output, *options, processes=processes)
        self.wait_for_plan(process, output)
        started = time.perf_counter()
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        seconds = time.perf_counter() - started
        digest = hashlib.sha256((self.folder / output).read_bytes()).hexdigest()
        print(f"  {output}: {seconds:.1f} s, {digest[:12]}", flush=True)
        return {"seconds": seconds, "sha256": digest}

    def wait_for_plan(self, process: subprocess.Popen, output: str) -> None:
        while process.poll() is None and not (self.folder / f"{output}.run" / "run.json").exists():
            time.sleep(0.01)

    def run_killed(self, output: str, seconds: float, kills: int, seed: int, *options: str) -> dict[str, Any]:
        """
        Kills it by turns of one process and of two (without a launcher, whose processes outlive it), each time at a
        random moment after a batch was finished; then runs it to its end.
        """
        generator, done = random.Random(seed), []
        while len(done) < kills:
            number, before = 1 + len(done) % 2, self.finished(output)
            ranks = [{"RANK": str(rank), "WORLD_SIZE": str(number)} for rank in range(number)]
            started = [self.start(output, *options, **rank) for rank in ranks]
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


def study(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """A random model by the command: batches, processes and kills, and batches beside a loop over single rows."""
    results: dict[str, Any] = {}
    shape = {"hidden_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 128}
    save_word_model(folder / "model", WORDS, initializer_range=0.1, **shape)
    write_data(folder / "in.jsonl", count, seed)
    command = Command(folder)
    for setting, options in SETTINGS.items():
        print(setting, flush=True)
        sizes = {}
        for size in SIZES[setting]:
            output = f"{setting}-batches-of-{size}"
            sizes[size] = command.run(output, *options, "--batch-size", str(size))
            sizes[size]["rows_that_differ"] = differing(folder / output, folder / f"{setting}-batches-of-64")
        results[setting] = {"batch_sizes": sizes}
    options = [*SETTINGS["drawn"], "--batch-size", "64"]
    processes = {n: command.run(f"processes-{n}", *options, processes=n) for n in (2, 4)}
    whole = results["drawn"]["batch_sizes"][64]
    killed = command.run_killed("killed", whole["seconds"], 10, seed, *options)
    for run in (*processes.values(), killed):
        run["is_same"] = run["sha256"] == whole["sha256"]
    results["throughput"] = throughput(folder)
    results["drawn"] |= {"processes": processes, "killed": killed}
    return results


def study_bundled(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Every run is compared with that of one process in batches of 64."""
    for part in load():
        part.save_pretrained(folder / "model")
    write_grids(folder / "in.jsonl", count, seed)
    command, results = Command(folder), {}
    for name, size, processes in (
        ("batches-of-64", 64, 1),
        ("processes-2", 64, 2),
        ("processes-4", 64, 4),
        ("batches-of-7", 7, 1),
        ("batches-of-1", 1, 1),
    ):
        options = ("--num-loops", "2", "--max-denoising-steps", "2", "--batch-size", str(size))
        results[name] = command.run(name, *options, processes=processes)
        results[name]["is_same"] = results[name]["sha256"] == results["batches-of-64"]["sha256"]
        results[name]["rows_that_differ"] = differing(folder / name, folder / "batches-of-64")
    return results


def throughput(folder: Path) -> dict[str, Any]:
    """CPU seconds on one thread, one way after the other, for the first 500 rows, loading included."""
    lines = (folder / "in.jsonl").read_text().splitlines()[:500]
    (folder / "few.jsonl").write_text("\n".join(lines))
    options, numbers = {"max_new_tokens": 8, "max_denoising_steps": 4}, itertools.count()

    def in_batches(size: int) -> None:
        generate_rows(
            str(folder / "model"), folder / "few.jsonl", folder / f"few-{next(numbers)}", batch_size=size, **options
        )

    def one_by_one() -> None:
        model, tokenizer = load(folder / "model")
        for text in (json.loads(line)["text"] for line in lines if line != "{"):
            tokens = model.generate(tokenizer(text, return_tensors="pt")["input_ids"], **options)
            tokenizer.decode(tokens[0], skip_special_tokens=True)

    runs = {
        "loop over single rows": one_by_one,
        **{f"batches of {size}": partial(in_batches, size) for size in (1, 7, 64)},
    }
    torch.set_num_threads(1)
    seconds, _ = in_turn(runs, 1, clock="cpu", what="throughput")
    (loop,) = seconds["loop over single rows"]
    return {name: {"cpu_seconds": taken, "times_the_loop": loop / taken} for name, (taken,) in seconds.items()}


def differing(one: Path, other: Path) -> int:
    """How many lines of two files differ."""
    pairs = zip(one.read_bytes().splitlines(), other.read_bytes().splitlines(), strict=True)
    return sum(a != b for a, b in pairs)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--bundled", action="store_true", help="the bundled model, and nothing but these runs")
    parser.add_argument("--rows", type=int, default=2000)
    args = parser.parse_args()
    begin(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = study_bundled(folder, args.rows, args.seed) if args.bundled else study(folder, args.rows, args.seed)
    print(json.dumps(results, indent=2))
    write_result(args, results=results, torch_threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
