"""The command topk-data: prepare, inspect, tokens."""

import argparse
import os
import sys
from collections.abc import Sequence

from topk_attn.data.encode import OVERFLOW, TURNS, EncodeOptions
from topk_attn.data.errors import DataError
from topk_attn.data.prepare import PrepareOptions, PrepareReport, prepare
from topk_attn.data.prompts import chat_prompt, read_chats, text_prompt, write_prompts
from topk_attn.data.records import FORMATS, ROLES, read_text_file
from topk_attn.data.shards import read_shard
from topk_attn.data.show import check_tokenizer, document_text
from topk_attn.data.tokenizer import load_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 for bad input; a bad command line is SystemExit(2)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        arguments.run(arguments, parser)
        sys.stdout.flush()
    except DataError as error:
        message = " ".join(str(error).split("\n"))
        print(f"topk-data: error: {message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"topk-data: error: {error}", file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            # Nobody reads: leave without the interpreter flushing into the closed pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("topk-data: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="topk-data", description="Prepares text and conversations for topk-sft."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_prepare(commands)
    _add_inspect(commands)
    _add_tokens(commands)
    return parser


def _add_tokenizer(parser: argparse.ArgumentParser, required: bool = True) -> None:
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--model", dest="tokenizer", metavar="DIR", help="Hugging Face model folder")
    group.add_argument("--tokenizer", metavar="DIR", help="folder with the tokenizer alone")
    if required:
        parser.add_argument(
            "--chat-template", metavar="FILE", help="Jinja chat template instead of the folder's"
        )


def _add_prepare(commands) -> None:
    parser = commands.add_parser(
        "prepare",
        help="JSON lines to token shards with loss mask",
        description="Turns messages, alpaca, prompt-completion, text or ready tokens into token shards.",
    )
    parser.set_defaults(run=_prepare)
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="input: .jsonl, .json (array) or .txt, also .gz"
    )
    parser.add_argument("--input", nargs="+", action="extend", default=[], metavar="FILE", help="the same")
    _add_tokenizer(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the shards; made if need be"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="of the records (auto: by their keys)"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="name of the split (train)")
    parser.add_argument(
        "--val-split", default="validation", metavar="NAME", help="of what is held out (validation)"
    )
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--val-fraction", type=float, metavar="F", help="share of the records held out")
    held.add_argument("--val-documents", type=int, metavar="N", help="number of records held out")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of held-out records (0)")
    parser.add_argument(
        "--roles-to-train",
        nargs="+",
        default=["assistant"],
        metavar="ROLE",
        help=f"whose turns carry loss (assistant); of {', '.join(ROLES)}",
    )
    parser.add_argument(
        "--turns",
        choices=TURNS,
        default="all",
        help="all turns of a conversation, the last one, or a document for each (all)",
    )
    parser.add_argument(
        "--render",
        choices=("chat", "plain"),
        help="alpaca and prompt_completion as conversations or plain text (alpaca: chat, the other: plain)",
    )
    parser.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="EOS behind each document that is no conversation (only prompt_completion)",
    )
    parser.add_argument("--sequence-len", type=int, metavar="N", help="longest document in tokens")
    parser.add_argument(
        "--overflow", choices=OVERFLOW, help="what happens to longer ones (text: split, the rest: error)"
    )
    parser.add_argument(
        "--max-tokens-per-shard", type=int, default=1 << 25, metavar="N", help="tokens in a file (33554432)"
    )
    parser.add_argument(
        "--skip-invalid", action="store_true", help="leave out unusable records instead of stopping"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards of the same split")


def _prepare(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    inputs = arguments.files + arguments.input
    if not inputs:
        parser.error("prepare: an input file is needed")
    roles = [role for entry in arguments.roles_to_train for role in entry.split(",") if role]
    options = PrepareOptions(
        output=arguments.output,
        split=arguments.split,
        val_split=arguments.val_split,
        val_fraction=arguments.val_fraction,
        val_documents=arguments.val_documents,
        seed=arguments.seed,
        max_tokens_per_shard=arguments.max_tokens_per_shard,
        format=arguments.format,
        render=arguments.render,
        skip_invalid=arguments.skip_invalid,
        overwrite=arguments.overwrite,
        encode=EncodeOptions(
            roles=tuple(roles),
            turns=arguments.turns,
            append_eos=arguments.append_eos,
            sequence_len=arguments.sequence_len,
            overflow=arguments.overflow,
        ),
    )
    report = prepare(load_tokenizer(arguments.tokenizer, arguments.chat_template), inputs, options)
    _print_report(report, arguments)


def _print_report(report: PrepareReport, arguments: argparse.Namespace) -> None:
    for why in report.skipped[:5]:
        print(f"topk-data: skipped: {why}", file=sys.stderr)
    if len(report.skipped) > 5:
        print(f"topk-data: skipped: {len(report.skipped) - 5} more records", file=sys.stderr)
    for split in report.splits:
        print(
            f"{split.split}: {split.records:,} records, {split.documents:,} documents, {split.tokens:,} "
            f"tokens, {split.loss_tokens:,} with loss ({100 * split.loss_tokens / split.tokens:.1f} %), "
            f"longest document {split.longest:,}"
        )
        if split.dropped:
            print(f"  {split.dropped:,} records longer than {arguments.sequence_len:,} tokens were dropped")
        for path in split.files[:3]:
            print(f"  {path}")
        if len(split.files) > 3:
            print(f"  ... {len(split.files)} files, to {split.files[-1]}")
    if report.skipped:
        print(f"skipped: {len(report.skipped):,} records")


def _add_inspect(commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="shows the documents of a shard",
        description="Prints metadata and documents; what carries loss is green, or between [[ and ]].",
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument("shard", metavar="SHARD")
    _add_tokenizer(parser, required=False)
    parser.add_argument(
        "--documents", type=int, default=3, metavar="N", help="how many documents to show (3)"
    )
    parser.add_argument("--start", type=int, default=0, metavar="N", help="number of the first one (0)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")


def _inspect(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.documents < 0 or arguments.start < 0:
        parser.error("inspect: --documents and --start must be at least 0")
    shard = read_shard(arguments.shard)
    if arguments.documents > 0 and arguments.start >= len(shard):
        raise DataError(f"{arguments.shard}: has {len(shard)} documents, --start must be below that")
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    if tokenizer:
        check_tokenizer(shard, arguments.shard, tokenizer)
    color = arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty())
    for key in sorted(shard.metadata):
        print(f"{key}: {shard.metadata[key]}")
    for number in range(arguments.start, min(arguments.start + arguments.documents, len(shard))):
        ids, mask = shard.document(number)
        print(f"\ndocument {number}: {len(ids):,} tokens, {int(mask.sum()):,} with loss")
        print(document_text(shard, number, tokenizer, color))


def _add_tokens(commands) -> None:
    parser = commands.add_parser(
        "tokens",
        aliases=["prompts"],
        help="prompts to a token file for topk-generate",
        description="Writes prompts, in the order text, text files, users, chats, as a token file.",
    )
    parser.set_defaults(run=_tokens)
    _add_tokenizer(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="plain text; repeatable"
    )
    parser.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE", help="a file as one plain text"
    )
    parser.add_argument(
        "--user", action="append", default=[], metavar="TEXT", help="a chat of one user message"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of every --user chat")
    parser.add_argument(
        "--chat",
        action="append",
        default=[],
        metavar="FILE",
        help="conversations: a JSON array of messages, or JSON lines of {messages}",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="token file (.safetensors)")


def _tokens(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not (arguments.prompt or arguments.prompt_file or arguments.user or arguments.chat):
        parser.error("tokens: a prompt is needed: --prompt, --prompt-file, --user or --chat")
    if arguments.system is not None and not arguments.user:
        parser.error("tokens: --system needs --user")
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.chat_template)
    prompts = [text_prompt(tokenizer, text, f"--prompt {text!r}") for text in arguments.prompt]
    prompts += [text_prompt(tokenizer, read_text_file(path), path) for path in arguments.prompt_file]
    opening = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    for text in arguments.user:
        prompts.append(
            chat_prompt(tokenizer, [*opening, {"role": "user", "content": text}], f"--user {text!r}")
        )
    for path in arguments.chat:
        prompts += [chat_prompt(tokenizer, messages, where) for where, messages in read_chats(path)]
    write_prompts(tokenizer, prompts, arguments.output)
    print(f"{arguments.output}: {len(prompts):,} prompts, {sum(map(len, prompts)):,} tokens")


if __name__ == "__main__":
    sys.exit(main())
