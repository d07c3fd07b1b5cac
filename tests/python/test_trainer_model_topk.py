"""The native model with top-k attention against a float64 transformers model masked by an oracle.

The oracle sorts every row's raw float64 scores and keeps the first W, in plain torch. In float64 the native
model must agree to rounding. In float32 it may keep another key where two scores are closer than float32 can
tell, so those tests search for weights where the last kept and the first dropped score are far apart.
"""

import math

import pytest
import torch
from trainer_helpers import (
    FAMILIES,
    assert_close,
    documents,
    load_model,
    packed_batch,
    reference,
    run_probe,
    save_model,
    tiny_model,
)
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

LENGTHS = (37, 1, 50, 23)


class Oracle:
    """An attention function for transformers: exact top-k by sorting, with everything in float64."""

    def __init__(self, block):
        self.block = block
        self.smallest_gap = math.inf  # between the last kept and the first dropped score of any row

    def budget(self, n):
        block = self.block
        width = block["topk"] if "topk" in block else math.ceil(block["ratio"] * n - 1e-6)
        width = max(width, block.get("min_keys", 1))
        width = min(width, block.get("max_keys", width))
        return max(1, min(width, n))

    def kept(self, scores, n):
        """Indices kept of n visible keys, by the contract's order; scores (n,)."""
        width = self.budget(n)
        always = list(range(n))[: self.block.get("sink", 0)]
        always += [j for j in reversed(range(n)) if j not in always][: self.block.get("recent", 0)]
        always = always[:width]
        ranked = sorted((j for j in range(n) if j not in always), key=lambda j: (-scores[j].item(), j))
        take = width - len(always)
        if 0 < take < len(ranked):
            gap = scores[ranked[take - 1]] - scores[ranked[take]]
            self.smallest_gap = min(self.smallest_gap, gap.item() / max(1e-9, scores.abs().max().item()))
        return always + ranked[:take]

    def __call__(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None and query.dtype == torch.float64
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3)  # (B, H, Tq, Tk)
        tq, tk = scores.shape[2:]
        visible = torch.ones(tq, tk, dtype=torch.bool).tril(tk - tq)
        dense = module.layer_idx in self.block.get("dense_layers", [])
        dense = dense or (self.block.get("prefill") == "dense" and tq > 1)
        if dense:
            mask = visible.expand_as(scores)
        else:
            order = scores.detach()
            if self.block.get("select") == "kv_group":
                shared = order.unflatten(1, (-1, groups)).amax(2, keepdim=True)
                order = shared.expand(-1, -1, groups, -1, -1).flatten(1, 2)
            mask = torch.zeros_like(scores, dtype=torch.bool)
            for b in range(scores.shape[0]):
                for h in range(scores.shape[1]):
                    for i in range(tq):
                        n = int(visible[i].sum())
                        mask[b, h, i, self.kept(order[b, h, i, :n], n)] = True
        weights = torch.softmax((scores * scaling).masked_fill(~mask, -math.inf), -1)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


def exact_norm(self, hidden_states):
    """RMSNorm without transformers' step through float32."""
    return (
        self.weight
        * hidden_states
        * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
    )


def oracle_model(folder, oracle):
    AttentionInterface.register("topk_oracle", oracle)
    AttentionMaskInterface.register("topk_oracle", lambda *args, **kwargs: None)
    model = load_model(folder, torch.float64, attention="topk_oracle")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = exact_norm.__get__(module)
    return model


BLOCKS = {
    "ratio": {"version": 1, "ratio": 0.2},
    "topk": {"version": 1, "topk": 6},
    "floor_and_ceiling": {"version": 1, "ratio": 0.3, "min_keys": 4, "max_keys": 9},
    "always_kept": {"version": 1, "topk": 7, "sink": 2, "recent": 3},
    "kv_group": {"version": 1, "ratio": 0.15, "min_keys": 3, "select": "kv_group"},
    "dense_layer": {"version": 1, "ratio": 0.1, "dense_layers": [0]},
    "one_key": {"version": 1, "topk": 1},
}


def test_the_oracle_with_every_key_is_dense(tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    batch = packed_batch(LENGTHS, 131)
    everything = reference(oracle_model(folder, Oracle({"ratio": 1.0})), batch)
    dense = run_probe(folder, batch, tmp_path, dtype="float64")
    assert_close(dense, everything, rtol=1e-9)


@pytest.mark.parametrize("block", BLOCKS)
def test_float64_equals_the_oracle(block, tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    batch = packed_batch(LENGTHS, 131)
    got = run_probe(folder, batch, tmp_path, dtype="float64", attention=BLOCKS[block])
    oracle = Oracle(BLOCKS[block])
    want = reference(oracle_model(folder, oracle), batch)
    assert 1e-9 < oracle.smallest_gap
    assert_close(got, want, rtol=1e-9)
    dense = run_probe(folder, batch, tmp_path, dtype="float64")
    assert (dense["logits"] - got["logits"]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_oracle(family, tmp_path):
    """All families in float32, with weights whose selections float32 can tell apart."""
    block = BLOCKS["ratio"]
    for seed in range(20):
        folder = save_model(tiny_model(family, seed=seed), tmp_path / f"model{seed}")
        batch = packed_batch((24, 17), 131)
        oracle = Oracle(block)
        want = reference(oracle_model(folder, oracle), batch)
        if oracle.smallest_gap > 3e-5:
            break
    else:
        pytest.fail("no weights without near ties among 20 seeds")
    assert_close(run_probe(folder, batch, tmp_path, attention=block), want)


@pytest.mark.parametrize("recompute", ["all", "all_but_attention"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_changes_no_bit(dtype, recompute, tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    batch = packed_batch(LENGTHS, 131)
    plain = run_probe(folder, batch, tmp_path, dtype=dtype, attention=BLOCKS["dense_layer"])
    again = run_probe(
        folder, batch, tmp_path, dtype=dtype, attention=BLOCKS["dense_layer"], recompute=recompute
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_packed_equals_alone(tmp_path):
    folder = save_model(tiny_model("qwen3"), tmp_path / "model")
    batch = packed_batch(LENGTHS, 131)
    together = run_probe(folder, batch, tmp_path, dtype="float64", attention=BLOCKS["ratio"])["logits"]
    begin = 0
    for document in documents(batch):
        size = len(document["input_ids"])
        document["cu_seqlens"] = torch.tensor([0, size], dtype=torch.int32)
        alone = run_probe(folder, document, tmp_path, dtype="float64", attention=BLOCKS["ratio"])["logits"]
        torch.testing.assert_close(alone, together[begin : begin + size], rtol=1e-9, atol=1e-9)
        begin += size


@pytest.mark.parametrize("prefill", [1, 13, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_equals_forward(family, prefill, tmp_path):
    folder = save_model(tiny_model(family), tmp_path / "model")
    batch = packed_batch((40,), 131)
    inputs = {**batch, "decode_ids": batch["input_ids"][None]}
    for attention, dtype, tolerance in (("dense", "float32", 2e-5), (BLOCKS["always_kept"], "float64", 1e-9)):
        got = run_probe(folder, inputs, tmp_path, attention=attention, dtype=dtype, prefill=prefill)
        assert got["decode_logits"].shape == (41 - prefill, 1, 131)
        want = got["logits"][prefill - 1 :]
        torch.testing.assert_close(got["decode_logits"][:, 0], want, rtol=tolerance, atol=tolerance)


def test_left_padded_batch_equals_each_alone(tmp_path):
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    ids = torch.randint(0, 131, (3, 30), generator=torch.Generator().manual_seed(3))
    leftpad = torch.tensor([0, 11, 19], dtype=torch.int32)
    options = dict(attention=BLOCKS["always_kept"], dtype="float64")
    together = run_probe(folder, {"decode_ids": ids, "leftpad": leftpad}, tmp_path, prefill=22, **options)
    for row, pad in enumerate(leftpad.tolist()):
        alone = run_probe(
            folder, {"decode_ids": ids[row : row + 1, pad:]}, tmp_path, prefill=22 - pad, **options
        )
        torch.testing.assert_close(
            together["decode_logits"][:, row], alone["decode_logits"][:, 0], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("prefill_mode", ["dense", "topk"])
def test_decoding_equals_the_oracle_with_a_cache(prefill_mode, tmp_path):
    """Dense prefill with sparse decode steps, and sparse throughout, step by step with a DynamicCache."""
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    block = {**BLOCKS["ratio"], "prefill": prefill_mode}
    ids = torch.randint(0, 131, (1, 45), generator=torch.Generator().manual_seed(4))
    got = run_probe(folder, {"decode_ids": ids}, tmp_path, dtype="float64", attention=block, prefill=30)
    model = oracle_model(folder, Oracle(block)).eval()
    cache = DynamicCache()
    pieces = [ids[:, :30], *ids[:, 30:].split(1, dim=1)]
    with torch.no_grad():
        want = torch.stack(
            [model(piece, past_key_values=cache, use_cache=True).logits[:, -1] for piece in pieces]
        )
    torch.testing.assert_close(got["decode_logits"], want, rtol=1e-9, atol=1e-9)


def test_prompt_longer_than_the_cache(tmp_path):
    """The probe's cache holds exactly the prompt; one more token is an error, not a write past the end."""
    folder = save_model(tiny_model("llama"), tmp_path / "model")
    ids = torch.zeros(1, 8, dtype=torch.int64)
    message = run_probe(folder, {"decode_ids": ids}, tmp_path, ok=False, capacity=7, prefill=4)
    assert "the cache holds 7 tokens of at most 7; 1 more do not fit" in message
