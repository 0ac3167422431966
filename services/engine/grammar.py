"""Grammars that an answer must follow."""
from __future__ import annotations
from collections.abc import Mapping, Sequence
from typing import Any
from services.runtime.errors import CaravanError
def json_grammar(schema_text: str) -> str:
    """x"""
    raise CaravanError("UNSUPPORTED_FIELD", "soon", param="sampling.grammar")
def tool_grammar(tools: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """x"""
    raise CaravanError("UNSUPPORTED_FIELD", "soon", param="tool_choice")
