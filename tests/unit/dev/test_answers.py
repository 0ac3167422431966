"""What the scripted provider answers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from services.dev.provider.answers import compose
from services.dev.provider.asked import Asked, AskedError
from services.dev.provider.schemas import instance
from services.dev.provider.script import Script, ScriptError

ASKED = Asked(model="m", stream=True, last_user="How are you?", prompt_characters=12)


def text(asked: Asked, script: Script) -> str:
    return "".join(compose(asked, script).pieces)


def test_the_same_request_gets_the_same_answer() -> None:
    script = Script(tokens=40)
    assert compose(ASKED, script) == compose(ASKED, script)
    assert len(compose(ASKED, script).pieces) == 40
    assert text(ASKED, script) != text(replace(ASKED, last_user="And now?"), script)
    assert text(ASKED, script) != text(ASKED, replace(script, seed=1))


def test_an_echo_is_what_the_user_said_to_the_character() -> None:
    said = "  two  spaces,\na line, and an émoji \N{ROCKET}\n"
    assert text(replace(ASKED, last_user=said), Script(echo=True)) == said


def test_an_answer_is_as_long_as_it_may_be() -> None:
    cut = compose(replace(ASKED, max_tokens=3), Script(text="one two three four"))
    assert ("".join(cut.pieces), cut.finish, cut.completion_tokens) == (
        "one two three",
        "length",
        3,
    )
    whole = compose(replace(ASKED, max_tokens=4), Script(text="one two three four"))
    assert whole.finish == "stop"


def test_the_first_stop_text_ends_the_answer() -> None:
    asked = replace(ASKED, stop=("never", " two", "ee f"))
    found = compose(asked, Script(text="one two three four"))
    assert ("".join(found.pieces), found.finish, found.stop_text) == ("one", "stop", " two")


def test_usage_is_counted() -> None:
    found = compose(replace(ASKED, prompt_characters=9, images=1), Script(cached_tokens=1000))
    assert (found.prompt_tokens, found.cached_tokens) == (88, 88)


def test_a_forced_tool_is_called_with_what_its_schema_wants() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    asked = replace(ASKED, tools=(("look", schema),), forced_tool="look")
    found = compose(asked, Script())
    assert found.finish == "tool_calls"
    assert found.call is not None
    assert found.call.arguments_value() == {"city": "scripted"}
    assert found.completion_tokens == len(found.call.arguments)


def test_json_follows_the_schema() -> None:
    schema: dict[str, Any] = {
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "count": {"type": ["integer", "null"], "minimum": 3},
            "list": {"type": "array", "items": {"type": "BOOLEAN"}, "minItems": 2},
            "either": {"anyOf": [{"const": 7}, {"type": "string"}]},
            "tree": {"$ref": "#/$defs/node"},
            "left_out": {"type": "string"},
        },
        "required": ["kind", "count", "list", "either", "tree"],
    }
    found = json.loads(text(replace(ASKED, schema=schema), Script()))
    tree = found.pop("tree")
    assert found == {"kind": "a", "count": 3, "list": [True, True], "either": 7}
    assert "next" in tree


def test_a_schema_that_says_nothing_known_gets_null() -> None:
    assert instance({"type": "unheard"}) is None
    assert instance({"$ref": "#/nowhere"}) is None


@pytest.mark.parametrize("schema", [{"required": 3}, {"type": "array", "minItems": "x"}])
def test_a_schema_that_makes_no_sense_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(AskedError):
        compose(replace(ASKED, schema=schema), Script())


def test_a_model_that_is_not_there_and_a_prompt_that_is_too_long_are_refused() -> None:
    with pytest.raises(AskedError) as missing:
        compose(ASKED, Script(models=("other",)))
    assert missing.value.status == 404
    with pytest.raises(AskedError) as long:
        compose(replace(ASKED, prompt_characters=5), Script(context_tokens=1))
    assert (long.value.status, long.value.reason) == (400, "context_length")


def test_a_script_is_changed_field_by_field() -> None:
    changed = Script(tokens=3).changed({"pace_s": 1, "models": ["a"], "echo": True})
    assert changed == Script(tokens=3, pace_s=1, models=("a",), echo=True)


@pytest.mark.parametrize(
    "values",
    [
        {"token": 1},
        {"tokens": "1"},
        {"tokens": True},
        {"tokens": -1},
        {"pace_s": -1},
        {"models": 3},
    ],
)
def test_scripts_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ScriptError):
        Script().changed(values)
