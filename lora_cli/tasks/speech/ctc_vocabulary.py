"""The vocabulary of a CTC model: its tokenizer's, or a new one.

A new vocabulary comes from the recipe or from the transcripts of the train split, and gets a new
output layer.
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
from lora_cli.tasks.speech.decoders import SPECTROGRAM_MODEL, require_decoder
from lora_cli.tasks.speech.letters import DOTLESS, Letters
from lora_cli.tasks.speech.new_vocabulary import (
    UNKNOWN,
    build_tokenizer,
    has_tokenizer,
    lacks_vocabulary,
    letters_of,
    normalise_transcript,
    previous_letters,
)
from lora_cli.tasks.speech.speech_rows import RecordingTask
from lora_cli.tasks.texts.control_tokens import ControlTokens
from lora_cli.tasks.texts.marked_tokens import GREEN, PLAIN

MAX_SHOWN = 20  # removed characters and tokens in a note
SPACE = " "
FRAMES = "input_features"  # the model's argument for spectrograms


class CTCVocabulary(RecordingTask):
    """The part of a CTC task that handles the vocabulary."""

    is_new = False
    """Whether the vocabulary is that of the recipe or the train split, not that of the base."""

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the tokenizer, the feature extractor and the configuration."""
        require_decoder(self.recipe, "ctc")
        self._reject_attention_keys()
        super().load_processor()
        self.learned.task["decoder"] = "ctc"
        if self.is_new:
            self._set_vocabulary(self._known_letters or "")
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
        # a fully fine-tuned model's own vocabulary is that of the recipe, with an unknown token
        unknown = None if self.spec.letters is None else int(tokenizer.unk_token_id)
        self.letters = Letters(tokenizer.get_vocab(), words, special - {words, SPACE}, unknown)

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base's tokenizer, or that of the new vocabulary as far as it is known."""
        self.is_new = self.has_head = self._needs_new_vocabulary()
        if not self.is_new:
            return super().read_tokenizer()
        if self._known_letters is None and self.recipe.data.streaming:
            what = "the letters of a new vocabulary are those of all transcripts, and "
            what += "`data.streaming` does not have them together"
            hint = "name them: `task.letters: abcdefghijklmnopqrstuvwxyz`"
            raise LoraError(what, self.recipe.at("data.streaming"), hint)
        return build_tokenizer(self._known_letters or "")

    def read_config(self) -> None:
        """Read the model's configuration, and adapt it to a new vocabulary."""
        super().read_config()
        self.is_new = self.has_head = self._needs_new_vocabulary()
        if self.is_new:
            self._set_vocabulary(self._known_letters or "")

    @property
    def _known_letters(self) -> str | None:
        letters: str | None = self.learned.task.get("letters", self.spec.letters)
        return letters

    def _needs_new_vocabulary(self) -> bool:
        """Return whether the vocabulary differs from the base's."""
        if self.spec.letters is None:
            return lacks_vocabulary(self.recipe)
        if not has_tokenizer(self.recipe):
            return True
        expected = build_tokenizer(self.spec.letters).get_vocab()
        return bool(load_tokenizer(self.recipe).get_vocab() != expected)

    def _set_vocabulary(self, letters: str) -> None:
        """Set the letters of the new vocabulary; an empty string while they are unknown."""
        self.tokenizer = tokenizer = build_tokenizer(letters)
        self.control_tokens = ControlTokens(tokenizer)
        self.blank = int(tokenizer.pad_token_id)
        self.config.pad_token_id, self.config.vocab_size = self.blank, len(tokenizer)
        if letters:
            words, special = tokenizer.word_delimiter_token, set(tokenizer.all_special_tokens)
            unknown = int(tokenizer.unk_token_id)
            self.letters = Letters(tokenizer.get_vocab(), words, special - {words, SPACE}, unknown)

    @property
    def knows_labels(self) -> bool:
        """Whether the vocabulary is known; a new one may yet have to be read from the data."""
        if self._known_letters is not None:
            return True
        with suppress(LoraError):  # loading the base reports what is wrong with it
            return not lacks_vocabulary(self.recipe)
        return True

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Save the tokenizer and feature extractor; with a new vocabulary, also as a processor."""
        super().save_processor(folder, facts)
        if self.is_new:
            kind = Wav2Vec2BertProcessor if self.input_key == FRAMES else Wav2Vec2Processor
            kind(self.extractor, self.tokenizer).save_pretrained(folder)

    def _reject_attention_keys(self) -> None:
        """Reject keys that apply to models with an autoregressive decoder only.

        Raises:
            LoraError: If the recipe sets such a key.
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
        """The name of the model's input."""
        return FRAMES if self.config.model_type == SPECTROGRAM_MODEL else "input_values"

    # ------------------------------------------------------------------------------ rows

    def target_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the transcript, or an empty string."""
        if error := super().target_error(row):
            return error
        text = str(row[self.spec.text_column])
        if not hasattr(self, "letters"):
            lacks_letters = self.is_new and not normalise_transcript(text)
            return f"`{self.spec.text_column}` has no letter" if lacks_letters else ""
        unknown = self.letters.first_unknown(text) if self.letters.unknown_id is None else None
        if unknown is not None:
            return f"`{unknown}` in `{self.spec.text_column}` is not in the model's vocabulary"
        if not self.letters.normalise(text):
            return f"`{self.spec.text_column}` has no letter that the model can write"
        return ""

    def learn_from(self, splits: dict[str, Rows]) -> None:
        """Determine a new vocabulary, and add notes about how transcripts are normalised."""
        super().learn_from(splits)
        if self.is_new:
            self._learn_letters(splits)
        if not hasattr(self, "letters"):  # loading the model reports why it cannot be read
            return
        removed_symbols, n_rows = set[str](), 0
        for rows in splits.values():
            for row in rows:
                symbols = self.letters.removed_symbols(str(row[self.spec.text_column]))
                removed_symbols |= symbols
                n_rows += bool(symbols)
        if removed_symbols:
            shown = " ".join(sorted(removed_symbols)[:MAX_SHOWN])
            where = counted(n_rows, "transcript")
            self.notes.append(f"the model's vocabulary has no {shown}: left out of {where}")
        if self.letters.is_upper_case:
            self.notes.append("transcripts are read in capital letters, as the model writes them")
        if self.letters.has_dotless and self.letters.is_lower_case:
            what = f"`I` is read as `{DOTLESS[0]}`, as the vocabulary has the letters of Turkish"
            self.notes.append(what)
        if self.letters.multi_letter_tokens:
            shown = ", ".join(f"`{name}`" for name in self.letters.multi_letter_tokens[:MAX_SHOWN])
            what = (
                "the vocabulary has tokens of several letters, which transcripts are not divided "
            )
            self.notes.append(f"{what}into: {shown}")

    def _learn_letters(self, splits: dict[str, Rows]) -> None:
        """Take the vocabulary from the train split, and note letters of any split that it lacks."""
        column = self.spec.text_column
        if self._known_letters is None:
            if "train" not in splits:  # a streamed data set, which `read_tokenizer` rejects
                return
            letters = previous_letters(self.recipe) or letters_of(
                str(row[column]) for row in splits["train"]
            )
            self.learned.task["letters"] = letters
            self._set_vocabulary(letters)
        known = str(self._known_letters)
        self.notes.append(
            f"a new vocabulary of {counted(len(known), 'letter')}, `{known}`, and an output layer "
            "for it, which is trained in full"
        )
        if self.letters.is_lower_case:
            self.notes.append("transcripts are read in lower case, as the model will write them")
        for name, rows in splits.items():
            texts = [self.letters.normalise(str(row[column])) for row in rows]
            missing = {c for text in texts for c in text if c not in self.letters.ids}
            if missing:
                shown = " ".join(sorted(missing)[:MAX_SHOWN])
                n_rows = sum(not missing.isdisjoint(text) for text in texts)
                where = counted(n_rows, f"{name} transcript")
                self.notes.append(
                    f"letters of {where} that the vocabulary lacks are {UNKNOWN}: {shown}"
                )

    def reference(self, row: dict[str, Any]) -> str:
        """Return a row's transcript, normalised to the vocabulary."""
        return self.letters.normalise(str(row[self.spec.text_column]))

    def tokens_of(self, text: str) -> list[int]:
        """Return the token ids of a transcript."""
        return self.letters.tokens_of(text)

    def marked(self, labels: Sequence[int], colour: bool) -> str:
        """Return a transcript's tokens as text; decoding would collapse repeated letters."""
        names = self.tokenizer.convert_ids_to_tokens(list(labels))
        text = "".join(names).replace(self.tokenizer.word_delimiter_token, " ")
        return f"{GREEN}{text}{PLAIN}" if colour else f"⟦{text}⟧"
