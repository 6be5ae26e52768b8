# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Arithmetic word problems of several steps, with worked solutions: a stand-in for GSM8K that a tiny model can learn.

    Ann has 6 coins now . Bob has 1 coins now . Ann gives 3 to Bob . Bob doubles all the coins . How many has Bob now ?
    Ann 3 Bob 4 ; Ann 3 Bob 8 ; #### 8

All amounts are from 0 to 9 and all sentences have six words: the chain of steps is what is hard, not sums or reading.
A solution gives both amounts after every event; its last word is the answer.
"""

import random

NAMES = ["Ann", "Bob", "Cem", "Dee", "Eve", "Finn", "Gus", "Hal"]
THINGS = ["apples", "books", "cards", "coins", "pens", "shells", "stamps", "toys"]
MOST = 9
SIGNS = [".", "?", ";", "####", *(str(number) for number in range(MOST + 1))]
WORDS = ["has", "now", "buys", "more", "loses", "of", "them", "gives", "to", "doubles", "all", "the", "How", "many"]
VOCABULARY = [*SIGNS, *WORDS, *NAMES, *THINGS]


def _event(rng: random.Random, amounts: dict[str, int], things: str) -> str:
    """Changes the amounts, and says how."""
    while True:
        name, other = rng.sample(list(amounts), 2)
        kind, number = rng.choice(("buys", "loses", "gives", "doubles")), rng.randint(1, 5)
        if kind == "buys" and amounts[name] + number <= MOST:
            amounts[name] += number
            return f"{name} buys {number} more {things} ."
        if kind == "loses" and number <= amounts[name]:
            amounts[name] -= number
            return f"{name} loses {number} of them ."
        if kind == "gives" and number <= amounts[name] and amounts[other] + number <= MOST:
            amounts[name] -= number
            amounts[other] += number
            return f"{name} gives {number} to {other} ."
        if kind == "doubles" and 0 < 2 * amounts[name] <= MOST:
            amounts[name] *= 2
            return f"{name} doubles all the {things} ."


def generate_problem(seed: int, index: int, events: int) -> tuple[str, str]:
    """
    A problem of so many events and its solution, words with spaces between: `6 * events + 18` and `5 * events + 2` of
    them. They depend on the arguments alone.
    """
    rng = random.Random(f"word problems/{seed}/{index}")
    things = rng.choice(THINGS)
    amounts = {name: rng.randint(1, MOST) for name in rng.sample(NAMES, 2)}
    sentences = [f"{name} has {amount} {things} now ." for name, amount in amounts.items()]
    solution = []
    for _ in range(events):
        sentences.append(_event(rng, amounts, things))
        solution.append(" ".join(f"{name} {amount}" for name, amount in amounts.items()) + " ;")
    asked = rng.choice(list(amounts))
    sentences.append(f"How many has {asked} now ?")
    return " ".join(sentences), " ".join([*solution, f"#### {amounts[asked]}"])
