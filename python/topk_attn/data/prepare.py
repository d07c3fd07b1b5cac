"""topk-data prepare: records to token shards, in two passes.

The first pass reads and checks every record and fixes the validation split; the second tokenises and writes.
So a bad line at the end of a long file is found before an hour of tokenising, and no shard appears unless all
are right.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from topk_attn.data.encode import EncodeOptions, encode
from topk_attn.data.errors import DataError
from topk_attn.data.records import read_records
from topk_attn.data.shards import ShardWriter
from topk_attn.data.split import validation_digests
from topk_attn.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PrepareOptions:
    """Where documents go and how they are divided; see docs/data.md for each option."""

    output: str
    split: str = "train"
    val_split: str = "validation"
    val_fraction: float | None = None
    val_documents: int | None = None
    seed: int = 0
    max_tokens_per_shard: int = 1 << 25
    format: str = "auto"
    render: str | None = None
    skip_invalid: bool = False
    overwrite: bool = False
    encode: EncodeOptions = field(default_factory=EncodeOptions)


@dataclass
class SplitReport:
    split: str
    records: int = 0
    dropped: int = 0  # records longer than sequence_len, with overflow "drop"
    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    files: list[str] = field(default_factory=list)


@dataclass
class PrepareReport:
    splits: list[SplitReport]
    skipped: list[str]  # why, one entry per record that was skipped


def prepare(
    tokenizer: Tokenizer, inputs: Sequence[str | os.PathLike], options: PrepareOptions
) -> PrepareReport:
    """Writes the shards of all splits into `options.output`; nothing is left there on failure (DataError)."""
    held_out = options.val_fraction is not None or options.val_documents is not None
    if held_out and options.split == options.val_split:
        raise DataError(f"the training and the validation split are both named {options.split!r}")
    skipped: list[str] = []
    digests = [record.digest(options.seed) for record in _records(inputs, options, "reading", None, skipped)]
    if not digests:
        raise DataError(f"no records in {', '.join(map(os.fspath, inputs))}")
    held = validation_digests(digests, options.val_fraction, options.val_documents)

    _make_folder(options.output)
    names = [options.split] + ([options.val_split] if held_out else [])
    reports = [SplitReport(name) for name in names]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_writer(tokenizer, inputs, options, name)) for name in names]
        second = _records(inputs, options, "tokenizing", len(digests), [])
        for digest, record in _same(digests, second, options.seed):
            side = int(digest in held)
            try:
                documents = encode(tokenizer, record, options.encode)
            except DataError as error:
                if not options.skip_invalid:
                    raise
                skipped.append(str(error))
                continue
            reports[side].records += 1
            reports[side].dropped += not documents
            for ids, mask in documents:
                writers[side].add(ids, mask)
        for writer in writers:
            if writer.num_documents == 0:
                raise DataError(f"the {writer.split} split has no documents")
        # All files of all splits are complete on disk before the first gets its name.
        for writer in writers:
            writer.complete()
        for writer, report in zip(writers, reports, strict=True):
            report.files = writer.commit()
            report.documents, report.tokens = writer.num_documents, writer.num_tokens
            report.loss_tokens, report.longest = writer.num_loss_tokens, writer.longest
    return PrepareReport(reports, skipped)


def _records(inputs, options: PrepareOptions, what: str, total: int | None, skipped: list[str]):
    """The usable records, with progress on a terminal; an unusable one is an error or, by choice, skipped."""
    bar = tqdm(total=total, desc=what, unit=" records", disable=not sys.stderr.isatty(), leave=False)
    with bar:
        for record in read_records(inputs, options.format, options.render):
            if isinstance(record, DataError):
                if not options.skip_invalid:
                    raise record
                skipped.append(str(record))
                continue
            bar.update()
            yield record


def _same(digests: list[int], records, seed: int):
    """Pairs the records of the second pass with the digests of the first; the files must not have changed."""
    number = 0
    for record in records:
        if number == len(digests) or record.digest(seed) != digests[number]:
            raise DataError(f"{record.where}: the file changed while it was being read")
        yield digests[number], record
        number += 1
    if number != len(digests):
        raise DataError("the input files changed while they were being read")


def _writer(tokenizer: Tokenizer, inputs, options: PrepareOptions, split: str) -> ShardWriter:
    return ShardWriter(
        options.output,
        split,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        max_tokens=options.max_tokens_per_shard,
        overwrite=options.overwrite,
        extra={
            "seed": str(options.seed),
            "sources": ", ".join(os.path.basename(os.fspath(path)) for path in inputs),
        },
    )


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be made: {error.strerror}") from None
