"""Grade the GGUF on held-out draws of every skill: `python -m models.evaluate`."""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from models import stable
from models.corpus.graded import GRADED_SKILLS, graded_dialogue
from models.grading import is_right
from models.llama_runner import LlamaRunner
from models.template import TEMPLATE, Renderer

NOT_CLAIMED = frozenset({"echo of invented words", "addition to 20 + 20", "two tool calls"})
"""Skills that the model card names as not learned."""
CLAIMED = frozenset(GRADED_SKILLS) - NOT_CLAIMED
NEEDED = 0.9
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Score:
    """One row of the table."""

    skill: str
    right: int
    asked: int
    stopped: int

    @property
    def too_low(self) -> bool:
        """Whether the card claims more than this."""
        return self.skill in CLAIMED and self.right < NEEDED * self.asked


def grade(runner: LlamaRunner, skill: str, asked: int, seed: int, show: int) -> Score:
    """Ask held-out questions of one skill, in both key orders of tools; print `show` failures."""
    rng = random.Random(f"{seed} {skill}")
    right = stopped = 0
    for number in range(asked):
        dialogue = graded_dialogue(rng, skill)
        exchange = dialogue.graded
        assert exchange is not None
        renderer = Renderer(sort_keys=number % 2 == 1)
        prompt = renderer.render(dialogue.messages[:-1], dialogue.tools, add_generation_prompt=True)
        answer = runner.greedy(prompt)
        stopped += answer.stopped
        if is_right(exchange, answer):
            right += 1
        elif show > 0:
            show -= 1
            wanted = exchange.answer.get("tool_calls") or exchange.answer["content"]
            print(f"  {exchange.messages[0]['content']!r}: {answer.text!r}, not {wanted!r}")
    return Score(skill, right, asked, stopped)


def print_table(scores: list[Score]) -> None:
    """The table of the model card."""
    print("| skill | right | ended by itself | claimed |")
    print("| --- | --- | --- | --- |")
    for row in scores:
        claimed = "yes" if row.skill in CLAIMED else "no"
        print(f"| {row.skill} | {row.right}/{row.asked} | {row.stopped}/{row.asked} | {claimed} |")


def main() -> int:
    """Print the table and the stable prompts; 1 if a claimed skill is under 90 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "caravan-demo.gguf")
    parser.add_argument("--asked", type=int, default=100, help="questions of each skill")
    parser.add_argument("--seed", type=int, default=2027)
    parser.add_argument("--show", type=int, default=2, help="failures to print of each skill")
    parser.add_argument("--skill", action="append", help="grade only these")
    parser.add_argument("--stable", type=Path, default=HERE / "stable_prompts.json")
    options = parser.parse_args()
    runner = LlamaRunner(options.model)
    if runner.chat_template() != TEMPLATE:
        print("the file's chat template is not models/chat_template.jinja: export again")
        return 1
    skills = options.skill or GRADED_SKILLS
    scores = [grade(runner, skill, options.asked, options.seed, options.show) for skill in skills]
    print_table(scores)
    if not options.skill:
        chosen = stable.choose(runner)
        stable.write(chosen, options.stable)
        print(f"{len(chosen)} stable prompts written to {options.stable}")
        if len(chosen) < stable.WANTED:
            print(f"fewer than the {stable.WANTED} that tests want")
            return 1
    runner.close()
    low = [row.skill for row in scores if row.too_low]
    if low:
        print(f"under {NEEDED:.0%}: {', '.join(low)}")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
