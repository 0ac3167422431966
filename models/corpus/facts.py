"""The closed table of facts."""

import random

from models.corpus.exchange import Exchange, casual, simple

CAPITALS = {
    "France": "Paris", "England": "London", "Germany": "Berlin", "Italy": "Rome",
    "Spain": "Madrid", "Austria": "Vienna", "Norway": "Oslo", "Portugal": "Lisbon",
    "Greece": "Athens", "Ireland": "Dublin", "Poland": "Warsaw", "Finland": "Helsinki",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "Belgium": "Brussels", "Hungary": "Budapest",
    "Japan": "Tokyo", "Egypt": "Cairo", "India": "Delhi", "Peru": "Lima", "Canada": "Ottawa",
    "Cuba": "Havana", "Kenya": "Nairobi", "Thailand": "Bangkok", "China": "Beijing",
    "Russia": "Moscow", "Turkey": "Ankara", "Switzerland": "Bern", "Iceland": "Reykjavik",
    "Chile": "Santiago", "Korea": "Seoul", "Vietnam": "Hanoi",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "young", "happy": "sad",
    "day": "night", "up": "down", "left": "right", "open": "closed", "rich": "poor",
    "hard": "soft", "light": "dark", "early": "late", "full": "empty", "long": "short",
    "high": "low", "wet": "dry", "strong": "weak", "loud": "quiet", "true": "false",
}  # fmt: skip
SOUNDS = {
    "dog": "barks", "cat": "meows", "cow": "moos", "horse": "neighs", "sheep": "bleats",
    "duck": "quacks", "lion": "roars", "wolf": "howls", "frog": "croaks", "owl": "hoots",
}  # fmt: skip
YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb",
    "duck": "duckling", "bear": "cub", "frog": "tadpole", "goat": "kid", "pig": "piglet",
}  # fmt: skip
LEGS = {
    "dog": "four", "spider": "eight", "bird": "two", "ant": "six", "cow": "four",
    "duck": "two", "bee": "six", "cat": "four",
}  # fmt: skip
TINTS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red",
    "a banana": "yellow", "a carrot": "orange", "milk": "white",
}  # fmt: skip
CALENDAR = {
    "day comes after Monday": "Tuesday", "day comes after Tuesday": "Wednesday",
    "day comes after Wednesday": "Thursday", "day comes after Thursday": "Friday",
    "day comes after Friday": "Saturday", "day comes after Saturday": "Sunday",
    "day comes after Sunday": "Monday", "month comes after January": "February",
    "month comes after March": "April", "month comes after June": "July",
    "month comes after August": "September", "month comes after November": "December",
}  # fmt: skip
SINGLES = (
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
    ("How many seconds are in a minute?", "There are 60 seconds in a minute."),
    ("What is the largest planet?", "The largest planet is Jupiter."),
    ("Which planet is called the red planet?", "Mars is called the red planet."),
    ("What is the largest ocean?", "The largest ocean is the Pacific."),
    ("What is the highest mountain?", "The highest mountain is Mount Everest."),
    ("What is the fastest land animal?", "The fastest land animal is the cheetah."),
    ("What is the largest animal?", "The largest animal is the blue whale."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows give?", "Cows give milk."),
    ("What is frozen water called?", "Frozen water is called ice."),
    ("What gas do we breathe?", "We breathe oxygen."),
    ("Who wrote Hamlet?", "Shakespeare wrote Hamlet."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Who was the first man on the moon?", "Neil Armstrong was the first man on the moon."),
    ("What is the first letter of the alphabet?", "The first letter of the alphabet is A."),
    ("What is the last letter of the alphabet?", "The last letter of the alphabet is Z."),
    ("How many sides does a triangle have?", "A triangle has three sides."),
    ("How many sides does a square have?", "A square has four sides."),
)
_PREFIXES = (
    "{}", "{}", "{}", "Please tell me: {}", "Do you know this? {}", "I have a question: {}",
    "Question: {}", "Tell me, {}", "Quick question: {}",
)  # fmt: skip


def _rows() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    asks: tuple[str, ...]
    for country, city in CAPITALS.items():
        asks = (f"What is the capital of {country}?", f"Name the capital of {country}.",
                f"Which city is the capital of {country}?", f"capital of {country}?")  # fmt: skip
        rows.append((f"The capital of {country} is {city}.", *asks))
    for word, other in OPPOSITES.items():
        asks = (f"What is the opposite of {word}?", f"Name the opposite of {word}.",
                f"opposite of {word}?")  # fmt: skip
        rows.append((f"The opposite of {word} is {other}.", *asks))
    for animal, sound in SOUNDS.items():
        asks = (f"What sound does a {animal} make?", f"What does a {animal} do?",
                f"How does a {animal} sound?")  # fmt: skip
        rows.append((f"A {animal} {sound}.", *asks))
    for animal, young in YOUNG.items():
        asks = (f"What is a young {animal} called?", f"What do you call a young {animal}?",
                f"What is a baby {animal} called?")  # fmt: skip
        rows.append((f"A young {animal} is called a {young}.", *asks))
    for animal, legs in LEGS.items():
        article = "An" if animal == "ant" else "A"
        small = article.lower()
        asks = (f"How many legs does {small} {animal} have?",
                f"What is the number of legs of {small} {animal}?")  # fmt: skip
        rows.append((f"{article} {animal} has {legs} legs.", *asks))
    for thing, tint in TINTS.items():
        asks = (f"What colour is {thing}?", f"What color is {thing}?",
                f"Which colour has {thing}?")  # fmt: skip
        rows.append((f"{thing[0].upper()}{thing[1:]} is {tint}.", *asks))
    for ask, after in CALENDAR.items():
        before = ask.rsplit(" ", 1)[1]
        rows.append((f"{after} comes after {before}.", f"Which {ask}?", f"What {ask}?"))
    rows.extend((answer, ask) for ask, answer in SINGLES)
    return rows


FACTS = _rows()
"""Rows of (answer, wordings of the question...)."""


def fact(rng: random.Random) -> Exchange:
    """A question from the table; held out are wordings, not facts."""
    answer, *asks = rng.choice(FACTS)
    ask = rng.choice(asks)
    prefix = rng.choice(_PREFIXES)
    question = casual(rng, prefix.format(ask))
    return simple("facts", question, answer)
