"""Reading training examples: JSON lines, a JSON array or plain text, checked record by record.

Formats (``format=``):
    messages           {"messages": [{"role": "user", "content": "..."}, ...]}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}; also "system" and "history"
    prompt_completion  {"prompt": "...", "completion": "..."}
    text               {"text": "..."}, or a .txt file that is one document
    tokens             {"input_ids": [...]} with at most one of "labels", "loss_mask", ...
    auto               decided for each record by its keys

Files ending in .gz are unpacked on the fly. A record that cannot be used raises DataError with file and line.
"""

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from topk_attn.data.errors import DataError

FORMATS = ("auto", "messages", "alpaca", "prompt_completion", "text", "tokens")
ROLES = ("system", "developer", "user", "assistant", "tool")

IGNORE_INDEX = -100  # labels: this position carries no loss
MASK_KEYS = ("labels", "loss_mask", "mask", "assistant_masks", "completion_mask")


@dataclass(frozen=True)
class Record:
    """One training example.

    kind: "messages" (payload: list of {"role", "content", ...}), "pair" (payload: [prompt, completion]),
    "text" (payload: str) or "tokens" (payload: [ids, mask], lists of equal length).
    where: "file:line", for messages to the user.
    """

    where: str
    kind: str
    payload: Any

    def digest(self, seed: int) -> int:
        """64-bit hash of the content (never of its place), keyed by `seed`."""
        canonical = json.dumps(
            [self.kind, self.payload], sort_keys=True, ensure_ascii=True, separators=(",", ":")
        )
        keyed = f"{seed}\n{canonical}".encode()
        return int.from_bytes(hashlib.sha256(keyed).digest()[:8], "big")


def read_records(
    paths: Sequence[str | os.PathLike], format: str = "auto", render: str | None = None
) -> Iterator[Record | DataError]:
    """Yields the records of the files, in order; a record that cannot be used is yielded as its DataError.

    render: "chat" turns alpaca and prompt_completion records into conversations, "plain" into a prompt and a
        completion that follow each other as text. None: chat for alpaca, plain for prompt_completion.
    Raises DataError for what concerns a whole file (missing, no JSON array, not UTF-8 compressed data).
    """
    if format not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if render not in (None, "chat", "plain"):
        raise DataError(f"render must be 'chat' or 'plain', got {render!r}")
    for path in paths:
        for where, item in _items(os.fspath(path), format):
            if isinstance(item, DataError):
                yield item
                continue
            try:
                yield _parse(item, where, format, render)
            except DataError as error:
                yield error


def parse_messages(value: Any, where: str) -> list[dict]:
    """Checks a conversation: a non-empty list of {"role", "content"} with known roles and string contents."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages must be a non-empty list, got {_show(value)}")
    for number, message in enumerate(value, 1):
        at = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{at} must be an object with role and content, got {_show(message)}")
        if "role" not in message:
            raise DataError(f"{at} has no role; it must be one of {', '.join(ROLES)}")
        role = message["role"]
        if role not in ROLES:
            raise DataError(f"{at}: role must be one of {', '.join(ROLES)}, got {_show(role)}")
        if message.get("tool_calls"):
            raise DataError(f"{at}: tool_calls are not supported; write the call into content")
        if "content" not in message:
            raise DataError(f"{at} ({role}) has no content")
        _string(message["content"], f"{at} ({role}): content")
        if role in ("user", "assistant") and not message["content"].strip():
            raise DataError(f"{at} ({role}): content is empty")
    return value


def parse_json(text: str, where: str) -> Any:
    """JSON with a DataError that says where; a duplicate key is an error, as it hides data."""

    def unique(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{where}: duplicate key {twice!r}")
        return dict(pairs)

    def constant(name):
        raise DataError(f"{where}: {name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise DataError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not valid JSON: {error}") from None


def read_text_file(path: str | os.PathLike) -> str:
    """A whole UTF-8 file (unpacked if .gz) without its byte order mark."""
    path = os.fspath(path)
    with _reading(path) as file:
        return _decode(file.read(), path)


# ----------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------


def _items(path: str, format: str) -> Iterator[tuple[str, Any]]:
    """(where, parsed JSON or DataError) of every record in a file."""
    stem = path[:-3] if path.endswith(".gz") else path
    if stem.endswith((".txt", ".md")):
        if format not in ("auto", "text"):
            raise DataError(f"{path}: a plain text file needs format text, got {format}")
        yield path, {"text": read_text_file(path)}
        return
    with _reading(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        array = parse_json(read_text_file(path), path)
        for number, item in enumerate(array, 1):
            yield f"{path}: record {number}", item
        return
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = _decode(line, where)
                if text.strip():
                    yield where, parse_json(text, where)
            except DataError as error:
                yield where, error


@contextlib.contextmanager
def _reading(path: str) -> Iterator[BinaryIO]:
    """An open file, unpacked if .gz; whatever goes wrong with it is a DataError that names it."""
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None


# ----------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------


def _parse(item: Any, where: str, format: str, render: str | None) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"{where}: a record must be a JSON object, got {_show(item)}")
    if format == "auto":
        format = _detect(item, where)
    if format == "messages":
        if item.get("tools"):
            raise DataError(f"{where}: tools are not supported; write them into the system message")
        return Record(where, "messages", parse_messages(_field(item, "messages", where), where))
    if format == "alpaca":
        return _alpaca(item, where, render or "chat")
    if format == "prompt_completion":
        prompt = _string(_field(item, "prompt", where), f"{where}: prompt")
        completion = _string(_field(item, "completion", where), f"{where}: completion")
        return _pair(prompt, completion, where, render or "plain")
    if format == "text":
        text = _string(_field(item, "text", where), f"{where}: text")
        if not text:
            raise DataError(f"{where}: text is empty")
        return Record(where, "text", text)
    return _tokens(item, where)


def _detect(item: dict, where: str) -> str:
    keys = set(item)
    found = [
        name
        for name, needed in (
            ("messages", {"messages"}),
            ("alpaca", {"instruction", "output"}),
            ("prompt_completion", {"prompt", "completion"}),
            ("text", {"text"}),
            ("tokens", {"input_ids"}),
        )
        if needed <= keys
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{where}: the keys fit the formats {' and '.join(found)}; choose one by --format")
    listed = ", ".join(sorted(keys)) or "none"
    raise DataError(
        f"{where}: cannot tell the format from the keys ({listed}); needed: messages, or instruction and "
        "output, or prompt and completion, or text, or input_ids"
    )


def _alpaca(item: dict, where: str, render: str) -> Record:
    instruction = _string(_field(item, "instruction", where), f"{where}: instruction")
    extra = _string(_default(item, "input", ""), f"{where}: input")
    output = _string(_field(item, "output", where), f"{where}: output")
    system = _string(_default(item, "system", ""), f"{where}: system")
    history = _default(item, "history", [])
    if not isinstance(history, list):
        raise DataError(f"{where}: history must be a list of [question, answer], got {_show(history)}")
    question = instruction + "\n\n" + extra if instruction and extra else instruction + extra
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(history, 1):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(side, str) for side in turn)):
            raise DataError(f"{where}: history {number} must be [question, answer], got {_show(turn)}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    if render == "plain":
        if messages:
            raise DataError(f"{where}: alpaca records with system or history need --render chat")
        return _pair(question + "\n\n", output, where, render)
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Record(where, "messages", parse_messages(messages, where))


def _pair(prompt: str, completion: str, where: str, render: str) -> Record:
    if not completion.strip():
        raise DataError(f"{where}: the completion is empty")
    if render == "plain":
        return Record(where, "pair", [prompt, completion])
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Record(where, "messages", parse_messages(messages, where))


def _tokens(item: dict, where: str) -> Record:
    ids = _integers(_field(item, "input_ids", where), f"{where}: input_ids")
    if len(ids) < 2:
        raise DataError(f"{where}: input_ids must hold at least 2 tokens, got {len(ids)}")
    given = [key for key in MASK_KEYS if key in item]
    if len(given) > 1:
        raise DataError(f"{where}: {' and '.join(given)} both say where the loss is; give one")
    if "attention_mask" in item and any(
        bit != 1 for bit in _integers(item["attention_mask"], f"{where}: attention_mask")
    ):
        raise DataError(f"{where}: attention_mask has zeros; remove the padding, shards are never padded")
    if not given:
        return Record(where, "tokens", [ids, [1] * len(ids)])
    key = given[0]
    values = _integers(item[key], f"{where}: {key}")
    if len(values) != len(ids):
        raise DataError(f"{where}: {key} has {len(values)} entries for {len(ids)} input_ids")
    if key != "labels":
        wrong = next((value for value in values if value not in (0, 1)), None)
        if wrong is not None:
            raise DataError(f"{where}: {key} must hold 0 and 1, got {wrong}")
        return Record(where, "tokens", [ids, values])
    for place, (token, label) in enumerate(zip(ids, values, strict=True)):
        if label not in (token, IGNORE_INDEX):
            raise DataError(
                f"{where}: labels[{place}] must be input_ids[{place}] ({token}) or {IGNORE_INDEX}, got "
                f"{label}; labels are not shifted"
            )
    return Record(where, "tokens", [ids, [int(label != IGNORE_INDEX) for label in values]])


def _field(item: dict, key: str, where: str) -> Any:
    if key not in item:
        raise DataError(f"{where}: no {key!r} in the record (keys: {', '.join(sorted(item)) or 'none'})")
    return item[key]


def _default(item: dict, key: str, default: Any) -> Any:
    """An optional field; null counts as absent."""
    return default if item.get(key) is None else item[key]


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds half of a surrogate pair, which is not text") from None
    return value


def _integers(value: Any, what: str) -> list[int]:
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list of integers, got {_show(value)}")
    for place, entry in enumerate(value):
        if type(entry) is not int:
            raise DataError(f"{what}[{place}] must be an integer, got {_show(entry)}")
    return value


def _show(value: Any) -> str:
    """A short JSON picture of a value for messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
