# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Does the page answer as torch does, and how fast does it load and answer, in headless Chromium? This makes the table of
docs/web.md:

    make web && python benchmarks/web_page.py --threads 1 --output benchmarks/results/web_page.json

Loading is from the start of navigation until the model is ready, from this machine's disk; the first answer counts
from there. Answers are those of the page's own worker, without readings between the loops; torch is timed on the same
puzzles one by one. Needs playwright and Chromium (CHROMIUM names its program).
"""

import os
import statistics
import threading

import torch
from common import ROOT, begin, load, make_parser, positive, puzzles, timed, write_result
from playwright.sync_api import sync_playwright

from loopmdm.web.export import Board
from loopmdm.web.serve import make_server, site_folder

SETTINGS = (
    {"loops": 1, "steps": 1, "rule": "confidence"},
    {"loops": 16, "steps": 4, "rule": "confidence"},
    {"loops": 6, "steps": 4, "rule": "margin"},
    {"loops": 12, "steps": 81, "rule": "threshold"},
)
ARGUMENTS = {  # of `generate`, for the page's rules above
    "confidence": {"unmasking": "confidence"},
    "margin": {"unmasking": "margin"},
    "threshold": {"unmasking": "confidence", "confidence_threshold": 0.9},
}
BROWSER = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def load_times(browser, url: str) -> dict[str, float]:
    """Seconds until the model of a fresh browser is ready, and from there until the page's first answer."""
    page = browser.new_context(reduced_motion="reduce").new_page()
    page.add_init_script(
        "new MutationObserver(() => { const { ready, done } = document.documentElement.dataset;"
        "if (ready && !window.readyAt) window.readyAt = performance.now();"
        "if (done && !window.doneAt) window.doneAt = performance.now(); }).observe(document,"
        "{ attributes: true, subtree: true, attributeFilter: ['data-ready', 'data-done'] })"
    )
    page.goto(url)
    page.wait_for_selector("html[data-done]:not([data-done=''])", timeout=120_000)
    ready, done = page.evaluate("[window.readyAt, window.doneAt]")
    page.close()
    return {"ready": ready / 1000, "first_answer": (done - ready) / 1000}


def compare(page, model, board: Board, boards: list[str], setting: dict) -> dict:
    """How many answers and tokens of the page are those of `generate`, and the time of either."""
    source = (ROOT / "benchmarks" / "ask_page.js").read_text()
    answers = page.evaluate(source.split("\n", 1)[1], {"puzzles": boards, **setting})
    same, same_tokens, seconds = 0, 0, []
    for puzzle, answer in zip(boards, answers, strict=True):
        ids = torch.tensor([board.encode(puzzle)])
        arguments = {"num_loops": setting["loops"], "max_denoising_steps": setting["steps"]}
        arguments |= ARGUMENTS[setting["rule"]]
        taken, output = timed(lambda i=ids, a=arguments: model.generate(i, max_new_tokens=0, **a))
        seconds.append(taken)
        hits = sum(a == b for a, b in zip(output[0].tolist(), answer["tokens"], strict=True))
        same, same_tokens = same + (hits == len(puzzle)), same_tokens + hits
    row = {
        **setting,
        "puzzles": len(boards),
        "same_answers": same,
        "same_tokens": same_tokens / (len(boards) * board.side**2),
        "page_ms": statistics.median(answer["milliseconds"] for answer in answers),
        "torch_ms": 1000 * statistics.median(seconds),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=positive, default=100, help="puzzles of each setting")
    args = parser.parse_args()
    begin(args)
    model, tokenizer = load()
    board = Board.of(model, tokenizer, str(ROOT))
    boards = [puzzle for puzzle, _ in puzzles.generate_puzzles(args.count, args.seed + 11, 32, 46)]
    server = make_server(site_folder())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=program, args=list(BROWSER))
        times = [load_times(browser, url) for _ in range(3)]
        print(times)
        page = browser.new_page()
        page.goto(url)
        rows = [compare(page, model, board, boards, setting) for setting in SETTINGS]
        version = browser.version
        browser.close()
    write_result(args, chromium=version, loading=times, answers=rows)


if __name__ == "__main__":
    main()
