"""Our bytes as Flower's messages, and back: one tensor of bytes and a few plain values. No pickle anywhere.

    RecordDict = {"note": ConfigRecord, "body": ArrayRecord of one uint8 Array}

Flower counts what it carries as the sum of its serialized objects; `size` is that count. Cost: one copy of the bytes.
"""

from __future__ import annotations

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

_NOTE, _BODY, _KIND = "note", "body", "spryfl"

Note = dict[str, Any]  # bool, int, float, str, bytes, and lists of one of them


def letter(data: bytes, note: Note) -> RecordDict:
    """The content of a message: our bytes, and plain values beside them."""
    whole = RecordDict({_NOTE: ConfigRecord({key: value for key, value in note.items() if value != ""})})
    if data:
        whole[_BODY] = ArrayRecord({_KIND: Array("uint8", (len(data),), _KIND, data)})
    return whole


def opened(content: RecordDict) -> tuple[bytes, Note]:
    """(our bytes, the plain values) of a message; a ValueError if it is none of ours."""
    note, body = content.get(_NOTE), content.get(_BODY)
    if not isinstance(note, ConfigRecord) or not (body is None or isinstance(body, ArrayRecord)):
        raise ValueError("not a message of spryfl")
    if body is None:
        return b"", dict(note)
    if list(body) != [_KIND]:
        raise ValueError("not a message of spryfl")
    return body[_KIND].data, dict(note)


def size(message: Message) -> int:
    """Bytes of a message as Flower carries it."""
    return sum(len(one.deflate()) for one in get_all_nested_objects(message).values())
