"""Which characters of a rendered conversation carry loss.

Chat templates say how a conversation looks, not which part of it the assistant wrote. Here that is found by
rendering and checked by comparing strings, never assumed:

    full      the whole conversation
    before    the messages up to a turn, without and with the generation prompt
    through   the messages up to and including the turn
    probe     the same with the turn's content replaced by a marker: what the template writes around content

A turn's trained text begins where the generation prompt ends (that is where the model takes over) and ends
with the stop token, the first special token behind the content. If the strings do not fit together, the
template rewrites earlier turns or begins turns in another way than its generation prompt, and DataError
says so.
"""

from collections.abc import Sequence

from topk_attn.data.errors import DataError
from topk_attn.data.tokenizer import Tokenizer

_MARKER = "Qz7XmarkerK3vTopK9"  # plain letters: templates strip, split and escape other things


def trained_spans(
    tokenizer: Tokenizer, messages: Sequence[dict], turns: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the [begin, end) character spans of the messages `turns` (from 0)."""
    full = tokenizer.render(messages)
    spans = []
    for turn in turns:
        begin, end = _turn_span(tokenizer, messages, turn, full)
        if spans and begin < spans[-1][1]:
            raise _unfit(messages, turn, "its text overlaps the turn before")
        spans.append((begin, end))
    return full, spans


def _turn_span(tokenizer: Tokenizer, messages: Sequence[dict], turn: int, full: str) -> tuple[int, int]:
    message = messages[turn]
    # Templates need not render an empty conversation, so nothing is asked of them before the first message.
    before = tokenizer.render(messages[:turn]) if turn > 0 else ""
    prompt = (
        tokenizer.render(messages[:turn], True) if turn > 0 and message["role"] == "assistant" else before
    )
    if not prompt.startswith(before) or not full.startswith(prompt):
        raise _unfit(messages, turn, "the text before it changes when it is added")

    probe = tokenizer.render([*messages[:turn], {**message, "content": _MARKER}])
    if not probe.startswith(before) or probe.count(_MARKER) != 1:
        raise _unfit(
            messages, turn, "the template does not write its content once, behind the messages before it"
        )
    place = probe.index(_MARKER)
    lead, tail = probe[len(before) : place], probe[place + len(_MARKER) :]
    stop = tokenizer.specials.search(tail)
    if stop is None:
        raise _unfit(messages, turn, "no special token ends it, so a model could not learn to stop")

    has_prompt = len(prompt) > len(before)
    # Without a generation prompt the template's header, if any, is what stands before the content.
    begin = len(prompt) if has_prompt or not lead.strip() else len(before) + len(lead)

    through = tokenizer.render(messages[: turn + 1])
    if full.startswith(through) and through.endswith(tail) and len(through) - len(tail) >= begin:
        if has_prompt or through.startswith(before + lead):
            return begin, len(through) - len(tail) + stop.end()

    # Templates that show a turn differently once it is history (without an empty thinking block, say): the
    # content must stand there word for word, closed by the same stop token.
    content = message["content"]
    for opening in (lead, prompt[len(before) :]):
        for text in (content, content.strip(), content.lstrip(), content.rstrip()):
            closed = before + opening + text + tail[: stop.end()]
            if len(before + opening) >= begin and full.startswith(closed):
                return begin, len(closed)
    raise _unfit(messages, turn, "the template rewrites it once other messages follow")


def _unfit(messages: Sequence[dict], turn: int, why: str) -> DataError:
    return DataError(
        f"message {turn + 1} ({messages[turn]['role']}): the chat template does not allow a loss mask: "
        f"{why}; --turns split or --turns last trains each turn as the end of its own conversation, "
        "--chat-template FILE uses another template"
    )
