"""A KVCache beside what it must hold, for the CPU and the CUDA tests."""

from __future__ import annotations

import math
import random

import torch

import topk_attn

CANARY = 77.0
# Of the kept keys' attention in float64, relative to the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def guarded_cache(
    layers=2, pages=24, page_size=4, kv_heads=2, head_dim=16, v_dim=8, dtype=torch.float32, device="cpu", **kw
):
    """(cache, storages): a cache in the middle of larger tensors that are filled with a canary, pages
    included."""
    storages = [
        torch.full((layers, pages + 4, page_size, kv_heads, dim), CANARY, dtype=dtype, device=device)
        for dim in (head_dim, v_dim)
    ]
    k_pages, v_pages = (storage[:, 2:-2] for storage in storages)
    return topk_attn.KVCache(k_pages=k_pages, v_pages=v_pages, **kw), storages


def assert_canaries(cache, storages) -> None:
    """Nothing was written around the pages, nor in pages that never had to be used."""
    for storage in storages:
        assert (storage[:, :2] == CANARY).all() and (storage[:, -2:] == CANARY).all()


def attend_over(q, k, v, indices, scale=None):
    """Attention of q (Tq, H, D) over the listed keys (H, Tq, W) of k and v (n, Hkv, .), in float64."""
    group = q.shape[1] // k.shape[1]
    kept = torch.zeros(*indices.shape[:2], k.shape[0] + 1, dtype=torch.bool, device=q.device)
    kept.scatter_(-1, torch.where(indices < 0, k.shape[0], indices).long(), True)
    kept = kept[..., : k.shape[0]]
    kk, vv = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), kk) * (scale or 1 / math.sqrt(q.shape[-1]))
    weights = scores.masked_fill(~kept, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", weights, vv)


def padded_to(indices, width):
    return torch.nn.functional.pad(indices, (0, width - indices.shape[-1]), value=-1)


class Mirror:
    """Does everything twice: with the cache, and with the rows of every sequence kept apart."""

    def __init__(self, cache, heads=4, seed=0):
        self.cache, self.heads = cache, heads
        self.generator = torch.Generator().manual_seed(seed)
        self.truth: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.compared = 0  # rows

    def normal(self, *shape):
        # Halves: many equal scores.
        made = (torch.randn(*shape, generator=self.generator) * 2).round() / 2
        return made.to(self.cache.device, self.cache.dtype)

    def _nothing(self):
        c = self.cache
        return [
            (self.normal(0, c.kv_heads, c.head_dim), self.normal(0, c.kv_heads, c.v_dim))
            for _ in range(c.layers)
        ]

    def add(self) -> int:
        handle = self.cache.add()
        self.truth[handle] = self._nothing()
        return handle

    def fork(self, handle, length) -> int:
        made = self.cache.fork(handle, length)
        self.truth[made] = [(k[:length], v[:length]) for k, v in self.truth[handle]]
        return made

    def truncate(self, handle, length) -> None:
        self.cache.truncate(handle, length)
        self.truth[handle] = [(k[:length], v[:length]) for k, v in self.truth[handle]]

    def remove(self, handle) -> None:
        self.cache.remove(handle)
        del self.truth[handle]

    def reorder(self, handles, order) -> None:
        self.cache.reorder(handles, order)
        before = [self.truth[h] for h in handles]
        for handle, source in zip(handles, order, strict=True):
            self.truth[handle] = before[source]

    def new_rows(self, handles, rows):
        c = self.cache
        k = self.normal(len(handles), rows, c.kv_heads, c.head_dim)
        v = self.normal(len(handles), rows, c.kv_heads, c.v_dim)
        return k, v

    def _remember(self, handles, layer, k, v) -> None:
        for b, handle in enumerate(handles):
            old_k, old_v = self.truth[handle][layer]
            # A new list: a fork may still have the old one.
            self.truth[handle] = list(self.truth[handle])
            self.truth[handle][layer] = (torch.cat([old_k, k[b]]), torch.cat([old_v, v[b]]))

    def step(self, handles, rows, attend=True, **settings) -> None:
        """Appends `rows` tokens to every sequence, attends with as many queries, and compares sets and
        outputs."""
        c = self.cache
        c.reserve(handles, rows)
        expected = torch.tensor([c.length(h) for h in handles], dtype=torch.int32)
        assert torch.equal(c.lengths.cpu(), expected)
        for layer in range(c.layers):
            k, v = self.new_rows(handles, rows)
            self._remember(handles, layer, k, v)
            if not attend:
                c.append(layer, k, v)
                continue
            q = self.normal(len(handles), rows, self.heads, c.head_dim)
            results = c.append_and_attend(
                layer, q, k, v, **settings, return_indices=True, return_encoding=True
            )
            self.compare(handles, layer, q, results, **settings)
        c.advance(rows)
        assert torch.equal(c.lengths.cpu(), expected + rows)

    def look(self, handles, layer, tq=1, **settings) -> None:
        """Attends to what is there."""
        c = self.cache
        c.reserve(handles, 0)
        q = self.normal(len(handles), tq, self.heads, c.head_dim)
        results = c.attend(layer, q, **settings, return_indices=True, return_encoding=True)
        self.compare(handles, layer, q, results, **settings)

    def compare(self, handles, layer, q, results, **settings) -> None:
        """Sets against those of the training selection over the same rows; outputs against float64."""
        out, indices, (threshold, tie_index) = results
        tolerance = TOLERANCE[q.dtype]
        for b, handle in enumerate(handles):
            k, v = self.truth[handle][layer]
            if k.shape[0] == 0:
                assert not out[b].any()
                continue
            want = topk_attn.topk_select(q[b : b + 1], k[None], **settings, return_indices=True)
            torch.testing.assert_close(threshold[b], want[0][0], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(tie_index[b], want[1][0]), f"tie_index of sequence {handle}"
            assert torch.equal(indices[b], padded_to(want[2][0], indices.shape[-1])), (
                f"set of sequence {handle}"
            )
            exact = attend_over(q[b], k, v, want[2][0])
            error = float((out[b].double() - exact).abs().max())
            assert error <= tolerance * max(1.0, float(exact.abs().max())), (
                f"output of sequence {handle}: {error}"
            )
            self.compared += q.shape[1] * q.shape[2]

    def verify(self) -> None:
        """Every row of every sequence, through its pages."""
        c = self.cache
        c.check()
        assert sorted(self.truth) == c.sequences
        for handle, layers in self.truth.items():
            pages = c.pages_of(handle)
            for layer, (k, v) in enumerate(layers):
                n = k.shape[0]
                assert c.length(handle) == n
                for rows, held in ((k, c.k_pages(layer)), (v, c.v_pages(layer))):
                    assert torch.equal(held[pages].flatten(0, 1)[:n], rows)


SETTINGS = (
    dict(topk=5),
    dict(ratio=0.3),
    dict(topk=3, sink=1, recent=1),
    dict(ratio=0.5, select="kv_group"),
)


def run_randomly(
    mirror: Mirror, steps: int, seed: int, verify_every: int = 10, most_rows: int = 9, choices=SETTINGS
) -> dict[str, int]:
    """Random operations; returns how often each was done."""
    cache, choose = mirror.cache, random.Random(seed)
    done: dict[str, int] = {}
    for number in range(steps):
        handles = list(mirror.truth)
        choose.shuffle(handles)
        what = choose.choice(
            ["add", "fork", "truncate", "remove", "reorder", "append", "look"] + ["step"] * 6
        )
        if not handles:
            what = "add"
        elif len(handles) > 7 and what in ("add", "fork"):
            what = "remove"
        if what == "add":
            mirror.add()
        elif what == "fork":
            mirror.fork(handles[0], choose.randint(0, cache.length(handles[0])))
        elif what == "truncate":
            mirror.truncate(handles[0], choose.randint(0, cache.length(handles[0])))
        elif what == "remove":
            mirror.remove(handles[0])
        elif what == "reorder":
            mirror.reorder(handles, [choose.randrange(len(handles)) for _ in handles])
        elif what == "look":
            mirror.look(handles, choose.randrange(cache.layers), **choose.choice(choices))
        else:
            batch = handles[: choose.randint(1, len(handles))]
            rows = 1 if choose.random() < 0.6 else choose.randint(2, most_rows)
            before = (cache.memory(), [cache.pages_of(h) for h in handles], cache.batch)
            try:
                mirror.step(batch, rows, attend=what == "step", **choose.choice(choices))
            except RuntimeError as error:
                if "are missing" not in str(error) and "max_length" not in str(error):
                    raise
                what = "no room"
                after = (cache.memory(), [cache.pages_of(h) for h in handles], cache.batch)
                assert before == after, "a refused step changed the cache"
        done[what] = done.get(what, 0) + 1
        if number % verify_every == 0:
            mirror.verify()
    mirror.verify()
    return done
