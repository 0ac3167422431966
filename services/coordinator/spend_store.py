"""What the coordinator keeps of its ledger across starts: a file of JSON lines that is replaced as a whole.

The first line tells the version, the last one how many lines there are; between them each account and each counter of a life of an
engine has one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

from services.coordinator.rolling_sum import DAY, HOUR, RollingSum, Span
from services.coordinator.spend_ledger import Account, Amounts, DeploymentSpend, SpendLedger
from services.coordinator.whole_file import replace_file

_VERSION: Final = 1
_MISTAKES = (ValueError, KeyError, TypeError, AttributeError)
Line: TypeAlias = dict[str, Any]


def snapshot(ledger: SpendLedger) -> list[Line]:
    """The ledger as JSON's types, of which nothing changes afterwards. O(tenants); some microseconds for each that has changed."""
    lines: list[Line] = []
    for name, spend in ledger.deployments.items():
        lines.append(spend.own.kept or _line(spend.own, {"deployment": name}))
        lines += (
            account.kept or _line(account, {"deployment": name, "tenant": tenant})
            for tenant, account in spend.tenants.items()
        )
    for name, life in ledger.lives.items():
        lines += (
            {"life": name, "tenant": tenant, "total": told}
            for tenant, told in life.counters.items()
        )
    return lines


def _line(account: Account, whose: Line) -> Line:
    account.kept = {
        **whose,
        "total": account.total,
        "hour": account.hour.buckets(),
        "day": account.day.buckets(),
    }
    return account.kept


def save(path: Path, lines: list[Line]) -> None:
    """Replaces the file of a former `save`; a crash leaves the one or the other. Raises OSError."""
    whole = ({"version": _VERSION}, *lines, {"lines": len(lines)})
    # Line by line: one call of the encoder for all would hold up the event loop, although this runs in a thread.
    replace_file(path, (json.dumps(line, separators=(",", ":")) + "\n" for line in whole))


def load(path: Path, ledger: SpendLedger, now: float) -> None:
    """Puts what a file says into a ledger, at `now` in monotonic seconds. Raises ValueError for what is no such file, OSError."""
    with path.open(encoding="utf-8") as file:
        try:
            _read(map(json.loads, file), ledger, now)
        except _MISTAKES as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


def _read(lines: Iterator[Any], ledger: SpendLedger, now: float) -> None:
    first, read = next(lines, None), 0
    if first != {"version": _VERSION}:
        raise ValueError(f"it begins with {first!r}")
    deployments: dict[str, DeploymentSpend] = {}
    lives: dict[str, dict[str, Amounts]] = {}
    for line in lines:
        if "lines" in line:
            break
        read += 1
        if "life" in line:
            lives.setdefault(line["life"], {})[line["tenant"]] = _amounts(line["total"])
            continue
        spend = deployments.setdefault(line["deployment"], DeploymentSpend())
        account = _account(line, ledger.epoch(now))
        if "tenant" in line:
            spend.tenants[line["tenant"]] = account
        else:
            spend.own = account
    else:
        raise ValueError("it has no end")
    if line["lines"] != read:
        raise ValueError(f"it has {read} lines instead of {line['lines']!r}")
    ledger.restore(deployments, lives, now)


def set_aside(path: Path) -> Path:
    """Renames a file that makes no sense, so that a person may look at it; returns where it is then. Raises OSError."""
    aside = path.with_name(path.name + ".bad")
    path.replace(aside)
    return aside


def _account(told: Line, at: float) -> Account:
    return Account(
        _amounts(told["total"]), _window(HOUR, told["hour"], at), _window(DAY, told["day"], at)
    )


def _amounts(numbers: list[Any]) -> Amounts:
    return Amounts(*map(_count, numbers))


def _window(span: Span, told: list[Any], at: float) -> RollingSum:
    numbers, amounts = told
    # Where the clock was set back, what lies ahead of it now was spent just before.
    latest = int(at // span.bucket_s)
    return RollingSum(
        span, (min(_count(number), latest) for number in numbers), map(_count, amounts)
    )


def _count(number: Any) -> int:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is not a count")
    return number
