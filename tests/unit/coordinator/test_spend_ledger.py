"""The ledger of costs: whatever becomes of reports, the sums are those of the truth."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator import spend_ledger, spend_store
from services.coordinator.rolling_sum import RollingSum
from services.coordinator.spend_ledger import OTHERS, Account, Amounts, SpendLedger

NOW = 1_000.0


def counter(tenant: str, nanousd: int, requests: int = 1) -> pb.SpendCounter:
    """What an engine tells of a tenant."""
    return pb.SpendCounter(tenant=tenant, nanousd=nanousd, requests=requests)


@dataclass
class Truth:
    """Engines' own counters, by life and tenant, and what they have told so far."""

    lives: dict[str, dict[str, int]] = field(default_factory=dict)
    reports: list[tuple[str, list[pb.SpendCounter]]] = field(default_factory=list)

    def spend(self, life: str, tenant: str, nanousd: int) -> None:
        counters = self.lives.setdefault(life, {})
        counters[tenant] = counters.get(tenant, 0) + nanousd
        self.reports.append(self.last(life))

    def last(self, life: str) -> tuple[str, list[pb.SpendCounter]]:
        return life, [counter(tenant, sum_) for tenant, sum_ in self.lives[life].items()]

    def of_tenant(self, tenant: str) -> int:
        return sum(counters.get(tenant, 0) for counters in self.lives.values())


SPENDS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["", "x", "y"]), st.integers(0, 1_000)),
    min_size=1,
    max_size=12,
)


@given(spends=SPENDS, data=st.data())
def test_reports_may_be_lost_late_or_repeated(
    spends: list[tuple[str, str, int]], data: st.DataObject
) -> None:
    """In any order, any number of times, with crashes that lose what was not saved: once each engine has told, all is right."""
    truth, ledger, now = Truth(), SpendLedger(1e9), NOW
    for life, tenant, nanousd in spends:
        truth.spend(life, tenant, nanousd)
    saved = spend_store.snapshot(ledger)
    indexes = st.integers(0, len(truth.reports) - 1)
    for index in data.draw(st.lists(indexes, max_size=20)):
        now += data.draw(st.floats(0, 4_000))
        before = _total(ledger)
        ledger.take("chat", *truth.reports[index], now)
        assert _total(ledger) >= before
        assert _total(ledger) <= sum(map(truth.of_tenant, ("", "x", "y")))
        if data.draw(st.booleans()):
            saved = spend_store.snapshot(ledger)
        if data.draw(st.integers(0, 4)) == 0:
            ledger = _restored(saved, now)
    for life in truth.lives:
        ledger.take("chat", *truth.last(life), now)
    spend = ledger.find("chat")
    assert spend is not None
    assert spend.own.total.nanousd == sum(map(truth.of_tenant, ("", "x", "y")))
    for tenant, account in spend.tenants.items():
        assert account.total.nanousd == truth.of_tenant(tenant)
        assert 0 <= account.hour.sum(ledger.epoch(now)) <= account.day.sum(ledger.epoch(now))
    assert spend.own.day.sum(ledger.epoch(now)) <= spend.own.total.nanousd


def _total(ledger: SpendLedger) -> int:
    spend = ledger.find("chat")
    return 0 if spend is None else spend.own.total.nanousd


def _restored(saved: list[spend_store.Line], now: float) -> SpendLedger:
    ledger = SpendLedger(1e9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spend.jsonl"
        spend_store.save(path, saved)
        spend_store.load(path, ledger, now)
    return ledger


def test_a_report_tells_who_was_charged_money() -> None:
    """Not who has only asked, and nobody whose numbers are known."""
    ledger = SpendLedger()
    assert ledger.take("chat", "a", [counter("x", 5), counter("y", 0)], NOW) == ["x"]
    assert ledger.take("chat", "a", [counter("x", 5), counter("y", 0)], NOW) == []
    assert ledger.take("chat", "b", [counter("x", 5)], NOW) == ["x"]
    assert ledger.take("idle", "c", [], NOW) == []
    assert [name for name, _ in ledger] == ["chat"]
    assert ledger.lives.keys() == {"a", "b"}


def test_lives_that_say_nothing_are_forgotten_after_a_day() -> None:
    """Not before; one that still reports, even if nothing new, is kept."""
    ledger = SpendLedger()
    ledger.take("chat", "gone", [counter("x", 5)], NOW)
    ledger.take("chat", "there", [counter("x", 5)], NOW)
    ledger.expire(NOW + 86_000)
    ledger.take("chat", "there", [counter("x", 5)], NOW + 86_000)
    assert ledger.lives.keys() == {"gone", "there"}
    ledger.expire(NOW + 87_000)
    assert ledger.lives.keys() == {"there"}
    assert _total(ledger) == 10


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tenants beyond the bound share an account; idle ones make room; lives and deployments go, the longest unused first."""
    for name in ("TENANTS_MAX", "LIVES_MAX", "DEPLOYMENTS_MAX"):
        monkeypatch.setattr(spend_ledger, name, 3)
    ledger = SpendLedger()
    ledger.take("chat", "a", [counter(f"t{n}", 1) for n in range(6)], NOW)
    spend = ledger.find("chat")
    assert spend is not None
    assert {name: one.total.nanousd for name, one in spend.tenants.items()} == {
        "t0": 1,
        "t1": 1,
        "t2": 1,
        OTHERS: 3,
    }
    assert spend.account_of("t0") is spend.tenants["t0"]
    assert spend.account_of("new") is spend.tenants[OTHERS]
    # A day later the first of them makes room, and what it has cost is not forgotten.
    ledger.take("chat", "b", [counter("new", 1)], NOW + 100_000)
    assert {name: one.total.nanousd for name, one in spend.tenants.items()} == {
        "t1": 1,
        "t2": 1,
        OTHERS: 4,
        "new": 1,
    }
    assert spend.tenants[OTHERS].hour.sum(ledger.epoch(NOW + 100_000)) == 0
    assert spend.own.total.nanousd == 7
    for life in "cdef":
        ledger.take(life, life, [counter("x", 1)], NOW + 100_000)
    assert ledger.lives.keys() == {"d", "e", "f"}
    assert [name for name, _ in ledger] == ["d", "e", "f"]


def test_the_file_keeps_everything(tmp_path: Path) -> None:
    """Accounts, windows and what each life has told; a ledger that is read back tells the same."""
    path = tmp_path / "folder" / "spend.jsonl"
    ledger = SpendLedger(500.0)
    ledger.take("chat", "a", [counter("x", 5), counter("", 7)], NOW)
    ledger.take("chat", "a", [counter("x", 9, 2)], NOW + 4_000)
    spend_store.save(path, spend_store.snapshot(ledger))
    again = SpendLedger(600.0)
    spend_store.load(path, again, NOW + 3_900)
    assert spend_store.snapshot(again) == spend_store.snapshot(ledger)
    assert again.take("chat", "a", [counter("x", 9, 2), counter("", 7)], NOW + 3_900) == []
    spend = again.find("chat")
    assert spend is not None
    at = again.epoch(NOW + 3_900)
    assert (spend.own.hour.sum(at), spend.own.day.sum(at)) == (4, 16)
    assert spend.tenants["x"].total == Amounts(9, 2)
    assert list(tmp_path.glob("**/*.new")) == []


def test_a_clock_that_was_set_back_counts_what_lies_ahead_as_of_now(tmp_path: Path) -> None:
    """Else it would count until the clock has caught up."""
    path = tmp_path / "spend.jsonl"
    ledger = SpendLedger(1_000_000.0)
    ledger.take("chat", "a", [counter("x", 5)], NOW)
    spend_store.save(path, spend_store.snapshot(ledger))
    again = SpendLedger(0.0)
    spend_store.load(path, again, NOW)
    spend = again.find("chat")
    assert spend is not None
    assert spend.own.hour.sum(again.epoch(NOW)) == 5
    assert spend.own.hour.sum(again.epoch(NOW + 3_700)) == 0


LIFE = '{"life":"a","tenant":"x","total":[1,2,3,4,5]}'
OWN = '{"deployment":"chat","total":[1],"hour":[[1],[1]],"day":[[1],[1]]}'


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["{"],
        ["[]"],
        ["null"],
        ['{"version":2}', '{"lines":0}'],
        ['{"version":1}'],
        ['{"version":1}', LIFE],
        ['{"version":1}', LIFE, '{"lines":2}'],
        ['{"version":1}', LIFE.replace("1,2", "-1,2"), '{"lines":1}'],
        ['{"version":1}', LIFE.replace("1,2", '"1",2'), '{"lines":1}'],
        ['{"version":1}', LIFE.replace("1,2", "0,1,2"), '{"lines":1}'],
        ['{"version":1}', LIFE.replace('"tenant"', '"x"'), '{"lines":1}'],
        ['{"version":1}', OWN.replace("[[1],[1]]", "[[1],[1,2]]"), '{"lines":1}'],
        ['{"version":1}', OWN.replace("[[1],[1]]", "[]"), '{"lines":1}'],
        ['{"version":1}', OWN.replace("hour", "week"), '{"lines":1}'],
    ],
)
def test_what_is_no_record_is_refused_as_a_whole(lines: list[str], tmp_path: Path) -> None:
    """With one kind of error, and nothing of it taken."""
    path = tmp_path / "spend.jsonl"
    path.write_text("\n".join(lines))
    ledger = SpendLedger()
    with pytest.raises(ValueError):
        spend_store.load(path, ledger, NOW)
    assert not ledger.deployments
    assert not ledger.lives


def test_accounts_do_not_share_their_windows() -> None:
    """A default that is made once would be everybody's."""
    one, other = Account(), Account()
    one.add(Amounts(1), 0)
    assert isinstance(other.hour, RollingSum)
    assert other.hour.sum(0) == 0
