"""Loading a model leaves the environment of the process alone: gRPC's threads read it, and in C that is a race with writing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).parents[2] / "models" / "caravan-demo.gguf"
SCRIPT = """
import ctypes, os, sys
from services.engine.settings import EngineSettings, prepare_threads
from services.runtime.settings import load

prepare_threads(load(EngineSettings, {"CARAVAN_ENGINE_MODEL": "demo=" + sys.argv[1]}), os.environ)


def in_c():
    entries = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    found = []
    while entries[len(found)] is not None:
        found.append(entries[len(found)])
    return found


before = in_c()
import llama_cpp

llama_cpp.llama_backend_init()
assert llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
changed = set(in_c()) ^ set(before)
assert not changed, changed
"""


def test_loading_a_model_does_not_write_the_environment() -> None:
    """Whatever llama.cpp would set is there before any other thread is."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(MODEL)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
