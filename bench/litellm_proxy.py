"""The LiteLLM proxy as its documentation has it in production: one Uvicorn worker, no debug logs, nothing optional switched on.

It gets an environment of its own in bench/.peers/litellm, made by the first run.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.children import FOLDER, StartError, free_port, running, wait_until_answers
from bench.contestants import MODEL_NAME, Server
from bench.provider_process import Provider

VERSION = "1.106.2"
# The price list is the one that the package brings: the bench asks nothing of the network. No master key: Caravan checks no keys
# either, so neither does LiteLLM have to.
ENVIRONMENT = {
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
}


def install() -> Path:
    """The program, installed once. Raises StartError without `uv`."""
    folder = FOLDER / "litellm"
    program = folder / "bin" / "litellm"
    if program.exists():
        return program
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(__file__).parents[1] / ".uv/bin"))
    if uv is None:
        raise StartError("LiteLLM is installed by uv, which is not there")
    FOLDER.mkdir(exist_ok=True)
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    wanted = f"litellm[proxy]=={VERSION}"
    python = str(folder / "bin" / "python")
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, wanted], check=True)
    return program


def configuration(served: Provider) -> str:
    """Its configuration for one provider with the API of OpenAI. JSON is YAML."""
    return json.dumps(
        {
            "model_list": [
                {
                    "model_name": MODEL_NAME,
                    "litellm_params": {
                        "model": f"openai/{MODEL_NAME}",
                        "api_base": served.base_url,
                        "api_key": "none",
                    },
                }
            ],
            "litellm_settings": {"request_timeout": 600, "set_verbose": False, "json_logs": True},
        }
    )


@contextlib.contextmanager
def litellm_proxy(served: Provider) -> Iterator[Server]:
    """Runs the proxy in front of a provider until the block ends. Raises StartError."""
    program = install()
    port = free_port()
    config = FOLDER / "litellm.yaml"
    config.write_text(configuration(served))
    argv = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with running("litellm", [*argv, "--num_workers", "1"], ENVIRONMENT) as process:
        wait_until_answers("litellm", process, f"http://127.0.0.1:{port}/health/liveliness")
        yield Server("litellm", f"LiteLLM proxy {VERSION}", port, process.pid)
