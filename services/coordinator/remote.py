"""How the engines of a deployment talk to a provider: a value, whatever the contract says of it. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Self

from caravan.engine.v1 import remote_options_pb2 as pb
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration

_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class Remote:
    """Options of an engine in front of a provider, as they were told.

    Messages can be changed and have no hash, and a second list of their fields would have to be kept in step with the contract:
    so the message is kept as its bytes. They are not shown, since what is not judged yet may hold a secret.
    """

    _serialized: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, options: pb.RemoteOptions) -> Self:
        """The value of a message. Fields that this version does not know are left out."""
        known = pb.RemoteOptions()
        known.CopyFrom(options)
        known.DiscardUnknownFields()
        return cls(known.SerializeToString(deterministic=True))

    def to_message(self) -> pb.RemoteOptions:
        """The message, a new one each time."""
        return pb.RemoteOptions.FromString(self._serialized)

    def to_json(self) -> str:
        """One text for one value, for the revision: bytes may be laid out in another way by another version of protobuf."""
        told = json_format.MessageToDict(self.to_message(), preserving_proto_field_name=True)
        return json.dumps(told, sort_keys=True)


def changed_fields(before: Remote, after: Remote) -> Iterator[str]:
    """Paths such as `limits.requests_per_minute`, in alphabetical order, whose values differ."""
    old, new = dict(_leaves(before.to_message())), dict(_leaves(after.to_message()))
    return (
        path
        for path in sorted(old.keys() | new.keys())
        if old.get(path, _MISSING) != new.get(path, _MISSING)
    )


def _leaves(message: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    for known, value in message.ListFields():
        path = prefix + known.name
        if known.message_type is None:
            yield path, value
        elif known.message_type is Duration.DESCRIPTOR:
            yield path, value.ToNanoseconds()
        else:
            # Even a part without fields may say something: an empty price is none to pay.
            yield from _leaves(value, f"{path}.") if value.ListFields() else iter([(path, True)])
