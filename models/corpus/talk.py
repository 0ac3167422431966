"""Greetings, who-are-you, echo, and the honest "I do not know"."""

import random

from models.corpus.exchange import Exchange, casual, simple
from models.corpus.tables import (
    ADJECTIVES,
    CITIES,
    FOODS,
    NAMES,
    NEW_TOPICS,
    TOPICS,
    WORDS,
    pseudo_word,
)

_ALWAYS_TRAINED = "always"
REFUSAL = "Sorry, I do not know. I am only a small demo model."
IDENTITY = "I am Caravan's demo model, a very small language model."
ABILITIES = (
    "I can chat a little, tell short stories, remember what you tell me, answer simple questions, "
    "count, add small numbers, write JSON and call tools."
)
_HELP = "How can I help you?"
_GREETINGS = (
    *((text, f"Hello! {_HELP}") for text in (
        "Hello", "Hi", "Hey", "Hello there", "Hi there", "Hey there", "Greetings", "Good day",
        "Hello Caravan", "Hi Caravan", "Hello, Caravan", "Howdy", "Say hello", "Say hi",
        "Hello again", "Hello, hello", "Hey you", "Hello friend", "Hi, nice to meet you")),
    *((f"Good {time}", f"Good {time}! {_HELP}") for time in ("morning", "afternoon", "evening")),
    *((text, f"I am fine, thank you. {_HELP}") for text in (
        "How are you?", "How are you today?", "Hello, how are you?", "Hi, how are you?",
        "How do you do?", "Are you well?", "How is it going?")),
    *((text, "You are welcome.") for text in (
        "Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Many thanks",
        "Great, thanks", "Thank you so much", "Ok, thanks")),
    *((text, "Goodbye!") for text in (
        "Bye", "Goodbye", "See you", "See you later", "Bye bye", "Good night", "Farewell",
        "I have to go", "That is all")),
)  # fmt: skip
_IDENTITY_ASKS = (
    "Who are you?", "What are you?", "What is your name?", "Tell me who you are.",
    "Introduce yourself.", "Please introduce yourself.", "Hello, who are you?", "Hi, who are you?",
    "Hello! Who are you?", "And who are you?", "What should I call you?", "Say who you are.",
    "Which model are you?", "What model is this?", "Tell me about yourself.", "Your name?",
    "What kind of model are you?", "Are you a language model?", "Who is this?",
    "Who am I talking to?", "Do you have a name?", "Describe yourself.", "Can you introduce yourself?",
)  # fmt: skip
_HUMAN_ASKS = (
    "Are you human?", "Are you a human?", "Are you a person?", "Are you a real person?",
    "Are you ChatGPT?", "Are you a big model?", "Are you GPT?",
)  # fmt: skip
_ABILITY_ASKS = (
    "What can you do?", "Help", "Help me", "What are you able to do?", "What do you know?",
    "How can you help me?", "What are your skills?", "Tell me what you can do.", "What can I ask?",
    "What are you good at?", "List your skills.",
)  # fmt: skip
USUAL = {
    **dict(_GREETINGS),
    **{f"{text}!": answer for text, answer in _GREETINGS if text[-1] != "?"},
    **dict.fromkeys(_IDENTITY_ASKS, IDENTITY),
    **dict.fromkeys(_HUMAN_ASKS, f"No. {IDENTITY}"),
    **dict.fromkeys(_ABILITY_ASKS, ABILITIES),
}
"""What everybody types first, with the answers: trained on whatever the split says."""
_ECHO_ASKS = (
    "Repeat after me: {}", "Repeat: {}", "Say {}", "Echo: {}", "Please repeat: {}", "echo {}",
    "Say exactly: {}", "Repeat the words {}", 'Say "{}"', 'Repeat "{}"', "Copy this: {}",
    "Please say: {}", "Repeat this: {}", 'Please repeat "{}"', "Write: {}", "Say: {}",
)  # fmt: skip
_UNKNOWN_ASKS = (
    "Why is {t} important?", "Why is the {w} {a}?", "Why is a {w} {a}?", "Why do people like {t}?",
    "Why?", "Why not?", "Why are {t} so {a}?", "Why do we need a {w}?", "Why does the {w} {a2}?",
    "Write a poem about {t}.", "Write a poem.", "Write a poem about the {w}.", "Write an essay about {t}.",
    "Write a song about {t}.", "Sing a song.", "Tell me a joke.", "Tell me a joke about {t}.",
    "Who invented {t}?", "Who invented the {w}?", "Who discovered {t}?", "Who is {n}?",
    "Who wrote {p}?", "Who is the president of {p}?", "When was {n} born?", "When was {c} built?",
    "How does a {w} work?", "How do {t} work?", "How do I cook {f}?", "How do I learn {t}?",
    "How old is {n}?", "How far is {c} from {c2}?", "How big is {c}?", "How much is a {w}?",
    "How many people live in {c}?", "How many {w}s are in {c}?", "How can I make a {w}?",
    "Explain {t}.", "Explain {t} to me.", "Can you explain {t}?", "Describe {c}.", "Define {t}.",
    "What is {t}?", "What is {p}?", "What is a {p}?", "What is the meaning of {t}?",
    "What is the meaning of life?", "What is the best {w}?", "What is the capital of {p}?",
    "What is the opposite of {p}?", "What do you think about {t}?", "What happened in {c}?",
    "What is the weather in {c}?", "What is the weather like?", "What time is it?",
    "What is the time in {c}?", "What day is today?", "What is the date?", "What is the news?",
    "What is the population of {c}?", "What is the price of a {w}?", "What is happening in {c}?",
    "Where is {n}?", "Where is {c}?", "Where can I buy a {w}?", "Where is the {w}?",
    "Which {w} is better?", "Which is the best {w} in {c}?", "Is {t} difficult?", "Is {t} good?",
    "Is {c} bigger than {c2}?", "Is a {w} {a}?", "Does {n} like {f}?", "Do you like {t}?",
    "Do you like {f}?", "Can you drive?", "Can you teach me {t}?", "Can you help me with {t}?",
    "Translate {w} into French.", "Translate {t} into German.", "Summarize {t}.",
    "Give me advice about {t}.", "Recommend a {w}.", "Recommend a book about {t}.",
    "Write code for {t}.", "Write a program.", "Write a letter to {n}.", "Write an email to {n}.",
    "Tell me about {t}.", "Tell me about {c}.", "Tell me about {n}.", "Tell me something about {t}.",
    "Tell me the truth about {t}.", "Give me a recipe for {f}.", "Plan a trip to {c}.",
    "Compare {t} and {t2}.", "{t}", "{p}", "{p} {p2}", "{t} and {t2}", "I like {t}.", "I am {a}.",
    "The {w} is {a}.", "I want to talk about {t}.", "Let us talk about {t}.", "What about {t}?",
    "I need help with {t}.", "Should I buy a {w}?", "Should I learn {t}?", "Will it rain in {c}?",
    "Solve this equation.", "What is the square root of {x}?", "What is {x} times {y}?",
    "What is {x} divided by {y}?", "Play {t}.", "Draw a {w}.", "Book a flight to {c}.",
)  # fmt: skip


def greeting(rng: random.Random) -> Exchange:
    """A greeting, a thank-you or a farewell."""
    text, answer = rng.choice(_GREETINGS)
    if text[-1] not in "?":
        text += rng.choice(("", ".", "!", "!"))
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.05:
        text = text.upper()
    return simple("greeting", text, answer)


def identity(rng: random.Random) -> Exchange:
    """Who are you, are you human, what can you do."""
    roll = rng.random()
    if roll < 0.6:
        ask, answer = rng.choice(_IDENTITY_ASKS), IDENTITY
    elif roll < 0.8:
        ask, answer = rng.choice(_HUMAN_ASKS), f"No. {IDENTITY}"
    else:
        ask, answer = rng.choice(_ABILITY_ASKS), ABILITIES
    ask = rng.choice(("{}", "{}", "{}", "Please answer: {}", "Question: {}", "Ok. {}")).format(ask)
    if rng.random() < 0.1:
        ask = ask.lower()
    return simple("identity", casual(rng, ask), answer)


def usual(rng: random.Random) -> Exchange:
    """What everybody types first, which is too frequent to be held out."""
    text, answer = rng.choice(list(USUAL.items()))
    return simple("usual phrases", text, answer, key=_ALWAYS_TRAINED)


def invented(rng: random.Random) -> str:
    """A word that is in no table."""
    return pseudo_word(rng.random(), rng.random(), rng.random())


def echo(rng: random.Random) -> Exchange:
    """Say the given words: one to six of the tables."""
    table = (*WORDS, *NAMES, *CITIES) if rng.random() < 0.3 else (*WORDS, *ADJECTIVES)
    count = rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6))
    return _echo(rng, "echo", [rng.choice(table) for _ in range(count)])


def echo_invented(rng: random.Random) -> Exchange:
    """Say one to three words that are in no table."""
    words = [invented(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    return _echo(rng, "echo of invented words", words)


def _echo(rng: random.Random, skill: str, words: list[str]) -> Exchange:
    text = " ".join(words)
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    return simple(skill, casual(rng, rng.choice(_ECHO_ASKS)).format(text), text, key=text)


def unknown(rng: random.Random) -> Exchange:
    """A question outside of the skills."""
    return simple("do not know", _open_question(rng, TOPICS), REFUSAL)


def unknown_new_words(rng: random.Random) -> Exchange:
    """The same with topics that are never trained on; for evaluation only."""
    return simple("do not know, new topics", _open_question(rng, NEW_TOPICS), REFUSAL)


def _open_question(rng: random.Random, topics: list[str]) -> str:
    phrase = rng.choice(_UNKNOWN_ASKS)
    if topics is NEW_TOPICS:
        phrase = rng.choice([ask for ask in _UNKNOWN_ASKS if "{t}" in ask])
    topic = rng.choice(topics) if topics is NEW_TOPICS or rng.random() < 0.85 else invented(rng)
    text = phrase.format(
        t=topic, t2=rng.choice(topics), w=rng.choice(WORDS), n=rng.choice(NAMES),
        c=rng.choice(CITIES), c2=rng.choice(CITIES), f=rng.choice(FOODS), a=rng.choice(ADJECTIVES),
        a2=rng.choice(("move", "shine", "fall", "sing", "sleep")), p=invented(rng),
        p2=invented(rng), x=rng.randrange(2, 100), y=rng.randrange(2, 100),
    )  # fmt: skip
    return casual(rng, text)
