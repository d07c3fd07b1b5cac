"""The validation split, fixed before anything is tokenised or trained.

A record's side depends on the seed and its content only, never on its place or on the order of the files, and
records of equal content are always on the same side.
"""

from collections import Counter
from collections.abc import Sequence

from topk_attn.data.errors import DataError


def validation_digests(digests: Sequence[int], fraction: float | None, documents: int | None) -> set[int]:
    """The digests (64-bit, Record.digest) of the records held out.

    fraction: those in the lowest `fraction` of the digests' range; a record keeps its side when others are
        added.
    documents: the `documents` lowest ones. Groups of equal records count whole; one that would overshoot is
        left out.
    Raises DataError if a side would be empty.
    """
    if fraction is not None and documents is not None:
        raise DataError("give the validation split as a fraction or as a number of documents, not both")
    if fraction is None and documents is None:
        return set()
    held: set[int] = set()
    counts = Counter(digests)
    if fraction is not None:
        if not 0 < fraction < 1:
            raise DataError(f"the validation fraction must be between 0 and 1, got {fraction}")
        held = {digest for digest in counts if digest < fraction * 2.0**64}
    else:
        if documents < 1:
            raise DataError(f"the number of validation documents must be at least 1, got {documents}")
        missing = documents
        for digest in sorted(counts):
            if counts[digest] <= missing:
                held.add(digest)
                missing -= counts[digest]
    held_records = sum(counts[digest] for digest in held)
    if held_records == 0 or held_records == len(digests):
        side = "validation" if held_records == 0 else "training"
        raise DataError(
            f"the {side} split would be empty: {held_records} of {len(digests)} records are held out; set "
            "the number by --val-documents, or give more records"
        )
    return held
