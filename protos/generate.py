"""Generates gen/ and deploy/envoy/caravan.binpb from protos/ (`make proto`); --check tells whether they are up to date."""

from __future__ import annotations

import argparse
import filecmp
import importlib.resources
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"


def _compile(*arguments: str) -> None:
    well_known = str(importlib.resources.files("grpc_tools") / "_proto")
    code = protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *arguments])
    if code != 0:
        sys.exit(code)


def generate(root: Path) -> None:
    """Writes both under `root`; what stood in gen/ before is removed, so that nothing outlives its proto."""
    gen = root / "gen"
    shutil.rmtree(gen, ignore_errors=True)
    (gen / "caravan").mkdir(parents=True)
    (gen / "caravan" / "py.typed").touch()
    (root / "deploy" / "envoy").mkdir(parents=True, exist_ok=True)
    scripts = Path(sys.executable).parent
    files = sorted(str(path) for path in (PROTOS / "caravan").rglob("*.proto"))
    _compile(
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"--python_out={gen}",
        f"--grpc_python_out={gen}",
        f"--mypy_out=quiet:{gen}",
        f"--mypy_grpc_out=quiet:{gen}",
        *files,
    )
    # Messages without services get an empty stub file from the gRPC plugins: it says nothing.
    for stub in (gen / "caravan" / "core").rglob("*_pb2_grpc.*"):
        stub.unlink()
    _compile(
        "--include_imports",
        f"--descriptor_set_out={root / 'deploy' / 'envoy' / 'caravan.binpb'}",
        *[file for file in files if "/inference/" in file or "/openai/" in file],
    )


def stale(root: Path) -> list[str]:
    """Paths, relative to the project, that differ from what `generate` wrote under `root`."""
    fresh = {p.relative_to(root) for p in root.rglob("*") if p.is_file()}
    kept = {p.relative_to(ROOT) for p in (ROOT / "gen").rglob("*") if "__pycache__" not in p.parts}
    kept = {p for p in kept if (ROOT / p).is_file()}
    differing = kept - fresh
    for path in fresh:
        ours = ROOT / path
        if not ours.is_file() or not filecmp.cmp(root / path, ours, shallow=False):
            differing.add(path)
    return sorted(map(str, differing))


def main() -> None:
    """Writes, or with --check compares and exits 1 on a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 on a difference"
    )
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        differing = stale(Path(scratch))
    if differing:
        sys.exit("not up to date, run `make proto`:\n  " + "\n  ".join(differing))


if __name__ == "__main__":
    main()
