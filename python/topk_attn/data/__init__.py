"""Data preparation: text and conversations in, token shards for the trainer out.

The command is ``topk-data`` (or ``python -m topk_attn.data``); see docs/data.md. The same steps from Python:

    tokenizer = load_tokenizer("model-dir")
    records = read_records(["chats.jsonl"], format="auto")
    ids, mask = encode(tokenizer, next(iter(records)))
    shard = read_shard("out/train-00000.safetensors")
"""

from topk_attn.data.encode import EncodeOptions, encode
from topk_attn.data.errors import DataError
from topk_attn.data.prepare import PrepareOptions, prepare
from topk_attn.data.records import Record, read_records
from topk_attn.data.shards import Shard, ShardWriter, read_shard
from topk_attn.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DataError",
    "EncodeOptions",
    "PrepareOptions",
    "Record",
    "Shard",
    "ShardWriter",
    "Tokenizer",
    "encode",
    "load_tokenizer",
    "prepare",
    "read_records",
    "read_shard",
]
