"""Prompts that no cache has seen: every round asks something new, so that each contestant computes all of it."""

from __future__ import annotations

import random

SUBJECTS = ("caravan", "harbour", "lantern", "orchard", "glacier", "market", "viaduct", "island")
VERBS = ("carries", "follows", "remembers", "crosses", "repairs", "measures", "leaves", "finds")


def chat_prompt(*numbers: int) -> str:
    """A user message of about 45 tokens that begins with the numbers, such as round, streams and stream."""
    rng = random.Random(repr(numbers))
    sentences = [
        f"the {rng.choice(SUBJECTS)} {rng.choice(VERBS)} a {rng.choice(SUBJECTS)}" for _ in range(2)
    ]
    return ", ".join([" ".join(map(str, numbers)), *sentences])


def rendered(prompt: str) -> str:
    """The message as the model's ChatML template renders it, for the loop that has no templates."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
