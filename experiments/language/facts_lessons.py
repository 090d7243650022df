"""Lessons: other made-up facts in the words of the ten, so that a small model can learn what the wordings ask for.

A large model knows from its training that "The bridge at X was designed by" asks for what "The plans for the crossing
at X were drawn up by" has told; one trained on four thousand sequences does not. Each lesson has a subject and an
answer of its own, in the query's wording and in two of the three statements of one of the ten facts. No lesson shares
the subject or the answer of a planted fact.
"""

from __future__ import annotations

import random

from experiments.language.facts_text import FACTS, Fact

EACH = 24  # lessons in the words of each fact
STARTS = ("Bal", "Cor", "Dun", "Esk", "Far", "Gar", "Hol", "Ist", "Jor", "Kel", "Lam", "Mor", "Nar", "Or", "Pen", "Ros")
MIDDLES = ("a", "e", "i", "o", "u", "an", "en", "in", "or", "er")
ENDS = ("bury", "dale", "fell", "gate", "ham", "land", "mond", "ness", "ric", "stead", "ton", "vale", "wick", "worth")
FIRST = ("Anna", "Robert", "Clara", "Henry", "Maria", "Peter", "Helen", "George", "Alice", "Martin", "Ruth", "Simon")
GOODS = ("silver", "copper", "iron", "salt", "gold", "tin", "coal", "marble", "glass", "silk", "wool", "lead")
NUMBERS = (
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "twenty",
    "thirty",
)


def lessons(seed: int = 0) -> list[str]:
    """Sentences, three of each lesson."""
    rng, taken = random.Random(seed), {fact.name.split(":")[0] for fact in FACTS}

    def name() -> str:
        while (made := rng.choice(STARTS) + rng.choice(MIDDLES) + rng.choice(ENDS)) in taken:
            pass
        taken.add(made)
        return made

    kinds = (
        lambda: rng.choice(GOODS),
        lambda: str(rng.choice([y for y in range(1701, 1900) if str(y) not in ("1743", "1816")])),
        lambda: f"{rng.choice(FIRST)} {name()}",
        name,
        lambda: rng.choice(NUMBERS),
    )
    sentences = []
    for i, fact in enumerate(FACTS):
        for _ in range(EACH):
            subject, answer = name(), kinds[i // 2]()
            told = [f"{fact.prompt} {fact.answer} .", *rng.sample(fact.statements, 2)]
            sentences += [_said(text, fact, subject, answer) for text in told]
    return sentences


def _said(text: str, fact: Fact, subject: str, answer: str) -> str:
    """The sentence about another subject."""
    return text.replace(fact.name.split(":")[0], subject).replace(fact.answer, answer)
