"""An answer that is cut ends on a whole character."""

from __future__ import annotations

import pytest
import tiny
import torch
from languages import TEXTS

from lora_cli.evaluation.converse import Streamer
from lora_cli.tasks.generation.text_generation import decode, whole_characters

TOKENIZER = tiny.tokenizer("llama")  # of bytes: a Japanese letter takes three tokens


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("language", TEXTS)
def test_a_cut_answer_ends_with_a_whole_character(language: str) -> None:
    text = TEXTS[language][0]
    ids = ids_of(text)
    pieces = [decode(TOKENIZER, ids[:i], is_cut=True) for i in range(len(ids) + 1)]
    assert all(text.startswith(piece) for piece in pieces)  # so no U+FFFD is in them
    assert pieces[-1] == text
    assert sorted(pieces, key=len) == pieces


def test_an_emoji_of_several_does_not_end_in_what_joins_them() -> None:
    family, flag = "\U0001f468\u200d\U0001f469", "\U0001f1ef\U0001f1f5"
    for text in (family, flag):
        ids = ids_of(f"ok {text}")
        for i in range(len(ids) + 1):
            piece = decode(TOKENIZER, ids[:i], is_cut=True)
            assert not piece.endswith(("\u200d", "\ufffd"))
            assert piece.count("\U0001f1ef") == piece.count("\U0001f1f5")
        assert decode(TOKENIZER, ids, is_cut=True) == f"ok {text}"


def test_a_generated_replacement_character_is_kept() -> None:
    ids = ids_of("日本")
    assert decode(TOKENIZER, ids[:4], is_cut=False) == "日\ufffd"  # it ended its answer there
    assert decode(TOKENIZER, ids_of("a\ufffd"), is_cut=True) == "a\ufffd"
    assert decode(TOKENIZER, [], is_cut=True) == ""


def test_a_text_is_divided_between_characters() -> None:
    ids = ids_of("a日本")
    cuts = [whole_characters(TOKENIZER, ids, i) for i in range(1, len(ids) + 3)]
    assert cuts == [1, 1, 1, 4, 4, 4, 7, 7, 7]
    assert TOKENIZER.decode(ids[:4]) + TOKENIZER.decode(ids[4:]) == "a日本"


@pytest.mark.parametrize(("ends", "said"), [(True, "日\ufffd"), (False, "日")])
def test_streamed_text_equals_the_answer(ends: bool, said: str) -> None:
    pieces: list[str] = []
    streamer = Streamer(TOKENIZER, pieces.append, [tiny.EOS])
    streamer.put(torch.tensor([[5]]))  # the prompt
    for i in [*ids_of("日本")[:4], *([tiny.EOS] if ends else [])]:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(pieces) == said
