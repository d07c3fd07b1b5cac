"""Running topk-generate and topk-data on tiny models."""

import json
import os
import subprocess

import numpy as np
from data_helpers import save_tokenizer
from trainer_helpers import native_program, save_model, tiny_model

from topk_attn.data import load_tokenizer
from topk_attn.data.prompts import write_prompts


def generate(*arguments, code: int = 0, threads: int = 1):
    """topk-generate's standard output, or its error message when it must fail with `code`."""
    command = [native_program("topk-generate"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    error = done.stderr.decode()
    assert done.returncode == code, error
    if code == 0:
        return done.stdout.decode()
    assert done.stdout == b""
    assert error.startswith("topk-generate: error: ") and error.count("\n") == 1, error
    return error


def generate_json(*arguments, **options) -> dict:
    return json.loads(generate(*arguments, "--json", **options))


def model_folder(folder, family: str = "llama", tokenizer=None, vocab_size: int | None = None, **config):
    """A tiny random model with a tokenizer; its embedding has a few rows more than there are tokens."""
    save_tokenizer(folder, tokenizer=tokenizer)
    rows = vocab_size or load_tokenizer(folder).vocab_size + 5
    model = tiny_model(family, vocab_size=rows, **config).eval()
    save_model(model, folder)
    return model


def prompt_file(folder, prompts, path):
    write_prompts(load_tokenizer(folder), prompts, path)
    return path


def random_prompts(vocab_size: int, lengths, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab_size, length).tolist() for length in lengths]
