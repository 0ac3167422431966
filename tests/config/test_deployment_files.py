"""Files of deployments: what is right is read, and every mistake of a file is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from caravan.coordinator.v1 import deployment_pb2 as pb

from services.coordinator.deployment import (
    CapacityPolicy,
    Deployment,
    EngineOptions,
    Fallback,
    FallbackReason,
    Runtime,
    Serving,
)
from services.coordinator.deployment_store import load_kept
from services.coordinator.tasks import Priority
from services.runtime.settings import SettingsError

FOLDER = Path(__file__).parent / "deployments"
WRONG = sorted(path.name for path in FOLDER.glob("*.toml") if path.name != "valid.toml")
EXPECT = "# expect: "


@pytest.mark.parametrize("name", WRONG)
def test_every_mistake_is_told(name: str) -> None:
    """The comments of the file say which mistakes it has: these are told, and no others."""
    path = FOLDER / name
    expected = [
        line.removeprefix(EXPECT) for line in path.read_text().splitlines() if EXPECT in line
    ]
    assert expected
    with pytest.raises(SettingsError) as raised:
        load_kept("", str(path), wall=0)
    told = [line.strip() for line in str(raised.value).splitlines()[1:]]
    unexpected = [line for line in told if not line.startswith(tuple(expected))]
    missed = [line for line in expected if not any(other.startswith(line) for other in told)]
    assert (unexpected, missed) == ([], [])
    assert len(told) == len(expected)


def test_a_file_without_mistakes() -> None:
    """Each field arrives; a relative model is taken from the folder of the file; defaults are filled in."""
    loaded = load_kept("", str(FOLDER / "valid.toml"), wall=5.0)
    assert loaded == [
        (
            Deployment(
                "chat",
                str(FOLDER / "models" / "chat.gguf"),
                Runtime.LLAMA_CPP,
                replicas=2,
                engine=EngineOptions(4096, 16, 2),
                serving=Serving(8, 32, 1.5, CapacityPolicy.FALLBACK),
                priority=Priority.HIGH,
                fallback=(
                    Fallback(
                        "small", frozenset({FallbackReason.CAPACITY, FallbackReason.UNAVAILABLE})
                    ),
                ),
                idempotent=False,
            ),
            5.0,
        ),
        (Deployment("small", "scripted:?tokens=3", Runtime.SCRIPTED), 5.0),
    ]


def test_a_file_that_is_not_there() -> None:
    """A missing file is a mistake of the settings; no file is none."""
    with pytest.raises(SettingsError, match="No such file"):
        load_kept("", str(FOLDER / "none.toml"), wall=0)
    assert load_kept("", "", wall=0) == []


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """docs/OPERATING.md shows a file without mistakes, with every field but the inferred runtime."""
    text = (Path(__file__).parents[2] / "docs" / "OPERATING.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "d.toml").write_text(example)
    (chat, _), (small, _) = load_kept("", str(tmp_path / "d.toml"), wall=0)
    assert (chat.serving.max_wait_s, chat.replicas, small.replicas) == (20.0, 2, 1)
    fields = [*pb.Deployment.DESCRIPTOR.fields_by_name, *pb.Serving.DESCRIPTOR.fields_by_name]
    fields += [*pb.EngineOptions.DESCRIPTOR.fields_by_name, *pb.Fallback.DESCRIPTOR.fields_by_name]
    assert [field for field in fields if field not in example] == ["runtime"]
