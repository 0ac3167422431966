"""Short stories: three plots, whose details follow from the hero."""

import random
from collections.abc import Sequence

from models.corpus.exchange import Exchange, assistant, casual, skewed, user
from models.corpus.tables import ANIMALS, NAMES

_PLACES = (
    "in a green forest", "near a quiet lake", "in an old village", "on a small farm",
    "beside a cold river", "under a tall tree", "on a sunny hill", "in a warm house",
)  # fmt: skip
_THINGS = ("golden key", "red ball", "silver bell", "little boat", "blue stone", "shiny ring")
_FRIENDS = ("mouse", "duck", "rabbit", "bird", "frog", "dog")
_GOALS = ("see the sea", "climb the hill", "find the moon", "cross the river")
_ASKS_PLAIN = (
    "Tell me a story.", "Please tell me a story.", "Write a short story.", "Tell me a short story.",
    "Can you tell me a story?", "I want to hear a story.", "Tell a story.", "Write a story.",
)  # fmt: skip
_ASKS_HERO = (
    "Tell me a story about {}.", "Please tell me a story about {}.", "Write a short story about {}.",
    "Tell me a short story about {}.", "Can you tell me a story about {}?", "Write a story about {}.",
    "I want to hear a story about {}.", "Tell a story about {}.",
)  # fmt: skip


def story(rng: random.Random) -> Exchange:
    """A story of about 100 to 200 tokens about an animal, a person, or whom the model likes."""
    roll = rng.random()
    animal: str | None = rng.choice(ANIMALS)
    name = rng.choice(NAMES)
    if roll < 0.15:
        animal, name = "rabbit", "Max"
        ask = rng.choice(_ASKS_PLAIN)
        wish = "none"
    elif roll < 0.4:
        name = _usual_name(animal or "")
        article = "an" if animal == "owl" else "a"
        wish = f"{article} {animal}"
        ask = rng.choice(_ASKS_HERO).format(wish)
    elif roll < 0.75:
        article = "an" if animal == "owl" else "a"
        wish = f"{article} {animal} {rng.choice(('named', 'called'))} {name}"
        ask = rng.choice(_ASKS_HERO).format(wish)
    else:
        animal, wish = None, name
        ask = rng.choice(_ASKS_HERO).format(name)
    question = casual(rng, ask)
    text = _tell(rng, name, animal)
    key = f"{wish}|{ask}" if wish == "none" or name == _usual_name(animal or "") else wish
    return Exchange("stories", key, (user(question), assistant(text)), subject=name)


def _usual_name(animal: str) -> str:
    return NAMES[ANIMALS.index(animal) * 3] if animal in ANIMALS else ""


def _by_hero(options: Sequence[str], hero: str, salt: int) -> str:
    """The option that belongs to this hero: the same in every story, so greedy is stable."""
    return options[(ANIMALS.index(hero) if hero in ANIMALS else 3) * salt % len(options)]


def _tell(rng: random.Random, name: str, animal: str | None) -> str:
    hero = animal or "child"
    place = _by_hero(_PLACES, hero, 3)
    friend = _by_hero([word for word in _FRIENDS if word != hero], hero, 1)
    start = (
        f"Once upon a time there was a little {hero} named {name}. {name} lived {place}"
        f"{skewed(rng, (' and was very happy', ' with many friends', ' all alone'))}. "
        f"Every day {name} played with a {friend}. "
    )
    plot = (_found, _storm, _journey)[(ANIMALS.index(hero) if hero in ANIMALS else 1) % 3]
    end = skewed(rng, (
        f"From that day on, {name} and the {friend} were the best of friends. The end.",
        f"And {name} was happy for a long, long time. The end.",
        f"That night {name} slept very well. The end.",
    ))  # fmt: skip
    return start + plot(rng, name, hero, friend) + end


def _found(rng: random.Random, name: str, hero: str, friend: str) -> str:
    thing = _by_hero(_THINGS, hero, 5)
    where = skewed(rng, ("in the tall grass", "behind a big stone", "under the snow"))
    return (
        f'One morning {name} found a {thing} {where}. "What a beautiful {thing}!" said {name}. '
        f'The {friend} came to look and said, "It is not ours. We must find its owner." '
        f"So they walked and walked until they met an old "
        f"{skewed(rng, ('farmer', 'teacher', 'sailor'))} who was very sad. "
        f'"I lost my {thing}," said the old man. {name} gave it back at once. '
        f"The old man smiled and gave them "
        f"{skewed(rng, ('a big cake', 'some sweet apples', 'warm milk'))}. "
    )


def _storm(rng: random.Random, name: str, hero: str, friend: str) -> str:
    del hero
    weather = skewed(rng, ("a big storm came", "the snow fell all night", "it rained for days"))
    return (
        f"One day {weather}. The wind was loud and the sky was dark. The {friend} was afraid and "
        f'could not find the way home. {name} heard a quiet voice and ran outside. "Do not be '
        f'afraid," said {name}. "I am here." They held on to each other and walked step by step '
        f"through the {skewed(rng, ('dark', 'cold', 'rain'))}. At last they saw a light in a "
        f"window. It was their home! {name} made a fire and gave the {friend} "
        f"{skewed(rng, ('hot soup', 'warm bread', 'sweet tea'))}. "
    )


def _journey(rng: random.Random, name: str, hero: str, friend: str) -> str:
    goal = _by_hero(_GOALS, hero, 3)
    return (
        f'But {name} had a dream. {name} wanted to {goal}. "Come with me," said {name} to the '
        f'{friend}. "It is far, but we are two." They took '
        f"{skewed(rng, ('bread and cheese', 'a map', 'a small lamp'))} and left early in the "
        f"morning. The road was long and they were tired. A wise old owl "
        f"{skewed(rng, ('sat on a branch', 'slept in a tree', 'flew over them'))} and said, "
        f'"Do not give up. You are almost there." {name} took one more step, and then another '
        f"one. And there it was, more beautiful than in the dream. "
    )
