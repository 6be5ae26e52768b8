# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The trace file in a real browser: it plays what the trace holds, and loads and runs nothing else."""

from pathlib import Path

import pytest
import torch
from browser import Watched, serious_faults
from test_web_trace import Words, generate, made_up
from tiny import MASK, tiny_model

from loopmdm.generation_outputs import LoopMDMGenerationOutput
from loopmdm.web import trace_to_html

EVIL = " <img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def output():
    """Two rows in two blocks of a tiny model."""
    return generate(tiny_model(), [[5, MASK, 7, 8], [9, 8, 7, 6]], max_new_tokens=6, block_length=4)


def opened(browser, tmp_path: Path, html: str, **options) -> Watched:
    path = tmp_path / "trace.html"
    path.write_text(html, encoding="utf-8")
    watched = Watched(browser, path.as_uri(), **options)
    watched.page.wait_for_selector("html[data-ready]", state="attached")
    return watched


def texts(page, row: int) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('.tokens')[{row}].children].map((span) => span.innerText)")


def kinds(page, row: int) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('.tokens')[{row}].children].map((span) => span.dataset.kind)")


def test_it_plays_what_the_trace_holds(browser, output, tmp_path):
    words = Words({5: EVIL})
    watched = opened(browser, tmp_path, trace_to_html(output, words, names=["first", "second"]))
    page = watched.page
    assert page.locator("#place").get_attribute("max") == str(len(output.trace))
    for row in range(2):
        assert texts(page, row)[4:] == [words.decode([token]) for token in output.sequences[row, 4:].tolist()]
    assert texts(page, 0)[0] == EVIL
    page.locator("#place").fill("0")
    assert set(kinds(page, 0)) == {"given", "waiting"}
    for number, step in enumerate(output.trace, start=1):
        page.locator("#on").click()
        for row in range(2):
            committed = step.committed[row].tolist()
            assert [kind == "committed" for kind in kinds(page, row)] == committed
            loops = int(step.loops[row])
            said = f"{sum(committed)} token{'s' * (sum(committed) != 1)} committed, {loops} loop{'s' * (loops != 1)}"
            assert page.locator(".here").nth(row).inner_text() == said
        assert page.inner_text("#step").startswith(f"Step {number} of {len(output.trace)}, block {step.block + 1}")
        assert f"{int(step.committed.sum())} token" in page.inner_text("#step")
    page.locator("#play").click()
    page.wait_for_selector("html[data-place='2']", state="attached", timeout=10_000)
    page.locator("#play").click()
    page.locator("h1").click()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.documentElement.dataset.place") == str(len(output.trace) - 1)
    page.locator(".tokens span").nth(1).hover()
    assert "committed in step" in page.inner_text("#token")
    assert page.title() != "run"
    assert watched.faults == []
    assert [request for request in watched.requests if not request.startswith(("file:", "data:"))] == []
    watched.close()


def test_guesses_and_what_is_sent_back_are_told_apart(browser, tmp_path):
    steps = made_up(3, [[MASK, MASK]], commits=[[[0]], [[1]], [[0]]], remasks=[[[]], [[0]], [[]]], tokens=[[4, 5]])
    for step in steps:
        step.predictions = torch.where(step.confidence.isfinite(), torch.tensor([[4, 6]]), -1)
    output = LoopMDMGenerationOutput(torch.tensor([[4, 5]]), trace=steps)
    watched = opened(browser, tmp_path, trace_to_html(output, Words()))
    watched.page.locator("#place").fill("1")
    assert kinds(watched.page, 0) == ["committed", "guessed"]
    assert texts(watched.page, 0) == [" 4", " 6"]
    watched.page.locator("#place").fill("2")
    assert kinds(watched.page, 0) == ["remasked", "committed"]
    assert "1 sent back" in watched.page.inner_text("#step")
    assert "sent back" in watched.page.inner_text(".legend")
    watched.close()


def test_columns_make_a_board(browser, output, tmp_path):
    watched = opened(browser, tmp_path, trace_to_html(output, Words(), columns=5))
    lefts, tops = (
        watched.page.evaluate(
            f"[...document.querySelector('.tokens').children].map((span) => span.getBoundingClientRect().{side})"
        )
        for side in ("left", "top")
    )
    assert (len(set(lefts)), len(set(tops))) == (5, 2)
    watched.close()


def test_on_paper_there_are_several_steps_and_no_controls(browser, output, tmp_path):
    watched = opened(browser, tmp_path, trace_to_html(output, Words()))
    page = watched.page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert not page.locator(".player").is_visible()
    assert page.locator(".film h3").count() == 2 * min(8, len(output.trace))
    assert page.locator(".film .tokens").last.is_visible()
    assert page.evaluate("document.querySelectorAll('.film')[0].lastChild.innerText.trim()").split() == [
        str(token) for token in output.sequences[0].tolist()
    ]
    watched.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_of_accessibility(browser, output, tmp_path, scheme):
    html = trace_to_html(output, Words())
    watched = opened(browser, tmp_path, html, color_scheme=scheme, viewport={"width": 390, "height": 800})
    watched.page.locator("#place").fill("2")
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious_faults(watched.page) == []
    watched.close()
