"""The rules of the house that a reader relies on, checked over the whole tree."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES_MAX = 400
FUNCTION_LINES_MAX = 70
HIDDEN_INPUTS = re.compile(
    r"\btime\.(time|monotonic|sleep|perf_counter)\w*\(|\brandom\.\w+\(|\buuid\.?uuid4\(|\bos\.environ\b|\bos\.getenv\("
)
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def _tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    return [
        ROOT / name
        for name in listed
        if name and not name.startswith("gen/") and (ROOT / name).is_file()
    ]


PYTHON = _tracked("*.py")
SERVICES = [path for path in PYTHON if path.is_relative_to(ROOT / "services")]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_code_to_check() -> None:
    """A tidy test that walks nothing proves nothing."""
    assert len(SERVICES) > 10


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_files_have_one_subject(path: Path) -> None:
    """No file is longer than 400 lines."""
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize("path", SERVICES, ids=_name)
def test_functions_fit_a_screen(path: Path) -> None:
    """No function is longer than 70 lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, (
                f"{_name(path)}:{node.lineno} {node.name}: {length} lines"
            )


@pytest.mark.parametrize("path", SERVICES, ids=_name)
def test_clock_randomness_and_environment_are_arguments(path: Path) -> None:
    """Only the runtime, settings and composition roots touch the clock, randomness and the environment (I8)."""
    allowed = path.parent.name == "runtime" or path.name in {"settings.py", "__main__.py"}
    if allowed:
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert not HIDDEN_INPUTS.search(line), f"{_name(path)}:{number}: {line.strip()}"


@pytest.mark.parametrize("path", [p for p in SERVICES if p.name != "llama.py"], ids=_name)
def test_only_llama_py_touches_ctypes(path: Path) -> None:
    """llama.cpp's pointers stay in one module of the engine."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert "ctypes" not in {name.split(".")[0] for name in names}, _name(path)


@pytest.mark.parametrize("path", SERVICES, ids=_name)
def test_public_names_have_docstrings(path: Path) -> None:
    """Every module and every public class and function of a module says what it is for."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{_name(path)} has no docstring"
    for node in tree.body:
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and not node.name.startswith("_"):
            assert ast.get_docstring(node), (
                f"{_name(path)}:{node.lineno} {node.name} has no docstring"
            )


def test_no_vague_module_names() -> None:
    """A module is named by what it does."""
    assert not [_name(path) for path in PYTHON if path.stem in VAGUE_NAMES]


def test_no_left_over_markers() -> None:
    """What is not done is refused with a typed error or written down, not marked in the code."""
    marker = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    assert not [
        _name(path)
        for path in _tracked("*.py", "*.proto", "*.lua", "*.sh")
        if marker.search(path.read_text())
    ]


def test_metrics_are_named_for_caravan() -> None:
    """Every series starts with caravan_, and each name is registered in one metrics.py, or one that several share, only."""
    seen: dict[str, str] = {}
    for path in SERVICES:
        for name in re.findall(
            r"""(?:Counter|Gauge|Histogram|MetricFamily)\(\s*["'](\w+)["']""", path.read_text()
        ):
            assert name.startswith("caravan_"), f"{_name(path)}: {name}"
            assert path.name.endswith("metrics.py"), f"{_name(path)}: {name}"
            assert seen.setdefault(name, _name(path)) == _name(path), name
    assert seen


def test_makefile_is_short_and_documented() -> None:
    """At most 12 targets, each with its help."""
    targets = re.findall(r"^([a-z]+):.*?(## .+)?$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert 0 < len(targets) <= 12
    assert all(text for _, text in targets), [name for name, text in targets if not text]


def test_only_the_engine_needs_llama_cpp() -> None:
    """A gateway or coordinator image stays small."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needing = [
        extra
        for extra, names in project["optional-dependencies"].items()
        if any("llama" in n for n in names)
    ]
    assert needing == ["engine"]
    assert not any("llama" in name for name in project["dependencies"])
