"""Base class of text-to-speech: columns, checks, examples and batches.

`TextToSpeech` adds the model, its loss and synthesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name for it
from torch import Tensor
from transformers.models.speecht5.modeling_speecht5 import shift_spectrograms_right

from lora_cli.data.file_formats import text_error
from lora_cli.data.load_rows import Rows
from lora_cli.data.media import media_name
from lora_cli.data.recordings import (
    Samples,
    playable_url,
    read_recording,
    recording_facts,
    require_audio_packages,
)
from lora_cli.errors import LoraError, counted
from lora_cli.models.feature_extractor import load_feature_extractor, require_speecht5_features
from lora_cli.models.image_processor import processor_hash
from lora_cli.models.vocoder import vocoder_config
from lora_cli.recipe import Recipe, TextToSpeechSpec
from lora_cli.recipe.spec.text_to_speech_spec import SPEAKER_FILE, ZEROS
from lora_cli.tasks.examples import MAIN, Batch, Example, Field
from lora_cli.tasks.generation.writing_task import keep_all_layers, layer_drop_of
from lora_cli.tasks.speech.odd_recordings import (
    ODD_FEATURES,
    odd_facts,
    odd_rows,
    recording_error,
    require_readable,
)
from lora_cli.tasks.speech.speakers import (
    SpeakerError,
    Vector,
    load_vector,
    parse_vector,
)
from lora_cli.tasks.speech.spectrogram_loss import ATTENTION, STOP, attention_guide, guided_heads
from lora_cli.tasks.speech.speecht5 import (
    FRAME_MASK,
    FRAMES,
    IDS,
    PRENET_MASK,
    SPEAKER,
    decoder_steps,
    sample_prenet_mask,
)
from lora_cli.tasks.texts.marked_tokens import marked
from lora_cli.tasks.texts.text_task import TextTask

ENCODING = 1  # version of the encoding of rows; increasing it invalidates cached examples
PADDING = -100.0  # of spectrograms, as transformers marks it
PLAYED_SECONDS = 30.0  # of each recording in the report
TRIAL_TOKENS, TRIAL_FRAMES = (5, 24), (9, 40)  # lengths of the examples in trials


class SpokenTexts(TextTask):
    """A task whose rows hold a text, a speaker embedding, and a recording of the text."""

    spec: TextToSpeechSpec  # type: ignore[assignment]  # its length is that of a recording
    unit = "frame"
    length_key = "model.name"
    can_fill_left = False
    fixed_speaker: Vector | None = None
    """The speaker embedding of all rows, if the recipe names one (D,)."""

    def __init__(self, recipe: Recipe, spec: TextToSpeechSpec) -> None:
        super().__init__(recipe)
        self.spec = spec
        self.extractor: Any

    # --------------------------------------------------------------------- the processor

    def load_processor(self) -> None:
        """Load the tokenizer, the feature extractor, the configurations, and the speaker."""
        require_audio_packages()
        super().load_processor()
        self.extractor = load_feature_extractor(self.recipe)
        require_speecht5_features(self.extractor, self.config, self.recipe)
        if self.spec.vocoder is not None:
            vocoder_config(self.recipe, self.spec.vocoder, self.n_bands, self.rate)
        self.fixed_speaker = self._read_speaker()
        if dropped := layer_drop_of(self.config):
            self.notes.append(dropped)

    def _read_speaker(self) -> Vector | None:
        """Return the speaker embedding of all rows; None if each row has its own.

        Raises:
            LoraError: If the recipe names neither a column nor a file, or the file cannot be used.
        """
        file = self.spec.speaker_embedding
        if file is None and self.spec.speaker_column is None:
            hint = "name the column of the speakers' vectors, or a file with one vector with "
            hint += f"`task.speaker_embedding: speaker.npy`; `{ZEROS}` is no speaker"
            at = self.recipe.at("task.speaker_column")
            raise LoraError("nothing says who speaks", at, hint)
        if file == ZEROS:
            return np.zeros(self.speaker_size, dtype=np.float32)
        backup = None if self.trained_in is None else self.trained_in / SPEAKER_FILE
        return None if file is None else load_vector(self.recipe, file, backup, self.speaker_size)

    def model_config(self) -> Any:
        """Return the model's configuration, without LayerDrop."""
        return keep_all_layers(super().model_config())

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Save the tokenizer, the feature extractor and the speaker embedding to a folder."""
        super().save_processor(folder, facts)
        self.extractor.save_pretrained(folder)
        if self.fixed_speaker is not None and self.spec.speaker_embedding != ZEROS:
            np.save(folder / SPEAKER_FILE, self.fixed_speaker)

    @property
    def base_facts(self) -> dict[str, Any]:
        """The properties of the base, besides its tensors, that determine the computation."""
        return {**super().base_facts, "processor": processor_hash(self.extractor)}

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row itself."""
        speaker = "" if self.fixed_speaker is None else self.fixed_speaker.tobytes().hex()
        keys = [f"spoken texts {ENCODING}", processor_hash(self.extractor), speaker]
        return [*super().cache_key(), *keys]

    @property
    def rate(self) -> int:
        """The sampling rate of the recordings that spectrograms are computed from, in Hz."""
        return int(self.extractor.sampling_rate)

    @property
    def n_bands(self) -> int:
        """The number of mel bands of a spectrogram."""
        return int(self.config.num_mel_bins)

    @property
    def speaker_size(self) -> int:
        """The length of a speaker embedding."""
        return int(self.config.speaker_embedding_dim)

    @property
    def positions(self) -> int:
        """The maximum number of tokens of a text."""
        return int(self.config.max_text_positions)

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """The maximum number of spectrogram frames."""
        return int(self.config.max_speech_positions) * int(self.config.reduction_factor)

    @property
    def length_note(self) -> str | None:
        """None, as the length is the model's own."""
        return None

    @property
    def longer_hint(self) -> str:
        """What to do about recordings that are too long."""
        return "divide the recording, and its text with it"

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the fields of the text and the speaker (inputs) and the recording (target)."""
        fields = [Field("task.text_column", self.spec.text_column, "input", "text")]
        if (column := self.spec.speaker_column) is not None:
            fields.append(Field("task.speaker_column", column, "input", "number"))
        return [*fields, Field("task.audio_column", self.spec.audio_column, "target", "audio")]

    def compared_columns(self) -> list[str]:
        """Return the recording column alone, as rows may share a text."""
        return [self.spec.audio_column]

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the text or the speaker embedding, or an empty string."""
        if error := text_error(row, [self.spec.text_column]):
            return error
        if (column := self.spec.speaker_column) is not None:
            # rows are also checked if the model cannot be read
            size = getattr(getattr(self, "config", None), "speaker_embedding_dim", None)
            try:
                parse_vector(row.get(column), size)
            except SpeakerError as error:
                return f"column `{column}` {error}"
        return ""

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be synthesised, or an empty string."""
        return self.input_error(row) or self._text_length_error(self.tokens_of(row))

    def target_error(self, row: dict[str, Any]) -> str:
        """Decode the recording; return why it cannot be read, or an empty string."""
        return recording_error(row, self.spec.audio_column)

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token whose text is in the row's text, or None."""
        return self.control_tokens.first_in([row.get(self.spec.text_column)])

    def text_of(self, row: dict[str, Any]) -> str:
        """Return the text of a row on one line."""
        return " ".join(str(row[self.spec.text_column]).split())

    def tokens_of(self, row: dict[str, Any]) -> list[int]:
        """Return the token ids of a row's text, with the end token."""
        text = self.text_of(row)
        ids = self.text_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*ids, int(self.tokenizer.eos_token_id)]

    def speaker_vector(self, row: dict[str, Any]) -> Vector:
        """Return the speaker embedding of a row (D,)."""
        if self.spec.speaker_column is None:
            assert self.fixed_speaker is not None, "a speaker that was not read"
            return self.fixed_speaker
        return parse_vector(row[self.spec.speaker_column], self.speaker_size)

    def _text_length_error(self, ids: Sequence[int]) -> str:
        if len(ids) <= self.positions:
            return ""
        tokens = counted(len(ids), "token")
        return f"its text has {tokens}, and the model reads {self.positions:,} at most"

    # -------------------------------------------------------------------------- examples

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return an example for each row.

        Raises:
            LoraError: If a text or a recording is too long for the model.
        """
        return [[self._example(row)] for row in rows]

    def _example(self, row: dict[str, Any]) -> Example:
        value, ids = row[self.spec.audio_column], self.tokens_of(row)
        if error := self._text_length_error(ids):
            raise LoraError(error, hint=self.longer_hint)
        facts = recording_facts(value)
        hop = int(self.extractor.sample_stride)
        n_frames = 1 + int(facts.seconds * self.rate) // hop
        if n_frames > self.max_length:
            limit = self.max_length * hop / self.rate
            what = f"its recording lasts {facts.seconds:.1f} s, and the model says {limit:.1f} s "
            raise LoraError(f"{what}at most", hint=self.longer_hint)
        speaker = self.speaker_vector(row).tolist()
        fields = {"n_frames": n_frames, **odd_facts(facts)}
        return {"audio": value, IDS: ids, SPEAKER: speaker, **fields}

    def features(self) -> dict[str, str]:
        """Return the types of an example's fields."""
        lists = {IDS: "list<int32>", SPEAKER: "list<float32>"}
        return {"audio": "media", **lists, "n_frames": "int32", **ODD_FEATURES}

    def cost(self, example: Example) -> int:
        """Return the number of frames of an example's spectrogram."""
        return int(example["n_frames"])

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return a warning about unknown characters and odd recordings."""
        share, unknown = super().unknown_input(name, rows, examples)
        odd = odd_rows(name, rows, examples, self.spec.audio_column, self.spec.text_column)
        return share, "; ".join(filter(None, (unknown, odd))) or None

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return a description of an example's recording, and its text as the model reads it."""
        facts, ids = recording_facts(example["audio"]), list(example[IDS])
        description = (
            f"{media_name(example['audio'])}: {facts.seconds:.2f} s at {facts.rate:,} Hz, "
        )
        description += counted(facts.channels, "channel")
        text = marked(self.tokenizer, ids, [False] * len(ids), colour)
        return [f"text {counted(len(ids), 'token')}"], f"{description}\n{text}"

    def shown_input(self, row: dict[str, Any]) -> str:
        """Return the text of a row."""
        return self.text_of(row)

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a row's recording as a `data:` URL that a page can play."""
        return playable_url(row[self.spec.audio_column], PLAYED_SECONDS)

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with its spectrogram and the pre-net's dropout mask."""
        with require_readable(example["audio"]):
            samples = read_recording(example["audio"], self.rate)
        mel = self.spectrogram(samples)[: self.max_length]
        return {**example, "mel": mel, PRENET_MASK: self._prenet_mask(len(mel), rng)}

    def _prenet_mask(self, n_frames: int, rng: np.random.Generator) -> Tensor:
        return sample_prenet_mask(self.config, decoder_steps(n_frames, self.config), rng)

    def spectrogram(self, samples: Samples) -> Tensor:
        """Return the log-mel spectrogram (log10) of a recording (T, M)."""
        features = self.extractor(audio_target=samples, sampling_rate=self.rate)["input_values"]
        return torch.from_numpy(np.ascontiguousarray(features[0], dtype=np.float32))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Collate examples into a batch, padded to the longest text and the longest recording.

        Frames are padded to a whole number of decoder steps.
        """
        factor = int(self.config.reduction_factor)
        texts, mels = [one[IDS] for one in examples], [one["mel"] for one in examples]
        lengths = torch.tensor([len(mel) for mel in mels])
        steps = torch.tensor([decoder_steps(len(mel), self.config) for mel in mels])
        n_steps = -(-int(steps.max()) // self.pad_multiple) * self.pad_multiple
        n_frames = n_steps * factor
        padded = [F.pad(mel, (0, 0, 0, n_frames - len(mel)), value=PADDING) for mel in mels]
        labels = torch.stack(padded)
        decoder_inputs, _ = shift_spectrograms_right(labels, factor)
        frame = torch.arange(n_frames)
        inputs = self.inputs_of({IDS: texts}, {IDS: int(self.config.pad_token_id)})
        masks = [one[PRENET_MASK] for one in examples]
        masks = [F.pad(mask, (0, 0, 0, n_steps - mask.shape[1])) for mask in masks]
        speakers = [torch.tensor(np.asarray(one[SPEAKER], dtype=np.float32)) for one in examples]
        inputs |= {
            FRAMES: decoder_inputs, PRENET_MASK: torch.stack(masks), SPEAKER: torch.stack(speakers),
            FRAME_MASK: frame < factor * steps[:, None],
        }  # fmt: skip
        trained = frame < lengths[:, None]
        targets = {
            "mel": labels.masked_fill(~trained[..., None], 0.0), "trained": trained,
            "ends": (frame == lengths[:, None] - 1).float(),
            "last_step": steps - 1,
        }  # fmt: skip
        items = {MAIN: lengths.float() * self.n_bands, STOP: lengths.float()}
        if self.config.use_guided_attention_loss:
            guides, counts = self._attention_guides(texts, lengths, inputs[IDS], n_steps)
            targets["guide"], items[ATTENTION] = guides, counts
        cost = int(lengths.sum())
        return Batch(inputs, targets, items, cost, [one["row"] for one in examples])

    def _attention_guides(
        self, texts: Sequence[Sequence[int]], lengths: Tensor, ids: Tensor, n_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Return the attention penalties (B, S, L), and the number of attention weights (B,)."""
        guides = torch.zeros(len(texts), n_steps, ids.shape[1])
        # only steps whose frames are all trained are guided
        whole_steps = (lengths // int(self.config.reduction_factor)).tolist()
        for i, (text, n) in enumerate(zip(texts, whole_steps, strict=True)):
            guides[i, :n, : len(text)] = attention_guide(len(text), n, self.config)
        heads = guided_heads(self.config)
        counts = [heads * n * len(text) for text, n in zip(texts, whole_steps, strict=True)]
        return guides, torch.tensor(counts).float()

    # ------------------------------------------------------------------------------ trials

    def output_length(self, example: Example) -> int:
        """Return the number of frames that the model generates for an example."""
        return len(example["mel"])

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short and a longer text with recordings of noise, to try the model on."""
        rng = np.random.default_rng(0)
        size, examples = int(self.config.vocab_size), []
        for n_tokens, n_frames in zip(TRIAL_TOKENS, TRIAL_FRAMES, strict=True):
            frames = min(n_frames, self.max_length)
            mel = torch.from_numpy(rng.normal(-2, 1, (frames, self.n_bands)).astype(np.float32))
            examples.append({
                IDS: rng.integers(0, size, min(n_tokens, self.positions)).tolist(), "mel": mel,
                SPEAKER: rng.normal(size=self.speaker_size), "row": 0, "n_frames": frames,
                PRENET_MASK: self._prenet_mask(frames, rng),
            })  # fmt: skip
        return examples[0], examples[1]

    def probe(self) -> dict[str, Tensor]:
        """Return inputs of random texts and recordings, the same on every call."""
        batch = self.collate(self.trial_examples(TRIAL_FRAMES[1]))
        return dict(batch.inputs)
