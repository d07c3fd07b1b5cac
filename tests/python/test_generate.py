"""topk-generate against transformers' generate, and the command's own behaviour."""

import json

import pytest
import torch
from data_helpers import save_tokenizer
from generate_helpers import generate, generate_json, model_folder, prompt_file, random_prompts
from test_trainer_model_topk import Oracle, oracle_model

from topk_attn.data.cli import main as topk_data

LENGTHS = (1, 5, 33, 12, 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, transformers model, prompts, token file of the prompts) of a tiny Llama."""
    folder = tmp_path_factory.mktemp("model")
    model = model_folder(folder)
    prompts = random_prompts(400, LENGTHS)
    return folder, model, prompts, prompt_file(folder, prompts, folder / "prompts.safetensors")


def reference(model, prompt, count, **options):
    """transformers' greedy continuation of one prompt, its own eos off unless given."""
    options.setdefault("eos_token_id", None)
    options.setdefault("pad_token_id", 0)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            **options,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_dense_greedy_equals_transformers(tmp_path, family):
    model = model_folder(tmp_path, family)
    prompts = random_prompts(400, LENGTHS)
    path = prompt_file(tmp_path, prompts, tmp_path / "p.safetensors")
    report = generate_json("--model", tmp_path, "--prompts", path, "--max-new-tokens", 24, "--ignore-eos")
    assert report["attention"] == "dense"
    for prompt, result in zip(prompts, report["results"], strict=True):
        assert result["prompt_ids"] == prompt
        assert result["ids"] == reference(model, prompt, 24)
        assert result["finish_reason"] == "length"
        assert len(result["token_seconds"]) == 24


@pytest.mark.parametrize(
    "block",
    [
        {"topk": 3},
        {"ratio": 0.2, "min_keys": 2, "sink": 1, "recent": 2, "select": "kv_group"},
        {"ratio": 0.1, "max_keys": 2, "dense_layers": [0]},
    ],
)
def test_sparse_greedy_equals_recomputing_everything(tmp_path, block):
    """Every token against the whole sequence run anew by transformers, masked by a sort, in float64."""
    model_folder(tmp_path)
    model = oracle_model(tmp_path, Oracle(block)).eval()
    prompt = random_prompts(400, [21])[0]
    expected = []
    for _ in range(8):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + expected]), use_cache=False).logits[0, -1]
        expected.append(int(logits.argmax()))
    options = [
        "--model",
        tmp_path,
        "--ids",
        ",".join(map(str, prompt)),
        "--max-new-tokens",
        8,
        "--ignore-eos",
    ]
    for key, value in block.items():
        value = ",".join(map(str, value)) if isinstance(value, list) else value
        options += ["--" + key.replace("_", "-"), value]
    assert generate_json(*options, "--dtype", "float64")["results"][0]["ids"] == expected
    assert generate_json(*options[:6], "--ignore-eos", "--dense")["results"][0]["ids"] != expected


def test_options_of_greedy_decoding_equal_transformers(tiny):
    folder, model, prompts, path = tiny
    got = generate_json("--model", folder, "--prompts", path, "--max-new-tokens", 16, "--ignore-eos",
                        "--repetition-penalty", "1.7")  # fmt: skip
    for prompt, result in zip(prompts, got["results"], strict=True):
        assert result["ids"] == reference(model, prompt, 16, repetition_penalty=1.7)


def test_stop_tokens(tiny):
    folder, model, prompts, path = tiny
    free = reference(model, prompts[2], 20)
    stop = free[7]
    expected = free[: free.index(stop) + 1]
    got = generate_json("--model", folder, "--prompts", path, "--max-new-tokens", 20, "--eos", f"9,{stop}")
    assert got["results"][2]["ids"] == expected
    assert got["results"][2]["finish_reason"] == "stop"
    assert got["eos_token_ids"] == [9, stop]
    assert got["results"][2]["ids"] == reference(model, prompts[2], 20, eos_token_id=[9, stop])
    # Without an option: generation_config.json, then config.json.
    assert generate_json("--model", folder, "--ids", "1", "--max-new-tokens", 1)["eos_token_ids"] == [2]


def test_eos_of_generation_config_wins(tmp_path):
    model_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert generate_json("--model", tmp_path, "--ids", "1", "--max-new-tokens", 1)["eos_token_ids"] == [3, 4]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    assert "generation_config.json: eos_token_id" in generate("--model", tmp_path, "--ids", "1", code=1)


def test_batches_equal_single_runs(tiny):
    folder, _, prompts, path = tiny
    for options in (
        ["--ratio", "0.2", "--min-keys", "2", "--sink", "1", "--recent", "1", "--select", "kv_group"],
        ["--topk", "3", "--temperature", "0.8", "--top-p", "0.9", "--seed", "5"],
    ):
        options = [*options, "--model", folder, "--max-new-tokens", 16]
        whole = generate_json(*options, "--prompts", path)["results"]
        pairs = generate_json(*options, "--prompts", path, "--batch-size", 2)["results"]
        for prompt, one, two in zip(prompts, whole, pairs, strict=True):
            alone = generate_json(*options, "--ids", ",".join(map(str, prompt)))["results"][0]
            assert alone["ids"] == one["ids"] == two["ids"]


def test_page_sizes_and_samples_that_share_a_prompt(tiny):
    folder, _, prompts, path = tiny
    options = ["--model", folder, "--max-new-tokens", 16, "--topk", 3]
    whole = generate_json(*options, "--prompts", path)
    assert whole["cache"]["page_size"] == 64 and whole["cache"]["bytes"] > 0
    for page_size in (1, 5):
        paged = generate_json(*options, "--prompts", path, "--page-size", page_size)
        assert [r["ids"] for r in paged["results"]] == [r["ids"] for r in whole["results"]]
        assert paged["cache"]["bytes"] < whole["cache"]["bytes"]

    ids = ",".join(map(str, prompts[0]))
    options = [*options, "--ids", ids, "--samples", 4, "--temperature", 1.5, "--page-size", 2]
    together = generate_json(*options)
    alone = generate_json(*options, "--batch-size", 1)
    assert [r["ids"] for r in together["results"]] == [r["ids"] for r in alone["results"]]
    assert together["prefill"]["tokens"] == len(prompts[0])
    assert alone["prefill"]["tokens"] == 4 * len(prompts[0])


def test_key_codes_need_a_gpu(tiny):
    message = generate(
        "--model", tiny[0], "--ids", "1", "--topk", 3, "--max-new-tokens", 4, "--key-codes", code=1
    )
    assert "CUDA only" in message


def test_sampling_repeats_by_seed(tiny):
    folder = tiny[0]
    options = [
        "--model",
        folder,
        "--ids",
        "5,6,7",
        "--max-new-tokens",
        20,
        "--temperature",
        1.5,
        "--format",
        "ids",
    ]
    first = generate(*options, "--seed", 1, "--samples", 3)
    assert generate(*options, "--seed", 1, "--samples", 3, threads=2) == first
    lines = first.split()
    assert len(set(lines)) == 3
    assert generate(*options, "--seed", 1).split() == lines[:1]
    assert generate(*options, "--seed", 2).split() != lines[:1]
    assert generate(*options, "--top-k", 1).split() == generate(*options[:6], "--format", "ids").split()


def test_attention_of_the_folder_and_overrides(tmp_path):
    model = model_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    block = {"version": 1, "topk": 2, "dense_layers": [1], "prefill": "dense"}
    config.update(attn_implementation="topk_attn", topk_attention=block)
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = random_prompts(400, [40])[0]
    options = [
        "--model",
        tmp_path,
        "--ids",
        ",".join(map(str, prompt)),
        "--max-new-tokens",
        8,
        "--ignore-eos",
    ]
    own = generate_json(*options)
    assert own["attention"] == block
    assert (
        generate_json(*options, "--topk", 2, "--dense-layers", 1, "--prefill", "dense")["results"][0]["ids"]
        == (own["results"][0]["ids"])
    )
    changed = generate_json(*options, "--ratio", 0.5, "--prefill", "topk", "--max-keys", 4)
    assert changed["attention"] == {"version": 1, "ratio": 0.5, "max_keys": 4, "dense_layers": [1]}
    dense = generate_json(*options, "--dense")
    assert dense["attention"] == "dense"
    assert dense["results"][0]["ids"] == reference(model, prompt, 8) != own["results"][0]["ids"]
    # Everything kept is dense attention.
    assert (
        generate_json(*options, "--ratio", 1, "--prefill", "topk")["results"][0]["ids"]
        == (dense["results"][0]["ids"])
    )


def test_text_streams_as_the_json_has_it(tiny):
    folder = tiny[0]
    options = ["--model", folder, "--ids", "40,50,60", "--max-new-tokens", 64, "--temperature", 2.0]
    for extra in ([], ["--keep-special-tokens"]):
        result = generate_json(*options, *extra)["results"][0]
        assert generate(*options, *extra) == result["text"] + "\n"
    many = generate(*options, "--samples", 2)
    texts = [r["text"] for r in generate_json(*options, "--samples", 2)["results"]]
    assert many == f"[0]\n{texts[0]}\n\n[1]\n{texts[1]}\n"


def test_from_chat_to_text(tiny, tmp_path, capsys):
    folder = tiny[0]
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": "the dog"}]))
    path = tmp_path / "p.safetensors"
    assert topk_data(["tokens", "--model", str(folder), "--chat", str(chat), "--output", str(path)]) == 0
    result = generate_json(
        "--model", folder, "--prompts", path, "--max-new-tokens", 4, "--keep-special-tokens"
    )
    text = result["results"][0]["prompt_text"]
    assert text == "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
    # Another tokenizer is refused, though the ids would fit.
    other = tmp_path / "other"
    save_tokenizer(other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert topk_data(["tokens", "--model", str(other), "--chat", str(chat), "--output", str(path)]) == 0
    assert "made with another tokenizer" in generate("--model", folder, "--prompts", path, code=1)


def test_bfloat16_and_threads(tiny):
    folder, model, prompts, path = tiny
    options = [
        "--model",
        folder,
        "--prompts",
        path,
        "--max-new-tokens",
        4,
        "--dtype",
        "bfloat16",
        "--ignore-eos",
    ]
    got = generate_json(*options, "--threads", 2)
    assert got["dtype"] == "bfloat16"
    assert [r["ids"] for r in got["results"]] == [r["ids"] for r in generate_json(*options)["results"]]
    float64 = generate_json(*options, "--dtype", "float64")
    for prompt, result in zip(prompts, float64["results"], strict=True):
        assert result["ids"] == reference(model, prompt, 4)


def test_errors(tiny, tmp_path):
    folder, _, _, path = tiny
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    ok = ["--model", folder, "--ids", "1,2", "--max-new-tokens", "2"]
    assert "none/config.json" in generate("--model", tmp_path / "none", "--ids", "1", code=1)
    assert f"token id {vocab_size} is not in [0, {vocab_size})" in generate(
        "--model", folder, "--ids", vocab_size, code=1
    )
    assert "nothing.safetensors" in generate(
        "--model", folder, "--prompts", tmp_path / "nothing.safetensors", code=1
    )
    assert "dense_layers has 7" in generate(*ok, "--topk", 2, "--dense-layers", 7, code=1)
    assert "min_keys" in generate(*ok, "--topk", 2, "--min-keys", 9, "--max-keys", 3, code=1)
    assert "eos_token_ids" in generate(*ok, "--eos", vocab_size, code=1)
    assert "--device" in generate(*ok, "--device", "moon", code=2)
    assert "need --topk or --ratio" in generate(*ok, "--sink", 1, code=2)
    assert "give one of them" in generate(*ok, "--prompts", path, code=2)
    assert "unknown option" in generate(*ok, "--frobnicate", code=2)
    assert "--model must name" in generate("--ids", "1", code=2)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-8])
    assert "cut.safetensors" in generate("--model", folder, "--prompts", cut, code=1)


def test_folders_without_text(tmp_path):
    model_folder(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    ok = ["--model", tmp_path, "--ids", "1,2", "--max-new-tokens", "3", "--ignore-eos"]
    tokenizer["decoder"] = {"type": "CTC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert 'decoder type "CTC" is not supported' in generate(*ok, code=1)
    (tmp_path / "tokenizer.json").unlink()
    assert "no tokenizer.json" in generate(*ok, code=1)
    ids = generate(*ok, "--format", "ids")
    result = generate_json(*ok)["results"][0]
    assert ids == ",".join(map(str, result["ids"])) + "\n"
    assert result["text"] is None


def test_contradicting_config_is_an_error(tmp_path):
    model_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["topk_attention"] = {"version": 1, "topk": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ok = ["--model", tmp_path, "--ids", "1,2", "--max-new-tokens", "2", "--ignore-eos"]
    assert "attn_implementation" in generate(*ok, code=1)
    assert generate(*ok, "--dense", "--format", "ids")


def test_help_and_version():
    assert generate("--help").startswith("usage: topk-generate")
    assert generate("--version").startswith("topk-generate ")
