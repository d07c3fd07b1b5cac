"""KVCache on the CPU: random operations against sequences kept apart, sharing, room, errors."""

import pytest
import torch
from kv_cache_helpers import CANARY, Mirror, assert_canaries, guarded_cache, run_randomly

import topk_attn

ERRORS = (RuntimeError, ValueError)


def small(**changes):
    sizes = dict(layers=2, kv_heads=2, head_dim=16, pages=16, page_size=4)
    return topk_attn.KVCache(**{**sizes, **changes})


def filled(cache, tokens, seed=0):
    mirror = Mirror(cache, seed=seed)
    mirror.step([mirror.add()], tokens, topk=3)
    return mirror, cache.sequences[0]


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_random_operations(page_size, dtype):
    cache, storages = guarded_cache(pages=96 // page_size + 4, page_size=page_size, dtype=dtype)
    mirror = Mirror(cache, seed=page_size)
    done = run_randomly(mirror, steps=150, seed=page_size)
    assert_canaries(cache, storages)
    for what in ("fork", "truncate", "remove", "reorder", "append", "look", "step", "no room"):
        assert done.get(what, 0) >= 2, done
    assert mirror.compared > 500


def test_long_decode():
    """Append and decode, a token at a time, with everything compared every 50 steps."""
    cache, storages = guarded_cache(layers=1, pages=160, page_size=16, head_dim=8)
    mirror = Mirror(cache, heads=2)
    handles = [mirror.add() for _ in range(4)]
    for handle, prompt in zip(handles, (0, 1, 37, 200), strict=True):
        if prompt:
            mirror.step([handle], prompt, attend=False)
    for number in range(400):
        if number % 50 == 49:
            mirror.step(handles, 1, ratio=0.1)
            mirror.verify()
            continue
        cache.reserve(handles, 1)
        k, v = mirror.new_rows(handles, 1)
        q = mirror.normal(len(handles), 1, 2, cache.head_dim)
        cache.append_and_attend(0, q, k, v, ratio=0.1)
        mirror._remember(handles, 0, k, v)
        cache.advance(1)
    assert_canaries(cache, storages)


def test_pages_of_others_are_never_written():
    """Free pages and pages of sequences that are not in the batch stay as they are, bit for bit."""
    cache, storages = guarded_cache(pages=12)
    mirror = Mirror(cache)
    first, second = mirror.add(), mirror.add()
    mirror.step([first], 6, topk=2)
    mirror.step([second], 6, topk=2)
    third = mirror.fork(first, 6)
    others = {p for h in (second,) for p in cache.pages_of(h)}
    shared = set(cache.pages_of(first))
    before = [storage.clone() for storage in storages]
    mirror.step([third], 3, topk=2)
    own = set(cache.pages_of(third))
    changed = {
        int(page) - 2
        for storage, old in zip(storages, before, strict=True)
        for page in (storage != old).flatten(2).any(-1).any(0).nonzero()
    }
    assert changed <= own - shared - others and changed
    unused = set(range(12)) - own - shared - others
    assert all((storage[:, [p + 2 for p in unused]] == CANARY).all() for storage in storages)


def test_fork_shares_pages_and_copies_only_the_last():
    mirror, first = filled(small(), 10)
    cache = mirror.cache
    forks = [mirror.fork(first, 10) for _ in range(3)]
    assert cache.memory().used_pages == 3 and cache.memory().shared_pages == 3
    mirror.step([first, *forks], 1, topk=3)
    # Two whole pages are shared by four, the partly filled one became four.
    assert cache.memory().used_pages == 6 and cache.memory().shared_pages == 2
    mirror.verify()


def test_reorder_duplicates_and_drops():
    mirror, first = filled(small(), 7)
    cache = mirror.cache
    handles = [first, mirror.fork(first, 5), mirror.add()]
    mirror.step(handles, 1, topk=2)
    mirror.reorder(handles, [2, 0, 0])
    assert [cache.length(h) for h in handles] == [1, 8, 8]
    mirror.step(handles, 2, topk=2)
    mirror.verify()


def test_out_of_room_changes_nothing():
    mirror, first = filled(small(pages=4), 10)
    cache = mirror.cache
    mirror.fork(first, 10)
    handles, memory, batch = cache.sequences, cache.memory(), cache.batch
    with pytest.raises(RuntimeError, match=r"1 free pages of 4 tokens.*2 pages are missing"):
        cache.reserve(handles, 6)
    assert (cache.memory(), cache.batch) == (memory, batch)
    mirror.verify()
    mirror.step(handles, 1, topk=2)


def test_rows_without_room_are_refused_before_anything_is_written():
    cache, storages = guarded_cache()
    handle = cache.add()
    cache.reserve([handle], 2)
    k, v = torch.zeros(1, 3, 2, 16), torch.zeros(1, 3, 2, 8)
    q = torch.zeros(1, 3, 4, 16)
    for call in (lambda: cache.append(0, k, v), lambda: cache.append_and_attend(0, q, k, v, topk=1)):
        with pytest.raises(ERRORS, match="3 new rows, but the batch has room for 2: call reserve first"):
            call()
    assert all((storage == CANARY).all() for storage in storages)
    # A fork may share the last page from now on: room must be asked for again.
    cache.append(0, k[:, :1], v[:, :1])
    cache.advance(1)
    cache.fork(handle)
    with pytest.raises(ERRORS, match="call reserve first"):
        cache.append(0, k[:, :1], v[:, :1])
    with pytest.raises(ERRORS, match="call reserve first"):
        cache.advance(1)


def test_tensors_of_a_batch_size_stay_where_they_are():
    cache = small()
    handles = [cache.add() for _ in range(3)]
    cache.reserve(handles, 1)
    places = cache.block_table.data_ptr(), cache.lengths.data_ptr()
    cache.advance(1)
    cache.reserve(handles[:1], 5)
    assert cache.lengths.shape == (1,)
    cache.truncate(handles[1], 0)
    cache.reserve(handles, 2)
    assert (cache.block_table.data_ptr(), cache.lengths.data_ptr()) == places
    assert cache.lengths.tolist() == [1, 0, 1]


def test_replayed_steps_are_counted_on_the_host_alone():
    cache = small()
    handle = cache.add()
    cache.reserve([handle], 4)
    cache.lengths.add_(2)  # what a replayed graph does
    cache.advance(2, on_device=False)
    assert cache.length(handle) == 2 and cache.lengths.tolist() == [2] and cache.reserved_rows == 2


def test_rows_are_views_where_pages_lie_in_a_row():
    mirror, first = filled(small(pages=32), 9)
    cache = mirror.cache
    k, v = cache.rows(1, 9)
    assert k.data_ptr() == cache.k_pages(1)[cache.pages_of(first)[0]].data_ptr()
    assert torch.equal(k[0], mirror.truth[first][1][0]) and torch.equal(v[0], mirror.truth[first][1][1])
    second = mirror.add()
    mirror.step([second], 9, topk=1)
    cache.reserve([first, second], 0)
    k, _ = cache.rows(0, 9)
    assert k.untyped_storage().data_ptr() == cache.k_pages(0).untyped_storage().data_ptr()
    for b, handle in enumerate((first, second)):
        assert torch.equal(k[b], mirror.truth[handle][0][0])
    # In the other order, and interleaved, they are copied.
    cache.reserve([second, first], 0)
    k, _ = cache.rows(0, 9)
    assert torch.equal(k[1], mirror.truth[first][0][0])
    mirror.step([first, second], 8, topk=1)
    mirror.step([first, second], 8, topk=1)
    k, v = cache.rows(1, 25)
    for b, handle in enumerate((first, second)):
        assert torch.equal(k[b], mirror.truth[handle][1][0])
        assert torch.equal(v[b], mirror.truth[handle][1][1])


def test_left_padding():
    cache = small(layers=1)
    mirror = Mirror(cache)
    handle = mirror.add()
    cache.reserve([handle], 9)
    k, v = mirror.new_rows([handle], 9)
    k[:, :4], v[:, :4] = torch.nan, torch.nan
    q = mirror.normal(1, 1, 4, 16)
    pad = torch.tensor([4], dtype=torch.int32)
    out = cache.append_and_attend(0, q, k, v, cache_leftpad=pad, topk=3)
    want = topk_attn.topk_attn_func(q, k[:, 4:], v[:, 4:], topk=3)
    torch.testing.assert_close(out, want)


def test_memory_report():
    cache = topk_attn.KVCache(3, 2, 16, 8, pages=10, page_size=4, max_length=20, dtype=torch.bfloat16)
    handle = cache.add()
    cache.reserve([handle], 9)
    cache.advance(9)
    cache.fork(handle, 4)
    memory = cache.memory()
    assert memory.k_bytes == 3 * 10 * 4 * 2 * 16 * 2 and memory.v_bytes == memory.k_bytes // 2
    assert memory.table_bytes == (5 + 1) * 4 and memory.code_bytes == 0
    assert (memory.pages, memory.used_pages, memory.shared_pages, memory.free_pages) == (10, 3, 1, 7)
    assert (memory.sequences, memory.tokens) == (2, 13)
    assert "2 sequences, 3 of 10 pages of 4 tokens" in repr(cache)
    cache.clear()
    assert cache.memory().free_pages == 10 and cache.sequences == []


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(pages=0), "pages must be at least 1, got 0"),
        (dict(page_size=0), "page_size must be at least 1, got 0"),
        (dict(head_dim=12), "head_dim must be a multiple of 8 from 8 to 256, got 12"),
        (dict(v_dim=300), "v_dim must be a multiple of 8 from 8 to 256, got 300"),
        (dict(layers=None), "layers must be at least 1, got None"),
        (dict(max_length=-1), "max_length must be at least 0, got -1"),
        (dict(k_pages=torch.zeros(1, 1, 1, 1, 8)), "give both or neither"),
        (dict(key_codes=True), "CUDA only"),
    ],
)
def test_bad_options(changes, words):
    with pytest.raises(ERRORS, match=words):
        small(**changes)


def test_bad_memory():
    good = torch.zeros(2, 4, 4, 2, 8)
    cases = [
        (good[0], good, "k_pages must be"),
        (good, good[:, :3], "all but the last must be the same"),
        (good, good.double(), "the same dtype and device"),
        (good.transpose(2, 3), good.transpose(2, 3), "must be contiguous"),
    ]
    for k_pages, v_pages, words in cases:
        with pytest.raises(ERRORS, match=words):
            topk_attn.KVCache(k_pages=k_pages, v_pages=v_pages)


def test_bad_calls():
    mirror, first = filled(small(), 5)
    cache = mirror.cache
    q, (k, v) = mirror.normal(1, 1, 4, 16), mirror.new_rows([first], 1)
    cache.reserve([first], 1)
    calls = [
        (lambda: cache.fork(99), "sequence 99 is not in the cache"),
        (lambda: cache.fork(first, 6), "length must be from 0 to the sequence's 5 tokens, got 6"),
        (lambda: cache.truncate(first, -1), "got -1"),
        (lambda: cache.remove(99), "sequence 99"),
        (lambda: cache.reorder([first], [1]), "from 0 to 0, got 1"),
        (lambda: cache.reserve([], 1), "at least one sequence"),
        (lambda: cache.reserve([first, first], 1), "given twice"),
        (lambda: cache.reserve([first], -1), "rows must be"),
        (lambda: cache.reserve([first], 60), "5 tokens of at most 64 .max_length.: 60 more do not fit"),
        (lambda: cache.append_and_attend(2, q, k, v, topk=1), "layer must be from 0 to 1, got 2"),
        (lambda: cache.append_and_attend(0, q, k[:, :, :1], v, topk=1), "k must have sizes"),
        (lambda: cache.append_and_attend(0, q, k, v.double(), topk=1), "v must be Float on cpu"),
        (lambda: cache.append_and_attend(0, q, k, v), "topk"),
        (lambda: cache.append(0, k.requires_grad_(), v), "must not require a gradient"),
        (lambda: cache.rows(0, 65), "length must be from 0 to 64, got 65"),
        (lambda: cache.key_codes(0), "without key codes"),
        (lambda: cache.calibrate(), "without key codes"),
    ]
    for call, words in calls:
        with pytest.raises(ERRORS, match=words):
            call()
    mirror.verify()
    cache.remove(first)
    with pytest.raises(ERRORS, match="no batch: call reserve first"):
        _ = cache.lengths
