"""Prompts that no cache has seen: every round asks something new, so that each contestant computes all of it."""

from __future__ import annotations

import random

SUBJECTS = ("caravan", "harbour", "lantern", "orchard", "glacier", "market", "viaduct", "island")
VERBS = ("carries", "follows", "remembers", "crosses", "repairs", "measures", "leaves", "finds")


def chat_prompt(round_number: int, stream: int) -> str:
    """A user message of about 40 tokens whose first words differ from those of every other (round, stream)."""
    rng = random.Random(round_number * 1000 + stream)
    sentences = [
        f"the {rng.choice(SUBJECTS)} {rng.choice(VERBS)} a {rng.choice(SUBJECTS)}" for _ in range(4)
    ]
    return ", ".join([f"{round_number} {stream}", *sentences])


def rendered(prompt: str) -> str:
    """The message as the model's ChatML template renders it, for the loop that has no templates."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
