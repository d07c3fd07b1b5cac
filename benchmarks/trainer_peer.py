"""Training steps of transformers, the peer of trainer.py: one shape, in a process of its own.

    python benchmarks/trainer_peer.py '{"config": {...}, "sequences": 1, "length": 8192, ...}'

bfloat16 weights and moments, sdpa attention, fused AdamW, gradients clipped, random tokens; `compiled` puts
the decoder layers through torch.compile. Prints one JSON object: the median over the steps after the
warm-up, the most memory that tensors took, and how long the first step (with compilation) was. Needs a GPU
and transformers.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
import transformers


def measure(spec: dict) -> dict:
    """Keys of `spec`: config (of config.json), sequences, length, checkpointing, compiled, steps, warmup,
    device.
    """
    device = torch.device(spec["device"])
    kinds = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}
    settings = {k: v for k, v in spec["config"].items() if k not in ("architectures", "dtype", "model_type")}
    config = kinds[spec["config"]["model_type"]](**settings)
    torch.manual_seed(1)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    model.train()
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(3, config.vocab_size, (spec["sequences"], spec["length"]), device=device)
    if spec["compiled"]:
        for layer in model.model.layers:  # one compilation serves all; that of the whole model takes minutes
            layer.compile()
    seconds = []
    for number in range(spec["steps"]):
        if number == spec["warmup"]:
            torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[spec["warmup"] :])
    return {
        "tokens_per_second": spec["sequences"] * spec["length"] / step,
        "step_seconds": step,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "first_step_seconds": seconds[0],
        "steps_timed": len(seconds) - spec["warmup"],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    try:
        result = measure(json.loads(sys.argv[1]))
    except torch.cuda.OutOfMemoryError:
        result = {"error": "out of memory"}
    print(json.dumps(result))
