"""The settings of the coordinator that have a form of their own."""

from __future__ import annotations

import pytest

from services.coordinator.settings import CoordinatorSettings, shares
from services.runtime.settings import SettingsError, load


def test_shares_of_tenants() -> None:
    """NAME=WEIGHT,...; a name may hold an equals sign, and none at all is none."""
    assert shares("") == {}
    assert shares("a=3,b=0.5,c=d=1") == {"a": 3.0, "b": 0.5, "c=d": 1.0}


@pytest.mark.parametrize(
    "text", ["a", "a=", "a=x", "a=0", "a=-1", "a=nan", "a=1,a=2", "a=1,", "a=101"]
)
def test_wrong_shares_stop_the_process(text: str) -> None:
    """Weights are within 0.01 and 100, and each tenant has one."""
    with pytest.raises(SettingsError, match="CARAVAN_COORDINATOR_TENANT_WEIGHTS"):
        load(CoordinatorSettings, {"CARAVAN_COORDINATOR_TENANT_WEIGHTS": text})


def test_policies_are_named() -> None:
    """An unknown policy is refused with the known ones."""
    assert load(CoordinatorSettings, {}).routing == "affinity"
    with pytest.raises(SettingsError, match="least_loaded"):
        load(CoordinatorSettings, {"CARAVAN_COORDINATOR_ROUTING": "random"})
