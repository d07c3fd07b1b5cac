"""Token shards: safetensors files that hold documents one behind the other, never padded or packed.

Tensors:  input_ids int32 (N); loss_mask uint8 (N), 1 = this token is a target that carries loss;
          doc_offsets int64 (documents + 1), from 0 to N.
Metadata: format = "topk-data", version = "1", tokenizer_sha256, vocab_size, num_documents, num_tokens, split,
          and for people num_loss_tokens and what the writer adds.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from topk_attn.data.errors import DataError

FORMAT = "topk-data"
VERSION = "1"


@dataclass
class Shard:
    """One file of documents; arrays as described above, metadata as strings."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    doc_offsets: np.ndarray
    metadata: dict[str, str]

    def __len__(self) -> int:
        return len(self.doc_offsets) - 1

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and loss_mask of document `number` (from 0)."""
        if not 0 <= number < len(self):
            raise DataError(f"document must be in [0, {len(self)}), got {number}")
        begin, end = self.doc_offsets[number : number + 2]
        return self.input_ids[begin:end], self.loss_mask[begin:end]


def read_shard(path: str | os.PathLike) -> Shard:
    """Reads and checks one shard; DataError names what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise DataError(
            f"{path}: not a token shard: format and version must be {FORMAT!r} and {VERSION!r}, got "
            f"{metadata.get('format')!r} and {metadata.get('version')!r}"
        )
    for name, dtype in (("input_ids", "int32"), ("loss_mask", "uint8"), ("doc_offsets", "int64")):
        if name not in tensors:
            raise DataError(f"{path}: no tensor {name!r}")
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.ndim != 1:
            raise DataError(
                f"{path}: {name} must be {dtype} with one dimension, got {tensor.dtype} {tensor.shape}"
            )
    shard = Shard(tensors["input_ids"], tensors["loss_mask"], tensors["doc_offsets"], metadata)
    tokens, offsets = len(shard.input_ids), shard.doc_offsets
    if len(shard.loss_mask) != tokens:
        raise DataError(f"{path}: loss_mask has {len(shard.loss_mask)} entries for {tokens} input_ids")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 1).any():
        raise DataError(f"{path}: doc_offsets must rise from 0 to {tokens}")
    if (shard.loss_mask > 1).any():
        raise DataError(f"{path}: loss_mask must hold 0 and 1, got {shard.loss_mask.max()}")
    vocab_size = metadata.get("vocab_size", "")
    if not vocab_size.isdecimal():
        raise DataError(f"{path}: metadata vocab_size must be a number, got {vocab_size!r}")
    return shard


class ShardWriter:
    """Writes documents to NAME-00000.safetensors, NAME-00001.safetensors, ... of one split.

    Files are written beside their final names and renamed by commit(), after all of them are complete: an
    interrupted run leaves no shard behind. Use as a context manager; leaving it by an exception discards.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str,
        *,
        tokenizer_sha256: str,
        vocab_size: int,
        max_tokens: int,
        overwrite: bool = False,
        extra: dict[str, str] | None = None,
    ):
        """max_tokens: a shard is closed before it has more tokens; a longer document gets its own."""
        if not split or os.path.basename(split) != split or split.startswith("."):
            raise DataError(f"the name of a split must be usable as a file name, got {split!r}")
        if max_tokens < 1:
            raise DataError(f"max_tokens must be at least 1, got {max_tokens}")
        self.directory, self.split, self.max_tokens = os.fspath(directory), split, max_tokens
        self.stale = existing_shards(self.directory, split)
        if self.stale and not overwrite:
            raise DataError(
                f"{self.stale[0]}: the split {split!r} exists already; use --overwrite to replace it"
            )
        self._base = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": str(vocab_size),
            "split": split,
            **(extra or {}),
        }
        self._written: list[tuple[str, str]] = []  # (temporary, final)
        self._documents: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending = 0
        self.num_documents = self.num_tokens = self.num_loss_tokens = self.longest = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.discard()

    def add(self, input_ids: np.ndarray, loss_mask: np.ndarray) -> None:
        """Appends one document."""
        if self._documents and self._pending + len(input_ids) > self.max_tokens:
            self._flush()
        self._documents.append((input_ids, loss_mask))
        self._pending += len(input_ids)
        self.num_documents += 1
        self.num_tokens += len(input_ids)
        self.num_loss_tokens += int(loss_mask.sum())
        self.longest = max(self.longest, len(input_ids))

    def complete(self) -> None:
        """Puts everything that was added on disk, still under temporary names."""
        self._flush()

    def commit(self) -> list[str]:
        """Completes the split, names the files and returns them. Removes the shards that it replaces."""
        self.complete()
        final = []
        for temporary, path in self._written:
            os.replace(temporary, path)
            final.append(path)
        self._written = []
        for path in self.stale:
            if path not in final:
                os.remove(path)
        _sync_folder(self.directory)
        return final

    def discard(self) -> None:
        """Removes what has not been committed."""
        for temporary, _ in self._written:
            _remove(temporary)
        self._written, self._documents, self._pending = [], [], 0

    def _flush(self) -> None:
        if not self._documents:
            return
        name = f"{self.split}-{len(self._written):05d}.safetensors"
        temporary = os.path.join(self.directory, f".{name}.{os.getpid()}.part")
        self._written.append((temporary, os.path.join(self.directory, name)))
        write_shard(temporary, self._documents, self._base)
        self._documents, self._pending = [], 0


def write_shard(
    path: str, documents: Sequence[tuple[np.ndarray, np.ndarray]], metadata: dict[str, str]
) -> None:
    """Writes one shard to `path` and syncs it; a failure removes the file."""
    from safetensors.numpy import save_file

    ids = np.concatenate([document for document, _ in documents]).astype(np.int32, copy=False)
    mask = np.concatenate([mask for _, mask in documents]).astype(np.uint8, copy=False)
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document, _ in documents], out=offsets[1:])
    counts = {
        "num_documents": str(len(documents)),
        "num_tokens": str(len(ids)),
        "num_loss_tokens": str(int(mask.sum())),
    }
    try:
        save_file({"input_ids": ids, "loss_mask": mask, "doc_offsets": offsets}, path, {**metadata, **counts})
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        _remove(path)
        if isinstance(error, Exception):
            raise DataError(f"{path}: cannot be written: {error}") from None
        raise


def write_shard_atomic(path: str | os.PathLike, documents, metadata: dict[str, str]) -> None:
    """One shard under a name of the caller's choice: written beside, synced, renamed."""
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{os.getpid()}.part")
    write_shard(temporary, documents, {"format": FORMAT, "version": VERSION, **metadata})
    try:
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    _sync_folder(folder)


def existing_shards(directory: str, split: str) -> list[str]:
    """The shards of a split that are in a folder, in order."""
    if not os.path.isdir(directory):
        return []
    prefix, suffix = f"{split}-", ".safetensors"
    names = [
        name
        for name in os.listdir(directory)
        if name.startswith(prefix) and name.endswith(suffix) and name[len(prefix) : -len(suffix)].isdecimal()
    ]
    return [os.path.join(directory, name) for name in sorted(names)]


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        pass


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
