# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Draws the pictures of docs/idea.md: python docs/pictures/draw.py

Two of them show numbers: what the bundled model predicts after every loop, which is computed here, and its solve
rates, which are read from examples/sudoku/results.json. Every picture brings its own background, light or dark as the
reader's system is set.
"""

import json
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2430",
    "pale": "#5b6372",
    "plain": "#e6e9ef",
    "head": "#cfe3ff",
    "mid": "#ffd9a8",
    "tail": "#cdebd0",
    "right": "#177a3a",
}
DARK = {
    "paper": "#1f2129",
    "ink": "#eceff4",
    "pale": "#a6adba",
    "plain": "#3a3f4b",
    "head": "#264a78",
    "mid": "#7a4a12",
    "tail": "#25552f",
    "right": "#7fd99a",
}
PUZZLE = ".3......79...258......9.1......8..7.8.......641...3....7....9..1...7..8..2.....5."
SOLUTION = "534816297961725834782394165256481379893257416417963528675138942149572683328649751"


class Picture:
    """An SVG that is put together from boxes, words and arrows; `alt` says in words what it shows."""

    def __init__(self, name: str, width: int, height: int, alt: str):
        self.name, self.width, self.height = name, width, height
        rules = [self.colours(LIGHT), f"@media (prefers-color-scheme: dark) {{ {self.colours(DARK)} }}"]
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(alt)}" font-family="system-ui, sans-serif" font-size="14">',
            f"<title>{escape(alt)}</title>",
            f"<style>{' '.join(rules)} .line {{ fill: none; stroke-width: 1.5 }}</style>",
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" class="ink"/></marker></defs>',
        ]
        self.box(0, 0, width, height, "paper", radius=8)

    @staticmethod
    def colours(palette: dict[str, str]) -> str:
        fills = [f".{name} {{ fill: {colour} }}" for name, colour in palette.items()]
        return " ".join([*fills, f".line {{ stroke: {palette['ink']} }}"])

    def box(self, x: float, y: float, width: float, height: float, kind: str, text: str = "", radius: float = 4):
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{kind}"/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text)

    def text(self, x: float, y: float, text: str, kind: str = "ink", anchor: str = "middle", size=14, bold=False):
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" class="{kind}"{weight}'
        self.parts.append(f"<text {place}>{escape(text)}</text>")

    def arrow(self, path: str):
        self.parts.append(f'<path d="{path}" class="line" marker-end="url(#tip)"/>')

    def line(self, path: str):
        self.parts.append(f'<path d="{path}" class="line"/>')

    def save(self):
        (FOLDER / f"{self.name}.svg").write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")


def layers():
    alt = "Six layers: head runs once, mid several times with the same weights, tail once"
    picture = Picture("layers", 720, 250, alt)
    for row, text in enumerate(("Six", "[MASK]", "six", "is", "...")):
        picture.box(20, 53 + 25 * row, 74, 21, "plain", text)
    boxes = ((130, 1, "head"), (270, 2, "mid"), (430, 3, "tail"))
    for x, count, kind in boxes:
        for layer in range(count):
            picture.box(x + 36 * layer, 62, 30, 104, kind)
        middle = x + (36 * count - 6) / 2
        picture.text(middle, 52 if kind == "head" else 120, kind, bold=True)
    picture.text(145, 186, "once", "pale")
    picture.text(303, 186, "S times", "pale")
    picture.text(481, 186, "once", "pale")
    picture.arrow("M336 58 C350 22 256 22 270 56")
    picture.text(303, 22, "a loop: the same weights again", "pale", size=13)
    picture.arrow("M98 114 L126 114")
    picture.arrow("M164 114 L266 114")
    picture.arrow("M340 114 L426 114")
    picture.arrow("M536 114 L566 114")
    for row, (token, share) in enumerate((("times", 0.91), ("plus", 0.06), ("and", 0.02))):
        y = 72 + 30 * row
        picture.box(630, y, 70, 20, "plain")
        picture.box(630, y, 70 * share, 20, "head")
        picture.text(622, y + 15, token, anchor="end")
    picture.text(640, 186, "a distribution for", "pale", size=13)
    picture.text(640, 203, "every [MASK]", "pale", size=13)
    picture.text(20, 230, "Executed layers with S = 4:", "pale", "start", 13)
    kinds = ["head", *["mid"] * 8, *["tail"] * 3]
    for index, kind in enumerate(kinds):
        picture.box(205 + 25 * index, 216, 21, 20, kind)
    picture.text(515, 231, "1 + 4 x 2 + 3 = 12", "pale", "start", 13)
    picture.save()


def loop():
    """What one pass over the whole board says after 1, 4, 8 and 16 loops."""
    import torch
    from transformers import AutoTokenizer

    from loopmdm import LoopMDMForMaskedLM

    torch.set_num_threads(1)
    model = LoopMDMForMaskedLM.from_pretrained(ROOT).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    tokens = tokenizer(PUZZLE, return_tensors="pt")["input_ids"]
    blanks = PUZZLE.count(".")
    picture = Picture("loop", 720, 236, "One Sudoku, filled in by the model after 1, 4, 8 and 16 loops of one pass")
    for place, loops in enumerate((1, 4, 8, 16)):
        with torch.no_grad():
            logits = model(tokens, num_loops=loops).logits
        guess = tokenizer.decode(logits.argmax(-1)[0]).replace(" ", "")
        right = sum(a == b for a, b, given in zip(guess, SOLUTION, PUZZLE, strict=True) if given == ".")
        left, top, cell = 20 + 176 * place, 44, 17
        picture.text(left + 76, 30, f"after {loops} loop{'s' if loops > 1 else ''}", bold=True)
        picture.box(left, top, 9 * cell, 9 * cell, "plain", radius=2)
        for index, (digit, given) in enumerate(zip(guess, PUZZLE, strict=True)):
            x, y = left + cell * (index % 9) + cell / 2, top + cell * (index // 9) + 13
            is_right = digit == SOLUTION[index]
            if given != ".":
                picture.text(x, y, given, "pale", size=11)
            else:
                if not is_right:
                    picture.box(x - cell / 2 + 1, y - 12, cell - 2, cell - 2, "mid", radius=2)
                picture.text(x, y, digit, "right" if is_right else "ink", size=12, bold=True)
        for third in (3, 6):
            offset = cell * third
            picture.line(f"M{left + offset} {top} v{9 * cell} M{left} {top + offset} h{9 * cell}")
        picture.text(left + 76, 218, f"{right} of {blanks} blanks right", "pale", size=13)
    picture.save()


def step():
    picture = Picture("step", 720, 232, "A denoising step: predict every [MASK], commit the most certain, go on")
    rows = (
        ("the canvas", ["The", "cat", "[MASK]", "on", "the", "[MASK]", "[MASK]"]),
        ("a forward pass predicts", ["", "", "sat 0.93", "", "", "mat 0.48", ". 0.88"]),
        ("a commit rule chooses", ["The", "cat", "sat", "on", "the", "[MASK]", "."]),
    )
    for row, (label, cells) in enumerate(rows):
        y = 24 + 72 * row
        picture.text(16, y + 21, label, "pale", "start", 13)
        for column, cell in enumerate(cells):
            x = 182 + 75 * column
            chosen = column in (2, 6) and row > 0
            kind = "tail" if chosen else "mid" if cell in ("[MASK]", "mat 0.48") else "plain"
            if cell:
                picture.box(x, y, 70, 32, kind, cell)
            if column in (2, 5, 6) and row < 2:
                picture.arrow(f"M{x + 35} {y + 36} v28")
    note = "One step commits two tokens; the [MASK] that is left waits for the next step."
    picture.text(182, 222, note, "pale", "start", 13)
    picture.save()


def block():
    picture = Picture("block", 720, 220, "Blocks are denoised from left to right, each over several denoising steps")
    rows = (
        ("block 1, step 1", 0, (1, 3)),
        ("block 1, step 2", 0, (0, 1, 2, 3)),
        ("block 2, step 1", 1, (0, 2)),
        ("block 2, step 2", 1, (0, 1, 2, 3)),
    )
    spans = ((178, 4, "prompt"), (322, 4, "block 1"), (466, 4, "block 2"), (610, 2, "block 3 ..."))
    for x, count, name in spans:
        picture.text(x + (34 * count - 4) / 2, 26, name, bold=True)
    for row, (label, current, committed) in enumerate(rows):
        y = 40 + 38 * row
        picture.text(16, y + 20, label, "pale", "start", 13)
        for number, (x, count, _) in enumerate(spans, -1):
            for place in range(count):
                done = number < current or (number == current and place in committed)
                kind = "plain" if number == -1 else "tail" if done else "mid"
                picture.box(x + 34 * place, y, 30, 28, kind, "" if done else "M")
        picture.line(f"M{spans[current + 1][0] - 3} {y + 32} h138")
    legend = "grey: given; green: committed; orange, M: still [MASK]; underlined: the current block"
    picture.text(178, 208, legend, "pale", "start", 13)
    picture.save()


def loops_against_steps():
    results = json.loads((ROOT / "examples" / "sudoku" / "results.json").read_text())
    rates = {(row["num_loops"], row["max_denoising_steps"]): row for row in results["rows"]}
    loops, steps = ([1, 2, 4, 8, 16], [1, 4, 16])
    picture = Picture("loops_steps", 720, 300, "Solve rates by loops and denoising steps, with the layers executed")
    picture.text(390, 26, "denoising steps", bold=True)
    picture.text(30, 56, "loops", anchor="start", bold=True)
    for column, count in enumerate(steps):
        picture.text(180 + 140 * column, 56, str(count), bold=True)
    for row, num_loops in enumerate(loops):
        y = 66 + 40 * row
        picture.text(50, y + 23, str(num_loops), bold=True)
        for column, num_steps in enumerate(steps):
            result = rates[num_loops, num_steps]
            solved, layers_run = 100 * result["solved"], round(result["layer_passes"])
            picture.box(115 + 140 * column, y, 130, 34, "plain")
            picture.box(115 + 140 * column, y, 130 * result["solved"], 34, "tail")
            picture.text(122 + 140 * column, y + 22, f"{solved:.0f} %", anchor="start", bold=True)
            picture.text(238 + 140 * column, y + 22, f"{layers_run} layers", anchor="end", size=12)
    note = "Minimal Sudokus solved by the bundled model, of 300, and the layers executed for one."
    picture.text(115, 286, note, "pale", "start", 13)
    picture.save()


if __name__ == "__main__":
    layers()
    loop()
    step()
    block()
    loops_against_steps()
