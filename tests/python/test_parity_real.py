"""One set of keys on every path, on real activations and where rounding alone decides; C++ equals Python
bit for bit.

The queries and keys are those of SmolLM2-135M-Instruct, after RoPE, on an essay. The first run fetches the
model (93 MB) into downloads/.
"""

import pytest
import torch

from topk_attn.demo import download, parity

TOKENS = 320
LAYERS = [0, 14, 29]
BUDGETS = [
    {"ratio": 0.05},
    {"ratio": 0.01, "min_keys": 8},
    {"topk": 16, "select": "kv_group"},
    {"ratio": 0.1, "sink": 2, "recent": 4},
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def activations():
    text = "\n".join(download.essays().values())
    return parity.capture(download.model(), text, TOKENS, LAYERS)


def check(counts: parity.Counts, rows: int, tolerance: float) -> None:
    print(counts.as_dict())
    assert counts.rows == dict.fromkeys(parity.PATHS, rows)
    assert counts.different == dict.fromkeys(parity.PATHS, 0)
    assert counts.bytes > 0 and counts.bytes_different == 0
    assert counts.packed_difference <= tolerance


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_real_activations(activations, dtype, tolerance, budget):
    total = parity.Counts()
    for layer in LAYERS:
        total.add(parity.count(*(x.to(dtype) for x in activations[layer]), budget))
    heads = activations[LAYERS[0]][0].shape[2]
    check(total, len(LAYERS) * heads * TOKENS, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_permuted_channels(dtype):
    q, k, v = parity.permuted(256, 4, 2, 64, dtype)
    check(parity.count(q, k, v, {"ratio": 0.1}), 4 * 256, 2e-2)


@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_mixed_exponents(select):
    q, k, v = parity.mixed_exponents(256, 6, 2, 128, torch.bfloat16)
    check(parity.count(q, k, v, {"ratio": 0.1, "select": select}), 6 * 256, 2e-2)


def test_permuted_channels_would_show_another_order_of_additions():
    """The test above means something: scores added up in another order give other sets."""
    q, k, _ = parity.permuted(256, 4, 2, 64, torch.float32)
    reference = topk_mask(q, k, 26)
    other = topk_mask(q.flip(-1), k.flip(-1), 26)
    assert int((reference != other).any(-1).sum()) > 100


def topk_mask(q, k, topk):
    import topk_attn

    *_, indices = topk_attn.topk_select(q, k, topk=topk, return_indices=True)
    return torch.zeros(*indices.shape[:-1], k.shape[1] + 1).scatter_(-1, indices.long() + 1, 1)[..., 1:]


@pytest.mark.parametrize("path", parity.PATHS)
def test_a_path_that_keeps_other_keys_is_counted(monkeypatch, path):
    """Each of the comparisons can fail: the sets of one path are made from other queries."""
    functions = {
        "training forward": "forward_sets",
        "training backward": "backward_sets",
        "decode, paged cache": "paged_decode_sets",
        "packed with other documents": "packed_sets",
    }
    name = functions.get(path, "prefill_sets")
    original = getattr(parity, name)
    monkeypatch.setattr(parity, name, lambda q, *rest: original(q.flip(-1), *rest))
    counts = parity.count(*parity.mixed_exponents(64, 2, 1, 32, torch.float32), {"topk": 4}, cpp=False)
    assert counts.different[path] > 0 and not counts.ok


def test_bytes_are_compared():
    made = {"x": torch.tensor([0.0, 1.0])}
    assert parity.compare_bytes(made, {"x": torch.tensor([0.0, 1.0])}) == (8, 0)
    assert parity.compare_bytes(made, {"x": torch.tensor([-0.0, 1.0])}) == (8, 1)
    with pytest.raises(ValueError, match="x: C\\+\\+"):
        parity.compare_bytes(made, {"x": torch.tensor([0.0, 1.0], dtype=torch.float64)})
    with pytest.raises(ValueError, match="different names"):
        parity.compare_bytes(made, {"y": torch.zeros(2)})
