"""Items grouped by one of their fields, with counts in O(1). Pure."""

from __future__ import annotations

from typing import Generic, TypeVar

Item = TypeVar("Item")


class Groups(Generic[Item]):
    """Items by group and id; a group without items takes no memory."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Item]] = {}

    def add(self, group: str, item_id: str, item: Item) -> None:
        """Adds an item."""
        self._groups.setdefault(group, {})[item_id] = item

    def discard(self, group: str, item_id: str) -> None:
        """Removes an item, if it is there."""
        items = self._groups.get(group)
        if items is not None:
            items.pop(item_id, None)
            if not items:
                del self._groups[group]

    def count(self, group: str) -> int:
        """Items of a group, in O(1)."""
        items = self._groups.get(group)
        return 0 if items is None else len(items)

    def items(self, group: str) -> tuple[Item, ...]:
        """The items of a group, oldest first."""
        return tuple(self._groups.get(group, {}).values())

    def counts(self) -> dict[str, int]:
        """Items of each group that has some."""
        return {group: len(items) for group, items in self._groups.items()}
