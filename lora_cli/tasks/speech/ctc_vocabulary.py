"""The letters that a model writes by CTC: those of its tokenizer, or a new vocabulary.

Transcripts are read in these letters. A new vocabulary comes from the recipe or from the
transcripts of train, and gets an output layer of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    Wav2Vec2BertProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
)

from lora_cli.data.load_rows import Rows
from lora_cli.errors import LoraError, counted
from lora_cli.models.base_model import load_tokenizer
from lora_cli.tasks.speech.decoders import SPECTROGRAMS, require_decoder
from lora_cli.tasks.speech.letters import DOTLESS, Letters
from lora_cli.tasks.speech.new_vocabulary import (
    UNKNOWN,
    has_tokenizer,
    heard,
    lacks_vocabulary,
    letters_of,
    letters_to_continue,
    tokenizer_of,
)
from lora_cli.tasks.speech.speech_rows import RecordedTask
from lora_cli.tasks.texts.control_tokens import ControlTokens
from lora_cli.tasks.texts.marked_tokens import GREEN, PLAIN

SHOWN = 20  # characters that are left out
SPACE = " "
FRAMES = "input_features"  # of a spectrogram


class CTCVocabulary(RecordedTask):
    """What a task that writes by CTC has to do with letters."""

    is_new = False
    """Whether the letters are those of the recipe or of train, and not of the base."""

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the tokenizer, the feature extractor and the configuration."""
        require_decoder(self.recipe, "ctc")
        self._reject_keys_of_others()
        super().load_processor()
        self.learned.task["decoder"] = "ctc"
        if self.is_new:
            self._use(self._known_letters or "")
            return
        tokenizer, at, name = self.tokenizer, self.recipe.at("model.name"), self.recipe.model.name
        if getattr(self.config, "adapter_attn_dim", None):
            what = f"`{name}` has weights of its own for each language (MMS)"
            hint = "take facebook/mms-300m or facebook/mms-1b, which were only pretrained, and get "
            raise LoraError(what, at, f"{hint}a vocabulary from your transcripts")
        if not isinstance(tokenizer, Wav2Vec2CTCTokenizer) or tokenizer.target_lang is not None:
            kind = type(tokenizer).__name__
            what = f"the tokenizer of `{name}` ({kind}) is not one of letters"
            raise LoraError(what, at, self.spec.suitable_models)
        self.blank = int(self.config.pad_token_id)
        if tokenizer.pad_token_id != self.blank:
            what = (
                f"config.json of `{name}` names another blank (`pad_token_id` {self.blank}) than "
            )
            what += f"its tokenizer ({tokenizer.pad_token_id})"
            hint = "the tokenizer and the model do not belong together: copy or download both again"
            raise LoraError(what, at, hint)
        words, special = tokenizer.word_delimiter_token, set(tokenizer.all_special_tokens)
        # a model that was trained in full has the recipe's letters as its own
        unknown = None if self.spec.letters is None else int(tokenizer.unk_token_id)
        self.letters = Letters(tokenizer.get_vocab(), words, special - {words, SPACE}, unknown)

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base's tokenizer; or that of a new vocabulary, as far as it is known."""
        self.is_new = self.has_head = self._has_new_letters()
        if not self.is_new:
            return super().read_tokenizer()
        if self._known_letters is None and self.recipe.data.streaming:
            what = "the letters of a new vocabulary are those of all transcripts, and "
            what += "`data.streaming` does not have them together"
            hint = "name them: `task.letters: abcdefghijklmnopqrstuvwxyz`"
            raise LoraError(what, self.recipe.at("data.streaming"), hint)
        return tokenizer_of(self._known_letters or "")

    def read_config(self) -> None:
        """Read the model's configuration, to which a new vocabulary belongs."""
        super().read_config()
        self.is_new = self.has_head = self._has_new_letters()
        if self.is_new:
            self._use(self._known_letters or "")

    @property
    def _known_letters(self) -> str | None:
        known: str | None = self.learned.task.get("letters", self.spec.letters)
        return known

    def _has_new_letters(self) -> bool:
        """Return whether the vocabulary is another than the base's own."""
        if self.spec.letters is None:
            return lacks_vocabulary(self.recipe)
        if not has_tokenizer(self.recipe):
            return True
        wanted = tokenizer_of(self.spec.letters).get_vocab()
        return bool(load_tokenizer(self.recipe).get_vocab() != wanted)

    def _use(self, letters: str) -> None:
        """Take these letters as the vocabulary; none, as long as they are not known."""
        self.tokenizer = tokenizer = tokenizer_of(letters)
        self.control_tokens = ControlTokens(tokenizer)
        self.blank = int(tokenizer.pad_token_id)
        self.config.pad_token_id, self.config.vocab_size = self.blank, len(tokenizer)
        if letters:
            words, special = tokenizer.word_delimiter_token, set(tokenizer.all_special_tokens)
            unknown = int(tokenizer.unk_token_id)
            self.letters = Letters(tokenizer.get_vocab(), words, special - {words, SPACE}, unknown)

    @property
    def knows_labels(self) -> bool:
        """Whether the letters are known; those of a new vocabulary may be still to be learnt."""
        if self._known_letters is not None:
            return True
        with suppress(LoraError):  # what is wrong with the base is said when it is loaded
            return not lacks_vocabulary(self.recipe)
        return True

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the tokenizer and the feature extractor into a folder; new ones as a processor."""
        super().save_processor(folder, facts)
        if self.is_new:
            kind = Wav2Vec2BertProcessor if self.input_key == FRAMES else Wav2Vec2Processor
            kind(self.extractor, self.tokenizer).save_pretrained(folder)

    def _reject_keys_of_others(self) -> None:
        """Reject what the recipe says of a model that writes one token after the other.

        Raises:
            LoraError: If it says something.
        """
        for key, value in {"language": self.spec.language, "task": self.spec.task}.items():
            if value is not None:
                what = (
                    f"`{self.recipe.model.name}` writes by CTC in the language that it was trained "
                )
                at = self.recipe.at(f"task.{key}")
                raise LoraError(f"{what}with, and takes no `{key}`", at, "leave it out")

    @property
    def input_key(self) -> str:
        """What the model calls that which it reads."""
        return FRAMES if self.config.model_type == SPECTROGRAMS else "input_values"

    # ------------------------------------------------------------------------------ rows

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the transcript, or nothing."""
        if error := super().target_error(row):
            return error
        text = str(row[self.spec.text_column])
        if not hasattr(self, "letters"):
            lacks_letters = self.is_new and not heard(text)
            return f"`{self.spec.text_column}` has no letter" if lacks_letters else ""
        unknown = self.letters.unknown(text) if self.letters.unknown_id is None else None
        if unknown is not None:
            return f"`{unknown}` in `{self.spec.text_column}` is not in the model's vocabulary"
        if not self.letters.written(text):
            return f"`{self.spec.text_column}` has no letter that the model can write"
        return ""

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Say what of the transcripts the model cannot write, and is left out."""
        super().learn_from(splits)
        if self.is_new:
            self._learn_letters(splits)
        if not hasattr(self, "letters"):  # the model could not be read, which is said elsewhere
            return
        left_out, n_rows = set[str](), 0
        for rows in splits.values():
            for row in rows:
                found = self.letters.left_out(str(row[self.spec.text_column]))
                left_out |= found
                n_rows += bool(found)
        if left_out:
            shown = " ".join(sorted(left_out)[:SHOWN])
            where = counted(n_rows, "transcript")
            self.notes.append(f"the model's vocabulary has no {shown}: left out of {where}")
        if self.letters.only_capitals:
            self.notes.append("transcripts are read in capital letters, as the model writes them")
        if self.letters.has_dotless and self.letters.only_small:
            what = f"`I` is read as `{DOTLESS[0]}`, as the vocabulary has the letters of Turkish"
            self.notes.append(what)
        if self.letters.longer:
            shown = ", ".join(f"`{name}`" for name in self.letters.longer[:SHOWN])
            what = (
                "the vocabulary has tokens of several letters, which transcripts are not divided "
            )
            self.notes.append(f"{what}into: {shown}")

    def _learn_letters(self, splits: dict[str, Rows]) -> None:
        """Take the letters of train as the vocabulary, and say which those of others lack."""
        column = self.spec.text_column
        if self._known_letters is None:
            if "train" not in splits:  # it is streamed, which is an error of its own
                return
            letters = letters_to_continue(self.recipe) or letters_of(
                str(row[column]) for row in splits["train"]
            )
            self.learned.task["letters"] = letters
            self._use(letters)
        known = str(self._known_letters)
        self.notes.append(
            f"a new vocabulary of {counted(len(known), 'letter')}, `{known}`, and an output layer "
            "for it, which is trained in full"
        )
        if self.letters.only_small:
            self.notes.append("transcripts are read in lower case, as the model will write them")
        for name, rows in splits.items():
            texts = [self.letters.written(str(row[column])) for row in rows]
            lacking = {c for text in texts for c in text if c not in self.letters.ids}
            if lacking:
                shown = " ".join(sorted(lacking)[:SHOWN])
                n_rows = sum(not lacking.isdisjoint(text) for text in texts)
                where = counted(n_rows, f"{name} transcript")
                self.notes.append(
                    f"letters of {where} that the vocabulary lacks are {UNKNOWN}: {shown}"
                )

    def reference(self, row: dict[str, Any]) -> str:
        """Return what a row wants, as far as the model can write it."""
        return self.letters.written(str(row[self.spec.text_column]))

    def tokens_of(self, text: str) -> list[int]:
        """Return a transcript's letters."""
        return self.letters.tokens_of(text)

    def marked(self, labels: Sequence[int], colour: bool) -> str:
        """Return a transcript letter by letter: decoding would join two equal ones."""
        names = self.tokenizer.convert_ids_to_tokens(list(labels))
        text = "".join(names).replace(self.tokenizer.word_delimiter_token, " ")
        return f"{GREEN}{text}{PLAIN}" if colour else f"⟦{text}⟧"
