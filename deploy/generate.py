"""Generates gen/ and deploy/envoy/caravan.binpb from protos/ (`make proto`)."""

from __future__ import annotations

import importlib.resources
import shutil
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def _compile(*arguments: str) -> None:
    well_known = str(importlib.resources.files("grpc_tools") / "_proto")
    code = protoc.main(["protoc", f"-I{ROOT / 'protos'}", f"-I{well_known}", *arguments])
    if code != 0:
        sys.exit(code)


def main() -> None:
    """Writes both; what stood in gen/ before is removed, so that nothing outlives its proto."""
    gen = ROOT / "gen"
    shutil.rmtree(gen, ignore_errors=True)
    (gen / "caravan").mkdir(parents=True)
    (gen / "caravan" / "py.typed").touch()
    scripts = Path(sys.executable).parent
    files = sorted(str(path) for path in (ROOT / "protos" / "caravan").rglob("*.proto"))
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
        f"--descriptor_set_out={ROOT / 'deploy' / 'envoy' / 'caravan.binpb'}",
        *[file for file in files if "/inference/" in file or "/openai/" in file],
    )


if __name__ == "__main__":
    main()
