"""Finds the source and the target among two columns of text, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_cli.data.column_kinds import Column

# two-letter codes, with the three-letter code and the English name, as in T5's prefixes
LANGUAGES = {
    "ar": ("arb", "Arabic"), "bg": ("bul", "Bulgarian"), "cs": ("ces", "Czech"),
    "da": ("dan", "Danish"), "de": ("deu", "German"), "el": ("ell", "Greek"),
    "en": ("eng", "English"), "es": ("spa", "Spanish"), "et": ("est", "Estonian"),
    "fa": ("pes", "Persian"), "fi": ("fin", "Finnish"), "fr": ("fra", "French"),
    "he": ("heb", "Hebrew"), "hi": ("hin", "Hindi"), "hu": ("hun", "Hungarian"),
    "id": ("ind", "Indonesian"), "it": ("ita", "Italian"), "ja": ("jpn", "Japanese"),
    "ko": ("kor", "Korean"), "lt": ("lit", "Lithuanian"), "lv": ("lvs", "Latvian"),
    "nl": ("nld", "Dutch"), "pl": ("pol", "Polish"), "pt": ("por", "Portuguese"),
    "ro": ("ron", "Romanian"), "ru": ("rus", "Russian"), "sk": ("slk", "Slovak"),
    "sl": ("slv", "Slovenian"), "sv": ("swe", "Swedish"), "th": ("tha", "Thai"),
    "tr": ("tur", "Turkish"), "uk": ("ukr", "Ukrainian"), "vi": ("vie", "Vietnamese"),
    "zh": ("zho", "Chinese"),
}  # fmt: skip
SOURCE_NAMES = {
    "prompt", "question", "q", "query", "instruction", "input", "source", "src", "request", "user",
    "human", "ask", "problem", "context", "text", "content", "body", "article", "document", "doc",
    "post", "report", "dialogue", "dialog", "passage", "utterance", "conversation", "transcript",
}  # fmt: skip
ANSWER_NAMES = {
    "completion", "response", "answer", "a", "output", "reply", "solution", "assistant", "bot",
    "gpt",
}  # fmt: skip
TARGET_NAMES = ANSWER_NAMES | {
    "target", "tgt", "summary", "highlight", "headline", "tldr", "translation"
}  # fmt: skip
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def source_and_target(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Return the text that the model reads and the one that it learns to write.

    Either both columns are named after languages, and the first is the source; or one has the name
    of a source and the other that of a target: `Context` and `Response`, `src_text` and `tgt_text`.

    Returns:
        None if there are other columns of text, or if the names do not show which is which.
    """
    texts = [column for column in columns if column.kind == "text"]
    if len(texts) == 1:  # the answer to a question may be a number
        numbers = [column for column in columns if column.kind in ("number", "id")]
        texts += [column for column in numbers if _words(column.name) & ANSWER_NAMES]
    if len(texts) != 2:
        return None
    first, second = texts
    if all(language_of(column.name) for column in texts):
        return first, second
    for source, target in ((first, second), (second, first)):
        source_words, target_words = _words(source.name), _words(target.name)
        is_source = source_words & SOURCE_NAMES and not source_words & TARGET_NAMES
        if is_source and target_words & TARGET_NAMES:
            return source, target
    return None


def _words(name: str) -> set[str]:
    return {word.lower().removesuffix("s") for word in WORD.findall(name)}


def language_of(name: str) -> str | None:
    """Return the code of the language that a column is named after: `de` for `German`."""
    lower = name.lower()
    by_name = {english.lower(): code for code, (_, english) in LANGUAGES.items()}
    by_three_letters = {three: code for code, (three, _) in LANGUAGES.items()}
    if lower in LANGUAGES:
        return lower
    return by_name.get(lower) or by_three_letters.get(lower)
