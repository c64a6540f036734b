"""Our messages as Flower's: the one place where the two meet.

A plan travels as one record with one value, its bytes; so does an upload. One record is the
fewest that Flower can send, and every record costs a request of its own on the wire. A megabyte
and more goes as an array, which Flower cuts in pieces and keeps once for all receivers. What is
inside stays sealed until our own door opens it, so no length or type that Flower reports is
trusted.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedistill.backends import Reply
from fedistill.errors import Rejected
from fedistill.wire.messages import Failure

ROUND = "train.round"
"""Type of the message that carries a plan; the answer carries an upload."""
WHO = "query.who"
"""Type of the message that asks a node which site it is."""
KEY = "f"
BULK = "b"
STYPE = "fedistill.bytes"
LARGE = 1 << 20
"""Bytes from which a value goes as an array."""
MOST_REASON = 40

LOST = {3, 4, 5, 8}
"""Flower's codes of a message or an answer that did not arrive: asking again may help."""


def request(
    kind: str, node: int, fields: Mapping[str, bytes | str], *, group: str, ttl: float
) -> Message:
    """A message to one node; unread after ``ttl`` seconds it is void."""
    return Message(_content(fields), node, kind, ttl=ttl, group_id=group)


def response(message: Message, fields: Mapping[str, bytes | str]) -> Message:
    """The answer to a message."""
    return Message(_content(fields), reply_to=message)


def _content(fields: Mapping[str, bytes | str]) -> RecordDict:
    large = {
        name: Array(dtype="uint8", shape=(len(value),), stype=STYPE, data=value)
        for name, value in fields.items()
        if isinstance(value, bytes) and len(value) >= LARGE
    }
    small = {name: value for name, value in fields.items() if name not in large}
    content = RecordDict({KEY: ConfigRecord(dict(small))})
    if large:
        content[BULK] = ArrayRecord(large)
    return content


def fields_of(message: Message) -> dict[str, object]:
    """What a message of ours carries.

    Raises:
        Rejected: ``format``, if it is none of ours.
    """
    content = message.content
    if not {KEY} <= set(content.config_records) or not set(content) <= {KEY, BULK}:
        raise Rejected("format", "not a message of fedistill")
    fields: dict[str, object] = dict(content.config_records[KEY])
    for name, array in content.array_records.get(BULK, {}).items():
        # What the sender says of shape and type is not looked at, and no reader of arrays is let
        # near its bytes: a header alone could ask for all memory.
        if array.stype != STYPE or not isinstance(array.data, bytes) or name in fields:
            raise Rejected("format", "an array that is none of ours")
        fields[name] = array.data
    return fields


def plan_of(message: Message) -> bytes:
    """The plan in a request.

    Raises:
        Rejected: ``format``, if there is none.
    """
    plan = fields_of(message).get("plan")
    if not isinstance(plan, bytes):
        raise Rejected("format", "the request holds no plan")
    return plan


def text_of(message: Message, name: str) -> str:
    """A text that goes with a message; empty where there is none."""
    found = fields_of(message).get(name, "")
    return found if isinstance(found, str) else ""


def heard(site: str, number: int, message: Message) -> Reply | Failure:
    """What a site's answer says: an upload, unread, or why there is none."""
    if message.has_error():
        return Failure(site, number, "lost" if message.error.code in LOST else "app")
    try:
        fields = fields_of(message)
    except Rejected as refusal:
        return Failure(site, number, refusal.reason)
    upload, reason = fields.get("upload"), fields.get("reason")
    if isinstance(upload, bytes):
        return Reply(site, upload)
    return Failure(site, number, reason[:MOST_REASON] if isinstance(reason, str) else "format")
