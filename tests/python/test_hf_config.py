"""config.topk_attention: validation, saving and loading, the check, and registration in any import order."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from hf_helpers import tiny_config, tiny_model, tokens
from transformers import AttentionInterface, AutoModelForCausalLM

from topk_attn import hf
from topk_attn.hf.settings import Settings

IDS = tokens(1, 20)


@pytest.mark.parametrize(
    "block,word",
    [
        ({"ratio": 0.1}, "version"),
        ({"version": 2, "ratio": 0.1}, "version"),
        ({"version": "1", "ratio": 0.1}, "version"),
        ({"version": 1}, "exactly one"),
        ({"version": 1, "topk": 4, "ratio": 0.1}, "exactly one"),
        ({"version": 1, "topk": 0}, "topk"),
        ({"version": 1, "topk": 4.0}, "topk"),
        ({"version": 1, "topk": True}, "topk"),
        ({"version": 1, "ratio": 0}, "ratio"),
        ({"version": 1, "ratio": 1.5}, "ratio"),
        ({"version": 1, "ratio": "0.1"}, "ratio"),
        ({"version": 1, "ratio": float("nan")}, "ratio"),
        ({"version": 1, "ratio": True}, "ratio"),
        ({"version": 1, "ratio": 0.1, "min_keys": 0}, "min_keys"),
        ({"version": 1, "ratio": 0.1, "max_keys": 0}, "max_keys"),
        ({"version": 1, "ratio": 0.1, "min_keys": 5, "max_keys": 4}, "min_keys"),
        ({"version": 1, "ratio": 0.1, "select": "group"}, "select"),
        ({"version": 1, "ratio": 0.1, "sink": -1}, "sink"),
        ({"version": 1, "ratio": 0.1, "recent": 1.5}, "recent"),
        ({"version": 1, "ratio": 0.1, "deterministic": 1}, "deterministic"),
        ({"version": 1, "ratio": 0.1, "dense_layers": 1}, "dense_layers"),
        ({"version": 1, "ratio": 0.1, "dense_layers": [-1]}, "dense_layers"),
        ({"version": 1, "ratio": 0.1, "dense_layers": [0, 0]}, "dense_layers"),
        ({"version": 1, "ratio": 0.1, "dense_layers": [3]}, "dense_layers"),
        ({"version": 1, "ratio": 0.1, "prefill": "sparse"}, "prefill"),
        ({"version": 1, "ratio": 0.1, "min_key": 4}, "'min_keys'"),
        ({"version": 1, "top_k": 4}, "'topk'"),
        ([1, 2], "dict"),
        ("ratio", "dict"),
    ],
)
def test_bad_block_names_the_key(block, word):
    model = tiny_model()
    model.config.topk_attention = block
    model.set_attn_implementation("topk_attn")
    for call in (lambda: model(IDS), lambda: hf.check(model)):
        with pytest.raises(ValueError, match=word):
            call()


def test_missing_block_says_what_to_do():
    model = tiny_model()
    model.set_attn_implementation("topk_attn")
    with pytest.raises(ValueError, match="topk_attn.hf.configure"):
        model(IDS)


def test_settings_round_trip():
    for arguments in (
        dict(ratio=0.01),
        dict(topk=7, min_keys=2, max_keys=9, select="kv_group", sink=1, recent=2, dense_layers=[0, 2]),
        dict(ratio=1, prefill="dense", deterministic=True),
    ):
        settings = Settings.parse({"version": 1, **arguments})
        assert Settings.parse(settings.to_block()) == settings
        assert json.loads(json.dumps(settings.to_block())) == settings.to_block()
    assert Settings.parse({"version": 1, "ratio": 0.5}).to_block() == {"version": 1, "ratio": 0.5}


def test_configure_refuses_and_leaves_the_model_alone():
    model = tiny_model()
    before = model.config._attn_implementation
    for bad in (
        dict(),
        dict(topk=1, ratio=0.5),
        dict(ratio=0.5, dense_layers=[7]),
        dict(ratio=0.5, window=3),
    ):
        with pytest.raises(ValueError):
            hf.configure(model, **bad)
        assert model.config._attn_implementation == before
        assert getattr(model.config, "topk_attention", None) is None
    with pytest.raises(TypeError, match="transformers model"):
        hf.configure(torch.nn.Linear(2, 2), ratio=0.5)


def test_configure_keeps_the_old_settings_when_the_new_ones_are_bad():
    model = hf.configure(tiny_model(), topk=4)
    with pytest.raises(ValueError):
        hf.configure(model, ratio=0.5, dense_layers=[7])
    assert hf.check(model).topk == 4


def test_unconfigure_restores_dense():
    model = tiny_model()
    with torch.no_grad():
        dense = model(IDS).logits
        hf.configure(model, topk=1)
        assert not torch.allclose(model(IDS).logits, dense)
        hf.unconfigure(model)
        torch.testing.assert_close(model(IDS).logits, dense)
    assert "topk_attention" not in model.config.to_dict()
    assert "attn_implementation" not in model.config.to_dict()


# ------------------------------------------------------------------------------------------------------------
# Saving and loading
# ------------------------------------------------------------------------------------------------------------


def config_file(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_save_and_load_keep_the_sparsity(kind, tmp_path):
    model = hf.configure(tiny_model(kind), ratio=0.1, min_keys=2, dense_layers=[1])
    hf.save_pretrained(model, tmp_path)
    content = config_file(tmp_path)
    assert content["attn_implementation"] == "topk_attn"
    assert content["topk_attention"] == {"version": 1, "ratio": 0.1, "min_keys": 2, "dense_layers": [1]}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf.check(loaded) == hf.check(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_transformers_own_save_keeps_both_keys_of_a_configured_model(tmp_path):
    model = hf.configure(tiny_model(), topk=4)
    model.save_pretrained(tmp_path)
    assert config_file(tmp_path)["attn_implementation"] == "topk_attn"


def test_transformers_own_save_keeps_both_keys_of_a_model_that_ran(tmp_path):
    hf.save_pretrained(hf.configure(tiny_model(), topk=4), tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        loaded(IDS)
    loaded.save_pretrained(tmp_path / "b")
    assert hf.check(AutoModelForCausalLM.from_pretrained(tmp_path / "b")).topk == 4


def test_saving_a_loaded_model_again(tmp_path):
    hf.save_pretrained(hf.configure(tiny_model(), topk=4), tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    hf.save_pretrained(loaded, tmp_path / "b")
    assert hf.check(AutoModelForCausalLM.from_pretrained(tmp_path / "b")).topk == 4


def test_save_refuses_a_dense_model(tmp_path):
    with pytest.raises(RuntimeError, match="configure"):
        hf.save_pretrained(tiny_model(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_check_fails_when_the_model_would_run_dense(tmp_path):
    hf.save_pretrained(hf.configure(tiny_model(), topk=4), tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(RuntimeError, match="sdpa"):
        hf.check(dense)
    content = config_file(tmp_path)
    del content["attn_implementation"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="dense"):
        hf.check(AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(RuntimeError, match="configure"):
        hf.check(tiny_model())


def test_loading_with_the_implementation_by_name(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="topk_attn")
    with pytest.raises(ValueError, match="config.topk_attention"):
        model(IDS)
    model.config.topk_attention = {"version": 1, "topk": 4}
    hf.check(model)
    with torch.no_grad():
        expected = hf.configure(tiny_model(), topk=4)(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        row = tokens(12, seed=index)
        return {"input_ids": row, "labels": row}


def trainer(model, folder, callbacks):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=callbacks)


def test_trainer_callback_keeps_the_keys(tmp_path):
    hf.save_pretrained(hf.configure(tiny_model(), topk=4), tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    run = trainer(model, tmp_path / "run", [hf.SaveTopkAttention()])
    run.train()
    run.save_model(tmp_path / "final")
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        assert config_file(folder)["attn_implementation"] == "topk_attn", folder
        assert hf.check(AutoModelForCausalLM.from_pretrained(folder)).topk == 4


def test_trainer_callback_refuses_a_dense_run(tmp_path):
    model = tiny_model()
    model.config.topk_attention = {"version": 1, "topk": 4}
    with pytest.raises(RuntimeError, match="dense"):
        trainer(model, tmp_path, [hf.SaveTopkAttention()]).train()


def test_lm_eval_refuses_a_dense_model():
    from topk_attn.lm_eval import check_every_model

    class HarnessModel:
        def __init__(self, model):
            self.model = model

    class Derived(HarnessModel):
        pass

    check_every_model(HarnessModel)
    for wrapper in (HarnessModel, Derived):
        assert wrapper(hf.configure(tiny_model(), topk=4)).model is not None
        with pytest.raises(RuntimeError, match="configure"):
            wrapper(tiny_model())


# ------------------------------------------------------------------------------------------------------------
# What cannot be honoured
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,changes",
    [
        ("Mistral", dict(sliding_window=4096)),
        ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
        ("Qwen3", dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)),
    ],
)
def test_sliding_window_raises(kind, changes):
    model = tiny_model(kind, **changes)
    with pytest.raises(ValueError, match="window|sliding"):
        hf.configure(model, topk=4)
    # Also when somebody sets the two keys by hand.
    model.config.topk_attention = {"version": 1, "topk": 4}
    model.set_attn_implementation("topk_attn")
    for call in (lambda: model(IDS), lambda: model.generate(IDS, max_new_tokens=2), lambda: hf.check(model)):
        with pytest.raises(ValueError, match="window|sliding"):
            call()


def test_inactive_sliding_window_is_fine():
    model = hf.configure(tiny_model("Qwen2", use_sliding_window=False, sliding_window=8), ratio=1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny_model("Qwen2")(IDS).logits, rtol=1e-4, atol=1e-4)


def test_dropout_raises_in_training_only():
    model = hf.configure(tiny_model(attention_dropout=0.1), topk=4)
    model(IDS)
    with pytest.raises(ValueError, match="dropout"):
        model.train()(IDS)


@pytest.mark.parametrize(
    "extra",
    [
        dict(softcap=30.0),
        dict(s_aux=torch.zeros(4)),
        dict(position_bias=torch.zeros(1)),
        dict(output_attentions=True),
    ],
)
def test_unsupported_arguments_raise(extra):
    model = hf.configure(tiny_model(), topk=4)
    with pytest.raises(ValueError, match=next(iter(extra))):
        model(IDS, **extra)


def test_models_with_softcap_raise():
    config = transformers.Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention", "full_attention"],
    )
    with pytest.raises(ValueError, match="softcap"):
        hf.configure(transformers.Gemma2ForCausalLM(config).eval(), topk=4)


# ------------------------------------------------------------------------------------------------------------
# Registration
# ------------------------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


CHECK = """
from transformers.modeling_utils import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
for name in ("topk_attn", "paged|topk_attn"):
    assert name in AttentionInterface._global_mapping, name
    assert name in AttentionMaskInterface._global_mapping, name
print("registered")
"""


@pytest.mark.parametrize(
    "order",
    [
        "import topk_attn\nimport transformers",
        "import transformers\nimport topk_attn",
        "import topk_attn\nfrom transformers import LlamaForCausalLM",
        "import topk_attn, importlib\nimport transformers.masking_utils\nimportlib.reload(topk_attn.hf)",
    ],
)
def test_registered_in_any_import_order(order):
    assert run_python(order + "\n" + CHECK) == "registered"


def test_import_does_not_import_transformers():
    assert run_python("import sys, topk_attn\nprint('transformers' in sys.modules)") == "False"


def test_import_works_without_transformers():
    code = """
    import sys
    sys.modules["transformers"] = None
    import topk_attn, torch
    q = torch.randn(1, 4, 2, 8)
    print(topk_attn.topk_attn_func(q, q, q, topk=2).shape[1])
    """
    assert run_python(code) == "4"


def test_old_releases_are_not_registered_with(monkeypatch):
    package = sys.modules["transformers"]
    monkeypatch.setattr(package, "__version__", "5.3.2")
    monkeypatch.delitem(AttentionInterface._global_mapping, "topk_attn")
    with pytest.warns(UserWarning, match="5.3.2.*>= 5.4"):
        hf.register()
    assert "topk_attn" not in AttentionInterface._global_mapping
    monkeypatch.setattr(package, "__version__", "6.0.0.dev0")
    hf.register()
    assert "topk_attn" in AttentionInterface._global_mapping


def test_names_trip_none_of_the_substring_tests_of_transformers():
    for word in ("flash", "sdpa", "flex_attention", "/", "|"):
        assert word not in hf.NAME


def test_config_of_another_class_accepts_the_keys():
    config = tiny_config("Qwen3", attn_implementation="topk_attn", topk_attention={"version": 1, "topk": 4})
    model = transformers.Qwen3ForCausalLM(config).eval()
    assert hf.check(model).topk == 4
