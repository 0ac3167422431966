"""Recall: the user says something about themselves and asks for it later."""

import random
from dataclasses import dataclass

from models.corpus.exchange import Exchange, casual, simple
from models.corpus.tables import CITIES, COLOURS, FOODS, NAMES, PETS


@dataclass(frozen=True)
class Trait:
    """One thing to remember: how it is told, confirmed, asked for and answered."""

    name: str
    values: tuple[str, ...]
    tells: tuple[str, ...]
    confirm: str
    asks: tuple[str, ...]
    answer: str
    missing: str


TRAITS = (
    Trait(
        "name", tuple(NAMES),
        ("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.", "Call me {}.",
         "You can call me {}.", "Hello! My name is {}.", "People call me {}."),
        "Nice to meet you, {}.",
        ("What is my name?", "Who am I?", "Do you remember my name?", "What am I called?",
         "Tell me my name.", "Say my name."),
        "Your name is {}.", "You have not told me your name.",
    ),
    Trait(
        "city", tuple(CITIES),
        ("I live in {}.", "My home is in {}.", "I am from {}.", "My city is {}.", "I come from {}."),
        "{} is a nice city.",
        ("Where do I live?", "Which city do I live in?", "Do you remember where I live?",
         "What is my city?", "Where am I from?"),
        "You live in {}.", "You have not told me where you live.",
    ),
    Trait(
        "colour", tuple(COLOURS),
        ("My favourite colour is {}.", "My favorite color is {}.", "I like the colour {}.",
         "The colour I like best is {}."),
        "I will remember that you like {}.",
        ("What is my favourite colour?", "Which colour do I like?", "What is my favorite color?",
         "Do you remember my favourite colour?"),
        "Your favourite colour is {}.", "You have not told me your favourite colour.",
    ),
    Trait(
        "food", tuple(FOODS),
        ("My favourite food is {}.", "I like to eat {}.", "I love to eat {}.",
         "The food I like best is {}."),
        "I will remember that you like to eat {}.",
        ("What is my favourite food?", "What do I like to eat?", "Which food do I like?",
         "Do you remember my favourite food?"),
        "You like to eat {}.", "You have not told me what you like to eat.",
    ),
    Trait(
        "pet", tuple(PETS),
        ("I have a {}.", "My pet is a {}.", "At home I have a {}.", "I own a {}."),
        "I will remember your {}.",
        ("Which pet do I have?", "What pet do I have?", "Do you remember my pet?",
         "What is my pet?"),
        "You have a {}.", "You have not told me about a pet.",
    ),
    Trait(
        "number", tuple(str(number) for number in range(1, 100)),
        ("My lucky number is {}.", "My number is {}.", "Remember the number {}.",
         "Please remember the number {}."),
        "I will remember the number {}.",
        ("What is my number?", "What is my lucky number?", "Which number did I tell you?",
         "Do you remember my number?"),
        "Your number is {}.", "You have not told me a number.",
    ),
)  # fmt: skip
TRAIT_BY_NAME = {trait.name: trait for trait in TRAITS}


def tell(rng: random.Random, known: dict[str, str]) -> Exchange:
    """The user tells something new; `known` is extended. All traits known raises IndexError."""
    trait = rng.choice([trait for trait in TRAITS if trait.name not in known])
    value = rng.choice(trait.values)
    phrase = casual(rng, rng.choice(trait.tells))
    known[trait.name] = value
    return simple("told", phrase.format(value), trait.confirm.format(value))


def ask(rng: random.Random, known: dict[str, str]) -> Exchange:
    """The user asks for a trait: mostly a known one.

    The key of a question without an answer names what was told instead. By wording alone, some
    wordings would only ever be seen with an answer, and the model would learn that they have one.
    """
    told = ""
    if known and rng.random() < 0.6:
        trait = TRAIT_BY_NAME[rng.choice(sorted(known))]
        answer = trait.answer.format(known[trait.name])
    else:
        trait = rng.choice(TRAITS)
        answer, told = trait.missing, f"|{known}"
        if trait.name in known:
            answer, told = trait.answer.format(known[trait.name]), ""
    number = rng.randrange(len(trait.asks))
    phrase = casual(rng, trait.asks[number])
    return simple("recall", phrase, answer, key=f"{answer}|{number}{told}")


def tell_and_ask(rng: random.Random) -> Exchange:
    """Both in one message."""
    trait = rng.choice(TRAITS)
    value = rng.choice(trait.values)
    tell_text = rng.choice(trait.tells).format(value)
    number = rng.randrange(len(trait.asks))
    answer = trait.answer.format(value)
    question = f"{tell_text} {casual(rng, trait.asks[number])}"
    return simple("recall in one message", question, answer, key=f"{answer}|{number}")
