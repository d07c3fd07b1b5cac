"""topk-sft with adapters: checkpoints, exact resume, the weights they belong to; and the attention probes."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_helpers import load_model, tiny_model
from trainer_run_helpers import Workbench, events, losses, run

LORA = {"adapter": "lora", "lora_r": 3, "lora_alpha": 6, "lora_target_modules": ["q_proj", "down_proj"]}
TOPK = {"mode": "topk", "ratio": 0.3, "min_keys": 2}


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


def test_checkpoints_hold_adapters_and_the_export_has_them_merged(bench):
    done = run(bench.recipe(model=LORA, optim={"learning_rate": 1e-2}))
    assert "LoRA of rank 3, alpha 6, on q_proj, down_proj; 1" in done.stdout
    folder = bench.folder / "run"
    saved = load_file(folder / "step-10" / "adapter_model.safetensors")
    assert not (folder / "step-10" / "model.safetensors").exists()
    names = [
        f"model.layers.{layer}.{name}.lora_{letter}.weight"
        for layer in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for letter in "AB"
    ]
    assert sorted(saved) == sorted(names)
    moments = load_file(folder / "step-10" / "optimizer.safetensors")
    assert sorted(moments) == sorted(f"{kind}.{name}" for name in names for kind in ("exp_avg", "exp_avg_sq"))
    base = load_file(bench.model_dir / "model.safetensors")
    final = load_file(folder / "final" / "model.safetensors")
    assert base.keys() == final.keys()
    for name, weight in base.items():
        if (a := name.replace(".weight", ".lora_A.weight")) in saved:
            product = saved[a.replace("lora_A", "lora_B")] @ saved[a]
            assert torch.allclose(final[name], weight + 2 * product, rtol=1e-6, atol=1e-7)
            assert product.abs().max() > 1e-3
        else:
            assert torch.equal(final[name], weight)
    load_model(folder / "final", torch.float32)
    seen = losses(folder)
    assert seen[10] < seen[1]
    start = events(folder, "start")[0]
    trained = sum(tensor.numel() for tensor in saved.values())
    assert start["trained_parameters"] == trained < start["parameters"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", [{}, TOPK], ids=["dense", "topk"])
def test_resume_continues_to_the_bit(bench, dtype, attention):
    sections = {"model": {**LORA, "dtype": dtype}, "attention": attention, "optim": {"learning_rate": 1e-2}}
    run(bench.recipe("straight", **sections, checkpoint={"save_steps": 4}))
    run(bench.recipe("again", **sections), "--resume", bench.folder / "straight" / "step-4")
    straight, again = bench.folder / "straight", bench.folder / "again"
    assert losses(again) == {step: loss for step, loss in losses(straight).items() if step > 4}
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (straight / "step-10" / name).read_bytes() == (again / "step-10" / name).read_bytes()
    final, other = (load_file(folder / "final" / "model.safetensors") for folder in (again, straight))
    assert all(torch.equal(final[key], other[key]) for key in other)


def test_adapters_belong_to_their_weights(bench):
    recipe = bench.recipe(model=LORA, checkpoint={"save_steps": 5})
    run(recipe)
    shutil.rmtree(bench.folder / "run" / "step-10")
    path = bench.model_dir / "model.safetensors"
    original = path.read_bytes()
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, path, {"format": "pt"})
    message = run(recipe, "--resume", "latest", status=1).stderr
    assert "step-5 belongs to another run: frozen weights was '" in message
    path.write_bytes(original)
    message = run(recipe, "model.lora_r=4", "--resume", "latest", status=1).stderr
    assert "model.lora_r was '3' there and is '4' here" in message
    message = run(recipe, "model.adapter=none", "--resume", "latest", status=1).stderr
    assert "model.adapter was 'lora' there and is 'none' here" in message
    run(recipe, "--resume", "latest")


@pytest.mark.parametrize(
    "sections,message",
    [
        ({"model": {"adapter": "lora", "lora_dropout": 0.1}}, "model.lora_dropout must be 0"),
        ({"model": {"adapter": "lora", "lora_target_modules": []}}, "must not be empty"),
        ({"model": {"adapter": "lora", "lora_target_modules": ["q_proj"] * 2}}, "names q_proj twice"),
        ({"model": {"adapter": "lora", "lora_target_modules": ["lm_head"]}}, "lm_head"),
        ({"model": {"adapter": "lora", "lora_r": 0}}, "at least 1"),
        ({"train": {"offload_activations": True}}, "needs a GPU (model.device is cpu)"),
        (
            {"train": {"offload_activations": True}, "model": {"device": "cuda"}},
            "needs train.gradient_checkpointing",
        ),
    ],
)
def test_contradictions(bench, sections, message):
    assert message in run(bench.recipe(**sections), "--dry-run", status=1).stderr


def test_names_of_other_trainers(bench):
    model = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": ["v_proj"]}
    done = run(bench.recipe(model=model), "--dry-run")
    assert "LoRA of rank 4, alpha 32, on v_proj" in done.stdout
    assert "model.lora_r has no effect" in run(bench.recipe(model={"lora_r": 4}), "--dry-run").stdout


@torch.no_grad()
def dense_probe(model, ids, rows, ratio, min_keys):
    """Entropy and kept mass of the sampled rows, a layer: from transformers' own attention weights."""
    model.set_attn_implementation("eager")
    attentions = model(input_ids=torch.tensor(ids)[None].long(), output_attentions=True).attentions
    entropy, mass = [], []
    for weights in attentions:
        p = weights[0].double()  # (H, T, T)
        h, m = [], []
        for row in rows:
            seen = p[:, row, : row + 1]
            h.append(-(seen * seen.clamp_min(1e-300).log()).sum(-1).mean())
            kept = max(min_keys, math.ceil(ratio * (row + 1) - 1e-6))
            m.append(seen.topk(min(kept, row + 1)).values.sum(-1).mean())
        entropy.append(float(torch.stack(h).mean()))
        mass.append(float(torch.stack(m).mean()))
    return entropy, mass


@pytest.mark.parametrize("attention", [{"mode": "dense", "ratio": 0.3, "min_keys": 2}, TOPK])
def test_probes(tmp_path, attention):
    """One document a step: the first probe equals what transformers' attention says of the same rows."""
    ids = np.random.default_rng(0).integers(3, 131, 50).astype(np.int32)
    bench = Workbench(tmp_path, train=[(ids, np.ones(50, np.uint8))], model=tiny_model("qwen3"))
    train = {"max_steps": 4, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    sections = {"attention": attention, "train": train}
    run(bench.recipe(**sections, logging={"probe_steps": 1}))
    probes = events(bench.folder / "run", "probe")
    assert [probe["step"] for probe in probes] == [1, 2, 3, 4]
    rows = [(2 * r + 1) * 50 // 32 for r in range(16)]
    entropy, mass = dense_probe(load_model(bench.model_dir, torch.float32), ids, rows, 0.3, 2)
    first = probes[0]
    assert first["rows"] == 16
    assert first["entropy"][0] == pytest.approx(entropy[0], rel=1e-4)
    assert first["kept_mass"][0] == pytest.approx(mass[0], rel=1e-4)
    if attention["mode"] == "dense":  # deeper layers see the same input
        assert first["entropy"] == pytest.approx(entropy, rel=1e-4)
        assert first["kept_mass"] == pytest.approx(mass, rel=1e-4)
    assert any((bench.folder / "run" / "tensorboard").iterdir())
    # Training is the same with and without.
    run(bench.recipe("plain", **sections))
    assert losses(bench.folder / "plain") == losses(bench.folder / "run")
    run(bench.recipe("seldom", **sections, logging={"probe_steps": 3}))
    assert [probe["step"] for probe in events(bench.folder / "seldom", "probe")] == [3]


@torch.no_grad()
@pytest.mark.parametrize("select", ["head", "kv_group"])
def test_probe_of_forced_keys_and_groups(tmp_path, select):
    """Sinks and recent keys count inside the budget; with kv_group the heads of a group share a set."""
    ids = np.random.default_rng(1).integers(3, 131, 40).astype(np.int32)
    model = tiny_model("llama")
    bench = Workbench(tmp_path, train=[(ids, np.ones(40, np.uint8))], model=model)
    attention = {"mode": "dense", "topk": 6, "sink": 2, "recent": 3, "select": select}
    train = {"max_steps": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    run(bench.recipe(attention=attention, train=train, logging={"probe_steps": 1}))
    (probe,) = events(bench.folder / "run", "probe")
    loaded = load_model(bench.model_dir, torch.float32)
    loaded.set_attn_implementation("eager")
    weights = loaded(input_ids=torch.tensor(ids)[None].long(), output_attentions=True).attentions
    for layer, p in enumerate(weights):
        p = p[0].double()
        masses = []
        for row in [(2 * r + 1) * 40 // 32 for r in range(16)]:
            n = row + 1
            kept = min(6, n)
            sinks = min(2, kept)
            recents = min(3, kept - sinks)
            forced = {*range(sinks), *range(n - recents, n)}
            for head in range(4):
                group = [head] if select == "head" else [head // 2 * 2, head // 2 * 2 + 1]
                # Raw scores order the keys: log p plus the row's logsumexp.
                raw = raw_scores(loaded, ids, layer, row)[group].max(0).values
                rest = sorted((j for j in range(n) if j not in forced), key=lambda j: -float(raw[j]))
                chosen = [*forced, *rest[: kept - len(forced)]]
                masses.append(float(p[head, row, chosen].sum()))
        assert probe["kept_mass"][layer] == pytest.approx(np.mean(masses), rel=1e-4), layer


_SCORES = {}


def raw_scores(model, ids, layer, row):
    """(H, row + 1): q . k of one row, after the rotary embedding."""
    if id(model) not in _SCORES:
        seen = []
        module_of = type(model.model.layers[0].self_attn)
        source = __import__(module_of.__module__, fromlist=["apply_rotary_pos_emb"])
        original = source.apply_rotary_pos_emb

        def recording(q, k, *args, **kwargs):
            out = original(q, k, *args, **kwargs)
            seen.append(out)
            return out

        source.apply_rotary_pos_emb = recording
        try:
            model(input_ids=torch.tensor(ids)[None].long())
        finally:
            source.apply_rotary_pos_emb = original
        _SCORES[id(model)] = seen
    q, k = _SCORES[id(model)][layer]
    k = k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)
    return torch.einsum("hd,hnd->hn", q[0, :, row].double(), k[:, : row + 1].double())


def test_dry_run_shows_the_parts_of_memory(bench):
    text = run(bench.recipe(model=LORA), "--dry-run").stdout
    (line,) = [line for line in text.splitlines() if "memory" in line]
    for part in ("weights", "gradients", "moments", "activations", "kept", "at work", "output head"):
        assert part in line
