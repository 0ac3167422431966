"""The corpus of the demo model: reproducible, and split so that evaluation is honest."""

import json
import random

import pytest

from models.corpus import memory
from models.corpus.dialogues import PLAIN, training_dialogue
from models.corpus.exchange import draw, is_held_out
from models.corpus.graded import GRADED_SKILLS, graded_dialogue
from models.mixtures import PHASES
from models.template import Renderer

NORMAL = PHASES[-1].mixture


def test_the_same_seed_gives_the_same_dialogues() -> None:
    """The corpus is a function of the seed: training can be repeated."""
    first, second = random.Random(4), random.Random(4)
    for _ in range(50):
        assert training_dialogue(first, NORMAL) == training_dialogue(second, NORMAL)


@pytest.mark.parametrize("skill", GRADED_SKILLS)
def test_graded_questions_are_held_out(skill: str) -> None:
    """Evaluation asks only what training never asks."""
    rng = random.Random(5)
    for _ in range(20):
        exchange = graded_dialogue(rng, skill).graded
        assert exchange is not None
        assert exchange.skill == skill
        assert is_held_out(exchange.key)


@pytest.mark.parametrize("skill", PLAIN)
def test_training_never_draws_what_is_held_out(skill: str) -> None:
    """The two sides of the split do not meet."""
    rng = random.Random(6)
    for _ in range(50):
        assert not is_held_out(draw(PLAIN[skill], rng, held_out=False).key)


def test_calls_name_a_listed_tool_with_its_arguments() -> None:
    """Every call in training follows a schema of its own dialogue."""
    rng = random.Random(7)
    calls = 0
    for _ in range(300):
        dialogue = training_dialogue(rng, NORMAL)
        schemas = {tool["function"]["name"]: tool["function"] for tool in dialogue.tools}
        for message in dialogue.messages:
            for call in message.get("tool_calls", ()):
                calls += 1
                declared = schemas[call["function"]["name"]]["parameters"]
                arguments = call["function"]["arguments"].keys()
                assert arguments <= declared["properties"].keys()
                assert arguments >= set(declared.get("required", ()))
    assert calls > 50


def test_stories_name_their_hero() -> None:
    """The rule by which stories are graded holds for the stories of the corpus."""
    rng = random.Random(8)
    for _ in range(100):
        story = PLAIN["stories"](rng)
        assert story.subject is not None
        assert story.answer["content"].count(story.subject) >= 4


def test_json_answers_parse() -> None:
    """What the model learns to write as JSON is JSON."""
    rng = random.Random(9)
    for _ in range(100):
        assert isinstance(json.loads(PLAIN["JSON"](rng).answer["content"]), dict)


def test_marks_of_the_template_never_occur_inside_messages() -> None:
    """A message that contained a mark would end its own turn."""
    rng = random.Random(10)
    for _ in range(200):
        for message in training_dialogue(rng, NORMAL).messages:
            assert "<" not in (message["content"] or "")


def test_arguments_as_text_and_as_object_render_alike() -> None:
    """The OpenAI API sends arguments as text, other clients as an object."""
    function = {"name": "add", "arguments": {"a": 1, "b": 2}}
    text = {"name": "add", "arguments": json.dumps(function["arguments"])}
    renderer = Renderer()
    rendered = [
        renderer.render([{"role": "assistant", "content": None, "tool_calls": [{"function": one}]}])
        for one in (function, text)
    ]
    assert rendered[0] == rendered[1]
    assert (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>' in rendered[0]
    )


def test_tool_results_in_a_row_share_one_turn() -> None:
    """Two results of parallel calls come back in one turn of the user."""
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert Renderer().render(results) == (
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"
        "</tool_response><|im_end|>\n"
    )


def test_content_may_come_in_parts() -> None:
    """Content as a list of text parts reads like the text."""
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    renderer = Renderer()
    assert renderer.render([{"role": "user", "content": parts}]) == renderer.render(
        [{"role": "user", "content": "Hello"}]
    )


def test_a_question_without_an_answer_is_asked_in_every_wording() -> None:
    """Held out is what was told, not the wording: else the model learns wordings as answers."""
    trained: dict[str, set[str]] = {trait.missing: set() for trait in memory.TRAITS}
    rng = random.Random(11)
    for _ in range(3000):
        known: dict[str, str] = {}
        memory.tell(rng, known)
        question = memory.ask(rng, known)
        answer = question.answer["content"]
        if answer in trained and not is_held_out(question.key):
            trained[answer].add(question.messages[0]["content"])
    for trait in memory.TRAITS:
        assert set(trait.asks) <= trained[trait.missing]
