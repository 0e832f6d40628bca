"""The chat layout of the official models, and lists of references in their files."""

import json

import numpy as np
import pytest

from moss_tok.data import codes
from moss_tok.language.text import ByteTokenizer
from moss_tok.speech import config as configs
from moss_tok.speech import layout
from moss_tok.speech.layout import Request


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([[[1, 2], [3, 4]]], [[1, 3], [2, 4]]),
        ([[[1, 2], [3, 4]], None], [[1, 3], [2, 4]]),
        (None, None),
        ([None, [[1, 2]]], "lines.jsonl:1: reference_audio_codes must be a list with one"),
        ([[[1, 2]], [[3, 4]]], "must be a list with one reference"),
        ("x", "must be a list with one reference"),
        ([[1, 2]], r"a reference must be lists of integers \[T, Q\]"),
    ],
)
def test_lists_of_references(tmp_path, references, expected):
    """As the official files for several speakers have them."""
    row = {"audio_codes": [[5, 6]], "text": "a", "reference_audio_codes": references}
    (tmp_path / "lines.jsonl").write_text(json.dumps(row))
    source = codes.open_source(tmp_path / "lines.jsonl")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            source[0]
        return
    reference = source[0].metadata.get(codes.REFERENCE)
    assert (None if reference is None else reference.tolist()) == expected


class ChatTokenizer(ByteTokenizer):
    """Bytes, and the names of the chat layout as single tokens."""

    vocab_size = 257 + len(layout.CHAT_TOKENS)

    def token_id(self, name):
        names = layout.CHAT_TOKENS
        return 257 + names.index(name) if name in names else None

    def encode(self, text):
        tokens = []
        while text:
            name = next((n for n in layout.CHAT_TOKENS if text.startswith(n)), None)
            tokens += [self.token_id(name)] if name else list(text[0].encode())
            text = text.removeprefix(name) if name else text[1:]
        return tokens

    def decode(self, tokens):
        names = dict(enumerate(layout.CHAT_TOKENS, 257))
        return "".join(names.get(t) or chr(t) for t in tokens)


def test_the_chat_layout():
    """Its words are those of the official processor."""
    tokenizer = ChatTokenizer()
    fields = layout.token_fields(tokenizer)
    config = configs.preset("tiny", codebook_size=16, num_quantizers=4, **fields)
    reference = np.arange(8).reshape(4, 2)
    request = Request("Hi", reference, details={"language": "en", "instruction": "slow"})
    found = layout.prompt(config, tokenizer, request)
    assert tokenizer.decode(found.text.tolist()) == (
        "<|im_start|>user\n<user_inst>\n- Reference(s):\n[S1]:\n"
        "<|vision_start|><|vision_pad|><|vision_pad|><|vision_end|>\n"
        "- Instruction:\nslow\n- Tokens:\nNone\n- Quality:\nNone\n- Sound Event:\nNone\n"
        "- Ambient Sound:\nNone\n- Language:\nen\n- Text:\nHi\n</user_inst><|im_end|>\n"
        "<|im_start|>assistant\n<|vision_start|>"
    )
    slots = found.text == config.user_slot_id
    np.testing.assert_array_equal(found.codes[:, slots], reference)
    assert (found.codes[:, ~slots] == 16).all()
    alone = layout.prompt(config, tokenizer, Request("Hi", beginning=reference))
    assert "Reference(s):\nNone\n- Instruction:\nNone" in tokenizer.decode(alone.text.tolist())
    assert alone.text[-3:].tolist() == [config.start_id, config.slot_id, config.slot_id]
    added = layout.reference_size(config, tokenizer, "", 2)
    assert len(layout.prompt(config, tokenizer, Request("Hi", reference)).text) == added + len(
        layout.prompt(config, tokenizer, Request("Hi")).text
    )
    with pytest.raises(ValueError, match="has a token that the layout"):
        layout.check_text(config, tokenizer, "Hi<|im_end|>")
