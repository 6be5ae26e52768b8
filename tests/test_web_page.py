# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The page in a real browser, beside torch: what it shows is what the model says, for people of all kinds."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
from browser import Watched, need, serious_faults, serving
from commands import PUZZLE, SOLUTION, refusal
from tiny import tiny_model
from transformers import AutoTokenizer

from loopmdm.commit_rules import COMMIT_RULES, PARALLEL_RULES, DenoisingStep
from loopmdm.evaluation.loading import load_model
from loopmdm.web import serve
from loopmdm.web.export import Board

ROOT = Path(__file__).resolve().parents[1]
ASK = (ROOT / "benchmarks" / "ask_page.js").read_text(encoding="utf-8").split("\n", 1)[1]
HARD = ".12...7..4...67.3.7..52.9..3.....257.9.35......6.......3.7.4....2..1..73874.6...9"
SEVERAL = PUZZLE.replace("5", ".").replace("8", ".")
NUMBERS = itertools.count()  # an address that stays the same changes nothing
DONE = "html[data-done]:not([data-done=''])"


@pytest.fixture(scope="module")
def address():
    need((serve.SITE / "index.html").is_file(), "the page (`make web`)")
    with serving(serve.make_server(serve.SITE)) as address:
        yield address


@pytest.fixture(scope="module")
def watched(browser, address):
    """The page with its model loaded, for all tests that do not need a fresh one."""
    watched = Watched(browser, address, viewport={"width": 1280, "height": 900})
    watched.page.wait_for_selector(DONE, timeout=120_000)
    yield watched
    watched.close()


@pytest.fixture
def page(watched):
    """The page, with nothing gone wrong in it by the end of the test."""
    yield watched.page
    assert watched.faults == []


@pytest.fixture(scope="module")
def model():
    return load_model(str(ROOT), "float32", "cpu")


@pytest.fixture(scope="module")
def board(model):
    return Board.of(model, AutoTokenizer.from_pretrained(ROOT), ".")


def show(page, puzzle: str, loops: int, steps: int, rule: str = "confidence") -> None:
    """Sets everything through the page's address, and waits for the answer."""
    page.evaluate(
        """(hash) => new Promise((resolve) => {
            addEventListener("hashchange", resolve, { once: true });
            location.hash = hash;
        })""",
        f"puzzle={puzzle}&loops={loops}&steps={steps}&rule={rule}&{next(NUMBERS)}",
    )
    page.wait_for_selector(DONE, timeout=60_000)
    page.locator("#position").press("End")
    drawn(page)


def drawn(page) -> None:
    """Waits until what was asked for is on the screen."""
    page.evaluate("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")


def digits(page, side: str = "many") -> str:
    """The board as it is drawn."""
    texts = page.evaluate(f"[...document.querySelectorAll('#{side} .digit')].map((cell) => cell.textContent || '.')")
    return "".join(texts)


def go_to(page, place: int) -> None:
    page.locator("#position").fill(str(place))
    drawn(page)


def answer(model, board: Board, puzzle: str, **arguments) -> str:
    ids = torch.tensor([board.encode(puzzle)])
    return board.decode(model.generate(ids, max_new_tokens=0, **arguments)[0].tolist())


# What it computes


def test_it_loads_nothing_from_elsewhere_and_without_a_fault(watched, address):
    assert watched.faults == []
    assert len(watched.requests) > 10
    assert all(request.startswith((address, "data:")) for request in watched.requests)


@pytest.mark.parametrize(
    ("rule", "arguments"),
    [
        ("confidence", {}),
        ("margin", {"unmasking": "margin"}),
        ("entropy", {"unmasking": "entropy"}),
        ("left_to_right", {"unmasking": "left_to_right"}),
        ("threshold", {"confidence_threshold": 0.9}),
        ("bound", {"entropy_bound": 0.1}),
    ],
)
def test_answers_are_the_tokens_of_generate(page, model, board, rule, arguments):
    """On the page's boards, at one loop and at three, in five steps."""
    show(page, PUZZLE, 3, 5, rule)
    expected = {"once": 1, "many": 3}
    for side, loops in expected.items():
        wanted = answer(model, board, PUZZLE, num_loops=loops, max_denoising_steps=5, **arguments)
        assert digits(page, side) == wanted, (side, rule)


def test_many_puzzles_at_several_settings(page, model, board):
    """Also where the answers are wrong, one after the other in the page's worker."""
    spec = importlib.util.spec_from_file_location("puzzles", ROOT / "examples" / "sudoku" / "puzzles.py")
    puzzles = sys.modules["puzzles"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(puzzles)
    boards = [puzzle for puzzle, _ in puzzles.generate_puzzles(5, 3, 30, 40)]
    different = set()
    for loops, steps in ((1, 1), (6, 1), (2, 7)):
        wanted = [answer(model, board, puzzle, num_loops=loops, max_denoising_steps=steps) for puzzle in boards]
        setting = {"puzzles": boards, "loops": loops, "steps": steps, "rule": "confidence"}
        found = [board.decode(one["tokens"]) for one in page.evaluate(ASK, setting)]
        assert found == wanted
        different.add(tuple(found))
    assert len(different) == 3  # loops and steps matter here


def test_after_every_loop_the_board_shows_what_the_model_would_say(page, model, board):
    show(page, HARD, 4, 1)
    ids = torch.tensor([board.encode(HARD)])
    seen = []
    for loop in range(1, 5):
        go_to(page, loop)
        with torch.no_grad():
            guesses = model(ids, num_loops=loop).logits.argmax(-1)
        assert digits(page) == board.decode(torch.where(ids == board.blank, guesses, ids)[0].tolist())
        seen.append(digits(page))
        changed = page.evaluate("document.querySelectorAll('#many [data-state~=changed]').length")
        before = seen[-2] if loop > 1 else seen[-1]
        assert changed == sum(a != b for a, b in zip(before, seen[-1], strict=True))
        assert f"loop {loop} of 4" in page.inner_text("#status")
    assert len(set(seen)) > 1
    go_to(page, 0)
    assert digits(page) == HARD


def test_a_long_run_has_its_answer_first_and_its_loops_later(page, model, board):
    show(page, HARD, 13, 6)
    assert digits(page) == answer(model, board, HARD, num_loops=13, max_denoising_steps=6)
    go_to(page, 2)
    page.wait_for_selector("#status:has-text('Step 1 of 6, loop 2 of 13')")
    ids = torch.tensor([board.encode(HARD)])
    with torch.no_grad():
        guesses = model(ids, num_loops=2).logits.argmax(-1)
    assert digits(page) == board.decode(torch.where(ids == board.blank, guesses, ids)[0].tolist())


def test_counters_are_those_of_the_answer(page, model, board):
    show(page, HARD, 4, 3)
    once, many = (page.locator(f"#{side} .counts dd").all_inner_texts() for side in ("once", "many"))
    layers = model.config.num_executed_layers
    assert [int(once[2]), int(many[2])] == [3 * layers(1), 3 * layers(4)]
    wrong = answer(model, board, HARD, num_loops=1, max_denoising_steps=3)
    assert int(once[0]) == clashes(wrong)
    assert f"4 \N{MULTIPLICATION SIGN} {model.config.num_mid_layers}" in page.inner_text("#loops-hint")


def clashes(cells: str) -> int:
    """Cells of a full 9 x 9 board that share their digit with another of their row, column or box."""

    def units(cell):
        row, column = divmod(cell, 9)
        return {("row", row), ("column", column), ("box", row // 3, column // 3)}

    return sum(any(cells[a] == cells[b] and units(a) & units(b) for b in range(81) if a != b) for a in range(81))


@pytest.mark.parametrize("kind", ["random", "close"])
@pytest.mark.parametrize("name", ["confidence", "margin", "entropy", "left_to_right", "threshold", "bound"])
def test_commit_rules_choose_as_those_of_the_library(page, name, kind):
    """On random logits with ties, and on margins that differ by rounding; for first, middle and last steps."""
    generator = torch.Generator().manual_seed(len(name))
    logits = 2 * torch.randn(1, 12, 7, generator=generator)
    logits[0, 4] = logits[0, 1]  # a tie
    if kind == "close":
        logits[:] = torch.tensor([0.0, 5, 4.98, 0, 0, 0, 0])
        logits[..., 2] -= 4e-6 * torch.arange(12)  # larger margins on the right
    logits[..., 0] = -torch.inf
    rule = {
        "threshold": PARALLEL_RULES["confidence_threshold"](0.9, COMMIT_RULES["confidence"]()),
        "bound": PARALLEL_RULES["entropy_bound"](0.1, COMMIT_RULES["confidence"]()),
    }.get(name) or COMMIT_RULES[name]()
    for index in (0, 2, 4):
        step = DenoisingStep(
            index,
            [0],
            torch.tensor([0]),
            columns=torch.arange(12)[None],
            masked=torch.ones(1, 12, dtype=torch.bool),
            counted=torch.ones(1, 12, dtype=torch.bool),
            size=torch.tensor([20]),
            num_steps=torch.tensor([5]),
            remask_probability=0.0,
            noise=None,
        )
        step.logits = step.scores = logits
        step.tokens = logits.argmax(-1)
        chosen = page.evaluate(
            """async ([name, logits, index]) => {
                const { RULES, choose, quota, readLogits } = await import("/sampler.js");
                const values = Float32Array.from(logits, (value) => value ?? -Infinity);
                const prediction = readLogits(values, [...Array(12).keys()], 7);
                return choose(RULES[name], prediction, quota(20, 12, index, 5));
            }""",
            [name, [None if value == -torch.inf else value for value in logits.flatten().tolist()], index],
        )
        assert chosen == rule(step)[0].nonzero().flatten().tolist(), index


# What people do with it


def test_puzzles_are_typed_pasted_and_chosen(page):
    show(page, PUZZLE, 2, 1)
    page.locator("#puzzle").fill("." * 81)
    assert "several solutions" in page.inner_text("#about")
    page.get_by_label("Row 1, column 1:").first.wait_for()
    page.evaluate(
        """(text) => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text", text);
            document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
        }""",
        f"{PUZZLE[:40]}\n{PUZZLE[40:]}".replace(".", "0"),
    )
    assert "exactly one solution" in page.inner_text("#about")
    page.wait_for_selector(DONE)
    go_to(page, 0)
    assert digits(page) == PUZZLE
    for name in ("Easy", "Hard", "Harder", "Random"):
        page.get_by_role("button", name=name, exact=True).click()
        assert "exactly one solution" in page.inner_text("#about"), name


def test_the_board_is_filled_in_by_keyboard(page):
    show(page, "." * 81, 1, 1)
    cell = page.locator("#many .cell").first
    cell.focus()
    for key in ("5", "ArrowRight", "3", "ArrowDown", "ArrowLeft", "7", "ArrowUp", "Backspace", "4"):
        page.keyboard.press(key)
    assert page.locator("#puzzle").input_value() == "43" + "." * 7 + "7" + "." * 71
    drawn(page)
    assert page.evaluate("document.activeElement.ariaLabel") == "Row 1, column 1: 4, given"
    # The other board is looked at only.
    page.locator("#once .cell").first.focus()
    page.keyboard.press("9")
    assert page.locator("#puzzle").input_value()[0] == "4"


def test_everything_is_reached_and_works_by_keyboard(page):
    show(page, PUZZLE, 2, 3)
    names = {"many", "position", "play", "next-loop", "next-step", "rewind", "pace", "loops", "steps", "rule"}
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]')?.id"))
    assert names | {"once", "samples", "puzzle"} <= reached
    page.locator("#rewind").focus()
    page.keyboard.press("Enter")
    page.locator("#next-loop").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#status:has-text('Step 1 of 3, loop 1 of 2')")
    page.locator("#next-step").focus()
    page.keyboard.press("Space")
    share = -(-PUZZLE.count(".") // 3)
    page.wait_for_selector(f"#status:has-text('Step 1 of 3: {share} cells committed')")
    page.wait_for_selector(f"#announcement:has-text('{share} cells committed')", state="attached")
    page.locator("#loops").focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#loops-out") == "3"


def test_it_plays_and_pauses(page):
    show(page, PUZZLE, 16, 2)
    page.locator("#pace").select_option("fast")
    page.locator("#play").click()
    page.wait_for_selector("#play:has-text('Pause')")
    page.wait_for_selector("#status:has-text('Solved in 2 steps')", timeout=30_000)
    page.wait_for_selector("#play:has-text('Play')")
    assert digits(page) == SOLUTION
    assert page.locator("#many .verdict").inner_text() == "Solved ✓"
    page.locator("#rewind").click()
    page.locator("#play").click()
    page.locator("#play").click()
    before = page.locator("#position").input_value()
    page.wait_for_timeout(400)
    assert page.locator("#position").input_value() == before


def test_the_chart_sets_the_sliders_and_the_address_holds_them(page):
    show(page, PUZZLE, 2, 2)
    page.get_by_role("button", name=re.compile("^4 loops, 1 step:")).click()
    assert [page.inner_text("#loops-out"), page.inner_text("#steps-out")] == ["4", "1"]
    page.wait_for_timeout(500)
    assert f"puzzle={PUZZLE}&loops=4&steps=1&rule=confidence" in page.evaluate("location.hash")
    page.locator("#loops").fill("20")
    assert "trained with at most 16" in page.inner_text("#loops-hint")
    page.locator("#steps").fill("40")
    assert "beyond what was measured" in page.inner_text("#measured-hint")


def test_a_cell_says_what_the_model_makes_of_it(page):
    show(page, HARD, 2, 1)
    go_to(page, 1)
    page.locator("#many .cell").first.hover()
    assert re.match(r"Row 1, column 1: \d \(\d+ %\)", page.inner_text("#inspected"))


# Bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PUZZLE[:-1], "The text has 80 characters; a 9 \N{MULTIPLICATION SIGN} 9 board takes 81"),
        (PUZZLE.replace("7", "x", 1), "Character 3 is “x”"),
        ("", "The text has 0 characters"),
        ("55" + "." * 79, "Row 1 has more than one 5, so this puzzle has no solution."),
        ("5........5" + "." * 71, "Column 1 has more than one 5"),
        (SEVERAL, "several solutions"),
        ("12345678." + "........9" + "." * 63, "no solution"),
        (SOLUTION, "nothing to fill in"),
    ],
)
def test_puzzles_that_are_none_are_answered(page, text, said):
    show(page, PUZZLE, 2, 1)
    page.locator("#puzzle").fill(text)
    assert said in page.inner_text("#about")


def test_a_new_address_is_read_although_the_old_settings_were_written_over_it(page):
    """The page writes its address a moment after every change, which may be before it hears of the new one."""
    show(page, PUZZLE, 2, 1, "entropy")
    rule = page.evaluate(
        """(hash) => new Promise((resolve) => {
            addEventListener("hashchange", () => resolve(document.querySelector("#rule").value), { once: true });
            const old = location.href;
            location.hash = hash;
            history.replaceState(null, "", old);
        })""",
        f"puzzle={PUZZLE}&loops=2&steps=1&rule=margin",
    )
    assert rule == "margin"


def test_an_address_that_holds_no_puzzle_is_answered(page):
    page.evaluate("location.hash = 'puzzle=12x&loops=99&steps=-1&rule=none'")
    page.wait_for_selector("#about:has-text('of this page\\'s address: Character 3 is “x”')")
    assert 1 <= int(page.inner_text("#loops-out")) <= 24


def test_contradictory_clues_are_marked(page):
    page.locator("#puzzle").fill("55" + "." * 79)
    page.wait_for_selector(DONE)
    go_to(page, 0)
    assert page.locator("#many [data-state='given clash']").count() == 2


def test_a_browser_without_simd_is_told(browser, address):
    watched = Watched(browser, address, init="WebAssembly.validate = () => false")
    watched.page.wait_for_selector("#trouble:visible")
    assert "WebAssembly with SIMD" in watched.page.inner_text("#trouble")
    assert watched.faults == []
    watched.close()


# For everybody


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_of_accessibility(page, scheme):
    page.emulate_media(color_scheme=scheme)
    show(page, HARD, 3, 2)
    go_to(page, 3)
    assert serious_faults(page) == []
    page.emulate_media(color_scheme="light")


def test_on_a_phone_nothing_sticks_out_and_the_sliders_follow_the_board(page):
    page.set_viewport_size({"width": 320, "height": 780})
    try:
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.set_viewport_size({"width": 360, "height": 780})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        board, slider = (page.locator(name).bounding_box() for name in ("#many .board", "#steps"))
        assert board["width"] > 300
        assert slider["y"] + slider["height"] - board["y"] < 780  # in view together
        assert serious_faults(page) == []
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})


def test_the_layout_does_not_shift(browser, address):
    """From the first paint, while the model loads and the run plays."""
    observe = (
        "window.shift = 0; new PerformanceObserver((list) => list.getEntries().forEach((entry) =>"
        " { window.shift += entry.value; })).observe({ type: 'layout-shift', buffered: true })"
    )
    watched = Watched(browser, address, init=observe, viewport={"width": 1280, "height": 900})
    watched.page.wait_for_selector(DONE, timeout=120_000)
    for place in range(0, 29, 4):
        go_to(watched.page, place)
    assert watched.page.evaluate("window.shift") < 0.05
    watched.close()


# The command and its server


def test_a_page_that_is_not_built_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "SITE", tmp_path)
    assert "run `make web`" in refusal("web", "--no-open")


def test_models_that_fill_in_no_boards_are_named(monkeypatch, tmp_path):
    (tmp_path / "index.html").write_text("")
    monkeypatch.setattr(serve, "SITE", tmp_path)
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text((ROOT / name).read_text())
    said = refusal("web", model, "--no-open")
    assert "its 64 positions are not those of a board" in said or "vocabulary" in said
    assert "generate --html" in said


@pytest.mark.parametrize("port", [-1, 70000])
def test_ports_that_there_are_not_are_named(port):
    assert f"--port is {port}" in refusal("web", "--no-open", "--port", port)


def test_the_server_gives_the_site_and_another_model_and_nothing_else(tmp_path):
    import urllib.error
    import urllib.request

    site, model = tmp_path / "site", tmp_path / "other"
    (site / "model").mkdir(parents=True)
    model.mkdir()
    (site / "index.html").write_text("page")
    (site / "model" / "model.json").write_text("ours")
    (model / "model.json").write_text("theirs")
    (tmp_path / "secret").write_text("no")
    with serving(serve.make_server(site, model=model)) as address:

        def get(path):
            return urllib.request.urlopen(address + path).read().decode()

        assert get("") == "page"
        assert get("model/model.json") == "theirs"
        for path in ("model/..%2fsecret", "model/%2e%2e/secret", "../secret", "model/../../secret"):
            with pytest.raises(urllib.error.HTTPError):
                get(path)
    with serving(serve.make_server(site)) as address:
        assert get("model/model.json") == "ours"
