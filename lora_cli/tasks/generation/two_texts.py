"""Which of two columns of text is written of the other, by what both are called."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_cli.data.column_kinds import Column

# by the code that names columns and files: the code of three letters, and the name that T5 reads
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
READ = {
    "prompt", "question", "q", "query", "instruction", "input", "source", "src", "request", "user",
    "human", "ask", "problem", "context", "text", "content", "body", "article", "document", "doc",
    "post", "report", "dialogue", "dialog", "passage", "utterance", "conversation", "transcript",
}  # fmt: skip
ANSWER = {
    "completion", "response", "answer", "a", "output", "reply", "solution", "assistant", "bot",
    "gpt",
}  # fmt: skip
WRITTEN_OF_IT = ANSWER | {
    "target", "tgt", "summary", "highlight", "headline", "tldr", "translation"
}  # fmt: skip
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def source_and_target(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Return the text that is read and the one that is written of it.

    The two are languages, in their order, or one has the name of an answer, and the other that of
    what is asked or read: `Context` and `Response`, `src_text` and `tgt_text`.

    Returns:
        None if there are other columns of text too, or if the names do not say it.
    """
    texts = [column for column in columns if column.kind == "text"]
    if len(texts) == 1:  # the answer may be a number: no other is the answer to a question
        answers = (c for c in columns if c.kind in ("number", "id") and _words(c.name) & ANSWER)
        texts += list(answers)
    if len(texts) != 2:
        return None
    first, second = texts
    if all(language_of(column.name) for column in texts):
        return first, second
    for source, target in ((first, second), (second, first)):
        asked, said = _words(source.name), _words(target.name)
        if asked & READ and said & WRITTEN_OF_IT and not asked & WRITTEN_OF_IT:
            return source, target
    return None


def _words(name: str) -> set[str]:
    return {word.lower().removesuffix("s") for word in WORD.findall(name)}


def language_of(name: str) -> str | None:
    """Return the code of the language that a column is named after: of `de` and `German`, `de`."""
    lower = name.lower()
    names = {english.lower(): code for code, (_, english) in LANGUAGES.items()}
    longer = {three: code for code, (three, _) in LANGUAGES.items()}
    if lower in LANGUAGES:
        return lower
    return names.get(lower) or longer.get(lower)
