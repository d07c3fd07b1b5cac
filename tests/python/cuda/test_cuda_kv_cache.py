"""KVCache on the card: random operations, long runs of append and decode, graphs, no waiting, key codes."""

import contextlib
import os

import pytest
import torch
from cuda_helpers import BF16, DEVICE, F16, F32, int32, name_of
from kv_cache_helpers import Mirror, assert_canaries, guarded_cache, run_randomly

import topk_attn

LONG = int(os.environ.get("TOPK_KV_CACHE_STEPS", "10000"))


def certified_only(key_codes):
    """With key codes the certified scan is asked for, or the call raises."""
    return topk_attn.cuda.override(scan="certified") if key_codes else contextlib.nullcontext()


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=name_of)
def test_random_operations(page_size, dtype):
    sizes = dict(pages=120 // page_size + 4, page_size=page_size, head_dim=64, v_dim=64)
    cache, storages = guarded_cache(**sizes, dtype=dtype, device=DEVICE)
    mirror = Mirror(cache, seed=page_size)
    done = run_randomly(mirror, steps=120, seed=page_size, verify_every=20)
    assert_canaries(cache, storages)
    assert min(done.get(what, 0) for what in ("fork", "truncate", "reorder", "append", "step")) >= 2, done


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("page_size", [3, 16])
def test_random_operations_with_key_codes(page_size):
    """Codes follow their keys through forks, copies, reorders and rewritten pages: a stale code would let the
    scan drop a key, and the sets would differ."""
    sizes = dict(layers=1, pages=400 // page_size + 4, page_size=page_size, head_dim=64, v_dim=64)
    cache, storages = guarded_cache(**sizes, dtype=BF16, device=DEVICE, key_codes=True)
    mirror = Mirror(cache, heads=4, seed=page_size)
    settings = (dict(topk=5), dict(topk=2), dict(topk=3, sink=1, recent=1))
    with topk_attn.cuda.override(scan="certified"):
        run_randomly(mirror, 200, page_size, verify_every=40, most_rows=4, choices=settings)
    assert_canaries(cache, storages)
    stats = topk_attn.cuda.certified_stats(cache.key_codes(0))
    print(f"certified {stats.certified} of {stats.rows} rows, {mirror.compared} rows compared")
    assert stats.rows > 0 and stats.certified > 0


class Rows:
    """The rows of 64 sequences in contiguous memory, and the lengths on the host."""

    def __init__(self, batch, capacity, kv_heads, dim, dtype):
        self.k = torch.zeros(batch, capacity, kv_heads, dim, dtype=dtype, device=DEVICE)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * batch

    def write(self, batch, k, v):
        at = torch.tensor([self.lengths[b] for b in batch], device=DEVICE)
        rows = torch.tensor(batch, device=DEVICE)
        new = torch.arange(k.shape[1], device=DEVICE)
        self.k[rows[:, None], at[:, None] + new] = k
        self.v[rows[:, None], at[:, None] + new] = v
        for b in batch:
            self.lengths[b] += k.shape[1]

    def packed(self, batch):
        """k, v and the offsets of these sequences one behind the other."""
        lengths = [self.lengths[b] for b in batch]
        k, v = (torch.cat([x[b, :n] for b, n in zip(batch, lengths, strict=True)]) for x in (self.k, self.v))
        return k, v, int32(0, *torch.tensor(lengths).cumsum(0).tolist()), max(lengths)


def check_step(rows, batch, q, results, settings):
    """One decode step of all sequences against the training selection and attention over recomputed rows, and
    against scores that torch computes."""
    out, indices, (threshold, tie_index) = results
    k, v, cu_k, longest = rows.packed(batch)
    count = len(batch)
    cu_q = torch.arange(count + 1, dtype=torch.int32, device=DEVICE)
    offsets = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=1, max_seqlen_k=longest)
    want = topk_attn.topk_select(q[:, 0], k, **offsets, **settings, return_indices=True)
    torch.testing.assert_close(threshold[:, :, 0].T, want[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tie_index[:, :, 0].T, want[1])
    width = want[2].shape[-1]
    assert torch.equal(indices[:, :, 0, :width].transpose(0, 1), want[2]) and (indices[..., width:] < 0).all()
    attended = topk_attn.topk_attn_varlen_func(q[:, 0], k, v, cu_q, cu_k, 1, longest, **settings)
    torch.testing.assert_close(out[:, 0].float(), attended.float(), rtol=2e-2, atol=2e-2)
    # Independent of the library: the number of scores above the threshold, with room for rounding.
    b = batch.index(max(batch, key=lambda s: rows.lengths[s]))
    n = rows.lengths[batch[b]]
    group = q.shape[2] // k.shape[1]
    keys = rows.k[batch[b], :n].float().repeat_interleave(group, 1)
    scores = torch.einsum("hd,jhd->hj", q[b, 0].float(), keys)
    kept = min(n, settings["topk"])
    best = scores.topk(kept, dim=-1).values[:, -1]
    torch.testing.assert_close(threshold[b, :, 0], best, rtol=1e-4, atol=1e-3)
    return count * q.shape[2]


@pytest.mark.parametrize("key_codes", [False, True], ids=["exact", "certified"])
def test_many_steps(key_codes):
    """Append and decode of 64 ragged sequences, thousands of steps, with forks, truncations and reorders on
    the way; every hundredth step is compared with what is recomputed from rows that were kept apart."""
    if key_codes and DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device")
    steps = LONG // 5 if key_codes else LONG
    every, batch_size, heads, kv_heads, dim, page = 100, 64, 8, 2, 64, 32
    longest = 500 + steps + 64
    per_sequence = -(-longest // page)
    cache, storages = guarded_cache(
        layers=1,
        pages=batch_size * per_sequence + 1,
        page_size=page,
        kv_heads=kv_heads,
        head_dim=dim,
        v_dim=dim,
        dtype=BF16,
        device=DEVICE,
        max_length=longest,
        key_codes=key_codes,
    )
    generator = torch.Generator(DEVICE).manual_seed(1)
    host = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=BF16)

    rows = Rows(batch_size, longest + 8, kv_heads, dim, BF16)
    handles = [cache.add() for _ in range(batch_size)]
    batch = list(range(batch_size))
    for b in batch[2:]:  # two begin empty
        n = int(torch.randint(1, 500, (1,), generator=host))
        k, v = normal(1, n, kv_heads, dim), normal(1, n, kv_heads, dim)
        cache.reserve([handles[b]], n)
        cache.append(0, k, v)
        cache.advance(n)
        rows.write([b], k, v)
    settings, compared = dict(topk=64), 0
    # Rows are drawn and kept a hundred steps at a time.
    with certified_only(key_codes):
        for first in range(0, steps, every):
            k, v = normal(every, batch_size, kv_heads, dim), normal(every, batch_size, kv_heads, dim)
            q = normal(every, batch_size, 1, heads, dim)
            for i in range(every):
                cache.reserve(handles, 1)
                asked = dict(return_indices=True, return_encoding=True) if i == every - 1 else {}
                results = cache.append_and_attend(0, q[i], k[i, :, None], v[i, :, None], **settings, **asked)
                cache.advance(1)
            rows.write(batch, k.transpose(0, 1), v.transpose(0, 1))
            compared += check_step(rows, batch, q[-1], results, settings)
            if first // every % 5 == 4:  # sequences change places, start again, and are cut
                order = torch.randint(0, batch_size, (batch_size,), generator=host).tolist()
                order[: batch_size // 2] = batch[: batch_size // 2]
                cache.reorder(handles, order)
                rows.k, rows.v = rows.k[order], rows.v[order]
                rows.lengths = [rows.lengths[b] for b in order]
                cut = rows.lengths[5] // 2
                cache.truncate(handles[5], cut)
                rows.lengths[5] = cut
                cache.remove(handles[7])
                handles[7] = cache.fork(handles[5], cut // 3)
                rows.k[7], rows.v[7] = rows.k[5], rows.v[5]
                rows.lengths[7] = cut // 3
    cache.check()
    assert [cache.length(h) for h in handles] == rows.lengths
    for b, handle in enumerate(handles):
        held = cache.k_pages(0)[cache.pages_of(handle)].flatten(0, 1)[: rows.lengths[b]]
        assert torch.equal(held, rows.k[b, : rows.lengths[b]])
    assert_canaries(cache, storages)
    print(f"{steps} steps of {batch_size} sequences, {compared} rows compared", end="")
    if key_codes:
        stats = topk_attn.cuda.certified_stats(cache.key_codes(0))
        print(f", {stats.certified} of {stats.rows} rows certified", end="")
        assert stats.certified >= 0.99 * stats.rows > 0
    print()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("key_codes", [False, True], ids=["exact", "certified"])
def test_steps_do_not_wait_for_the_device(key_codes):
    sizes = dict(layers=2, pages=64, page_size=16, head_dim=64, v_dim=64, dtype=BF16, device=DEVICE)
    cache, _ = guarded_cache(**sizes, key_codes=key_codes)
    mirror = Mirror(cache)
    handles = [mirror.add() for _ in range(3)]
    mirror.step(handles, 20, attend=False)
    q = mirror.normal(3, 1, 4, 64)
    k, v = mirror.new_rows(handles, 1)
    cache.reserve(handles, 1)
    cache.append_and_attend(0, q, k, v, topk=4)  # first use: kernels are loaded
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(40):
            if number == 20:
                cache.truncate(handles[1], 5)
                cache.reorder(handles, [1, 0, 0])  # pages are copied by the next step
            cache.reserve(handles, 1)
            for layer in range(2):
                cache.append_and_attend(layer, q, k, v, topk=4)
            cache.advance(1)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("key_codes", [False, True], ids=["exact", "certified"])
def test_graph_replay_equals_eager_steps(key_codes):
    steps, layers, heads = 200, 2, 4
    caches = []
    for _ in range(2):
        sizes = dict(layers=layers, pages=120, page_size=16, head_dim=64, v_dim=64, dtype=BF16, device=DEVICE)
        cache, storages = guarded_cache(**sizes, key_codes=key_codes)
        mirror = Mirror(cache, heads=heads, seed=3)
        handles = [mirror.add() for _ in range(4)]
        for handle, n in zip(handles, (1, 5, 40, 100), strict=True):
            mirror.step([handle], n, attend=False)
        caches.append((cache, storages, mirror, handles))
    mirror = caches[0][2]
    q = mirror.normal(steps, layers, 4, 1, heads, 64)
    k, v = (mirror.normal(steps, layers, 4, 1, 2, 64) for _ in range(2))

    def step(cache, q, k, v):
        outs = [
            cache.append_and_attend(i, q[i], k[i], v[i], topk=6, return_indices=True, return_encoding=True)
            for i in range(layers)
        ]
        cache.advance(1)
        return [x for out, indices, encoding in outs for x in (out, indices, *encoding)]

    eager, _, _, handles = caches[0]
    expected = []
    for i in range(steps):
        eager.reserve(handles, 1)
        expected.append([x.clone() for x in step(eager, q[i], k[i], v[i])])

    cache, storages, _, handles = caches[1]
    cache.reserve(handles, steps)
    held = [x[0].clone() for x in (q, k, v)]
    places = cache.lengths.data_ptr(), cache.block_table.data_ptr()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(cache, *held)
    for i in range(steps):
        for into, new in zip(held, (q[i], k[i], v[i]), strict=True):
            into.copy_(new)
        graph.replay()
        if i > 0:  # the capture counted the first step
            cache.advance(1, on_device=False)
        for got, want in zip(results, expected[i], strict=True):
            # The eager cache's table is as wide: the same launches, the same bits.
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert (cache.lengths.data_ptr(), cache.block_table.data_ptr()) == places
    assert cache.lengths.tolist() == [cache.length(h) for h in handles] == eager.lengths.tolist()
    for layer in range(layers):
        for a, b in zip(handles, caches[0][3], strict=True):
            n = cache.length(a)
            for name in ("k_pages", "v_pages"):
                pages, other = getattr(cache, name)(layer), getattr(eager, name)(layer)
                assert torch.equal(
                    pages[cache.pages_of(a)].flatten(0, 1)[:n], other[eager.pages_of(b)].flatten(0, 1)[:n]
                )
    assert_canaries(cache, storages)


@pytest.mark.usefixtures("gpu")
def test_memory_report_with_key_codes():
    cache = topk_attn.KVCache(2, 2, 128, pages=8, page_size=16, dtype=BF16, device=DEVICE, key_codes=True)
    memory = cache.memory()
    rows = 2 * 8 * 16 * 2
    assert memory.k_bytes == memory.v_bytes == rows * 128 * 2
    assert rows * 132 <= memory.code_bytes <= rows * 132 + 2 * (2 * 128 * 8 + 64)
    assert memory.code_bytes == sum(cache.key_codes(layer).numel() for layer in range(2))


@pytest.mark.usefixtures("gpu")
def test_memory_of_another_device_is_refused():
    cache = topk_attn.KVCache(1, 2, 64, pages=4, dtype=BF16, device=DEVICE)
    handle = cache.add()
    cache.reserve([handle], 1)
    row = torch.zeros(1, 1, 2, 64, dtype=BF16)
    with pytest.raises((RuntimeError, ValueError), match="on cuda.* as the cache, got .* on cpu"):
        cache.append(0, row, row)
