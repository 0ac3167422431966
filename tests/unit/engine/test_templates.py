"""Chat templates of model files: what Hugging Face's dialect needs, and what hostile ones must not do."""

from __future__ import annotations

import pytest

from services.engine.templates import ChatTemplate, TemplateFailedError
from services.runtime.clock import ManualClock, SystemClock

HELLO = [{"role": "user", "content": "hi"}]


def template(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, clock=SystemClock(), seconds=1, bos_text="<s>", eos_text="</s>")


def render(source: str | None) -> str:
    return template(source).render(HELLO, [])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("{% for m in messages %}\n  {% if m %}\nx\n  {% endif %}\n{% endfor %}\n", "x\n"),
        ("{{ {'z': 'é<', 'a': [1, true, none]} | tojson }}", '{"z": "é<", "a": [1, true, null]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }}", "True"),
        ("{{ ['a', 'b'] | join('-') }}{{ 'ab'.replace('b', 'c') }}{{ 'a' * 3 }}", "a-bacaaa"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{% set n = namespace(x='a') %}{% set n.x = n.x ~ 1 %}{{ n.x }}", "a1"),
    ],
)
def test_the_dialect_of_chat_templates(source: str | None, expected: str) -> None:
    """Block trimming, loop controls, JSON with its key order and without HTML escapes, and the known globals."""
    assert render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * 'a' }}",
        "{{ [1] * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ 'x' | indent(1000000000) }}",
        "{{ ('a' * 10000).replace('a', 'b' * 10000) }}",
        "{{ ('a' * 10000) | replace('a', 'b' * 10000) }}",
        "{{ ('b' * 100000).join(['a'] * 10000) }}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
        "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}",
        "{% macro f() %}{% for i in range(99999) %}"
        + "x" * 1000
        + "{% endfor %}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ lipsum(n=1000000) }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_hostile_template_fails_in_bounded_time(source: str) -> None:
    """Loops end by the time limit, balloons before they are made, and nothing reaches Python."""
    with pytest.raises(TemplateFailedError):
        render(source)


def test_the_time_limit_is_on_the_injected_clock() -> None:
    """A template that takes longer than its seconds is stopped at its next loop body."""

    class Slow(ManualClock):
        def monotonic(self) -> float:
            self.advance(0.01)
            return self.now

    slow = ChatTemplate("{% for i in range(90000) %}{% endfor %}", clock=Slow(), seconds=1)
    with pytest.raises(TemplateFailedError, match="longer than 1 s"):
        slow.render(HELLO, [])


def test_what_a_template_says_when_it_refuses_is_passed_on_within_bounds() -> None:
    """raise_exception's text reaches the caller, cut to a readable length."""
    with pytest.raises(TemplateFailedError) as caught:
        render("{{ raise_exception('only one system message' ~ 'x' * 10000) }}")
    assert str(caught.value).startswith("only one system message")
    assert len(str(caught.value)) <= 500


def test_a_template_that_does_not_parse_is_refused_when_it_is_loaded() -> None:
    """A broken template is a broken model, not a failure of each request."""
    with pytest.raises(TemplateFailedError):
        template("{% if %}")


def test_whether_tools_are_shown_is_known() -> None:
    """A template that never mentions tools cannot show them."""
    assert template("{% for tool in tools %}{{ tool | tojson }}{% endfor %}").knows_tools
    assert not template(None).knows_tools
