# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Arithmetic word problems of several steps, with worked solutions: a stand-in for GSM8K that a tiny model can learn.

    Ann has 6 coins . Bob has 1 coins . Ann gives 3 coins to Bob . Bob doubles them . How many coins has Bob ?
    Ann 3 Bob 4 ; Bob 8 ; #### 8

All amounts are from 0 to 9: the steps are what is hard, not the sums. A solution gives the new amount of everybody
that an event changes; its last word is the answer.
"""

import random

NAMES = ["Ann", "Bob", "Cem", "Dee", "Eve", "Finn", "Gus", "Hal"]
THINGS = ["apples", "books", "cards", "coins", "pens", "shells", "stamps", "toys"]
MOST = 9
SIGNS = [".", "?", ";", "####", *(str(number) for number in range(MOST + 1))]
WORDS = [
    "has",
    "buys",
    "loses",
    "gives",
    "to",
    "more",
    "doubles",
    "them",
    "How",
    "many",
]
VOCABULARY = [*SIGNS, *WORDS, *NAMES, *THINGS]


def _event(rng: random.Random, amounts: dict[str, int], things: str) -> tuple[str, list[str]]:
    """Changes the amounts; the sentence, and whose amounts changed."""
    while True:
        name, other = rng.sample(list(amounts), 2)
        amount = amounts[name]
        kind = rng.choice(("buys", "loses", "gives", "doubles"))
        number = rng.randint(1, 5)
        if kind == "buys" and amount + number <= MOST:
            amounts[name] += number
            return f"{name} buys {number} more {things} .", [name]
        if kind == "loses" and number <= amount:
            amounts[name] -= number
            return f"{name} loses {number} {things} .", [name]
        if kind == "gives" and number <= amount and amounts[other] + number <= MOST:
            amounts[name] -= number
            amounts[other] += number
            return f"{name} gives {number} {things} to {other} .", [name, other]
        if kind == "doubles" and 0 < 2 * amount <= MOST:
            amounts[name] *= 2
            return f"{name} doubles them .", [name]


def generate_problem(seed: int, index: int, min_events: int, max_events: int, max_words: int) -> tuple[str, str]:
    """A problem and its solution, words with spaces between; they depend on the arguments alone."""
    rng = random.Random(f"word problems/{seed}/{index}")
    while True:
        problem, solution = _problem(rng, rng.randint(min_events, max_events))
        if len(problem.split()) + len(solution.split()) <= max_words:
            return problem, solution


def _problem(rng: random.Random, events: int) -> tuple[str, str]:
    things = rng.choice(THINGS)
    amounts = {name: rng.randint(1, MOST) for name in rng.sample(NAMES, 2)}
    sentences = [f"{name} has {amount} {things} ." for name, amount in amounts.items()]
    solution = []
    for _ in range(events):
        sentence, changed = _event(rng, amounts, things)
        sentences.append(sentence)
        solution += [f"{name} {amounts[name]}" for name in changed] + [";"]
    asked = rng.choice(list(amounts))
    sentences.append(f"How many {things} has {asked} ?")
    return " ".join(sentences), " ".join([*solution, f"#### {amounts[asked]}"])
