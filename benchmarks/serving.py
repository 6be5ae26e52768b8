# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What does `loopmdm serve` cost beside `generate` called directly? Requests a second, of one client and of several, and
the server's memory over many requests. Server and direct calls take turns, on one thread each, with the same prompts.
This makes the table of docs/serving.md:

    python benchmarks/serving.py --threads 1 --output benchmarks/results/serving.json
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import torch
from common import begin, load, make_parser, positive, save_word_model, write_result

TURNS, CLIENTS, NEW_TOKENS = 10, 8, 8
WORDS = [f"w{number}" for number in range(997)]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) / 1024


def study(requests: int, folder: str, client: openai.OpenAI, pid: int) -> dict:
    model, tokenizer = load(folder)
    options = {"max_denoising_steps": NEW_TOKENS // 2}

    def served(number: int) -> str:
        messages = [{"role": "user", "content": f"w{number % 97} w{number % 89}"}]
        request = {"model": folder, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
        return client.chat.completions.create(**request, extra_body=options).choices[0].message.content

    def direct(number: int) -> str:
        inputs = tokenizer(f"w{number % 97} w{number % 89}", return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)[0, 2:]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def together(numbers: range) -> list[str]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(served, numbers))

    ways = {
        "direct": lambda numbers: list(map(direct, numbers)),
        "one client": lambda numbers: list(map(served, numbers)),
        f"{CLIENTS} clients": together,
    }
    size, seconds, memory = requests // TURNS // 2, {way: [] for way in ways}, [resident_mb(pid)]
    for turn in range(-1, TURNS):  # the first warms up
        numbers, texts = range((turn + 1) * size, (turn + 2) * size), []
        for way, run in ways.items():
            started = time.perf_counter()
            texts.append(run(numbers))
            if turn >= 0:
                seconds[way].append((time.perf_counter() - started) / size)
        assert texts[0] == texts[1] == texts[2], "the server answers otherwise"
        memory.append(resident_mb(pid))
        print(f"{2 * (turn + 2) * size} requests, {memory[-1]:.0f} MB", flush=True)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    rates = {way: {"requests_per_second": 1 / s, "ratio": medians["direct"] / s} for way, s in medians.items()}
    return {"rates": rates, "memory_mb": memory, "requests_between": 2 * size}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=positive, default=1000, help="in ten turns; the median turn counts")
    args = parser.parse_args()
    begin(args)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        save_word_model(folder, WORDS, TEMPLATE, hidden_size=64, num_hidden_layers=6)
        command = [sys.executable, "-m", "loopmdm", "serve", folder, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
            try:
                address = server.stdout.readline().split()[0]
                with openai.OpenAI(base_url=address, api_key="none") as client:
                    result = study(args.requests, folder, client, server.pid)
            finally:
                server.terminate()
    for way, row in result["rates"].items():
        print(f"{way:<12} {row['requests_per_second']:7.1f} requests/s {row['ratio']:6.2f} of direct")
    write_result(args, **result)


if __name__ == "__main__":
    main()
