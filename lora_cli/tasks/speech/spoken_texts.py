"""What a text and its recording are, where the model learns to speak: columns, checks, batches.

`TextToSpeech` adds the model, its loss and what it says.
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
from lora_cli.data.media import described
from lora_cli.data.recordings import (
    Samples,
    playable,
    read_recording,
    recording_facts,
    require_audio_packages,
)
from lora_cli.errors import LoraError, counted
from lora_cli.models.feature_extractor import load_feature_extractor, require_bands_of
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
    still_whole,
)
from lora_cli.tasks.speech.speakers import (
    SpeakerError,
    Vector,
    read_vector,
    vector_of,
)
from lora_cli.tasks.speech.spectrogram_loss import ATTENTION, STOP, guide, guided_heads
from lora_cli.tasks.speech.speecht5 import (
    FRAMES,
    IDS,
    INSIDE,
    KEPT,
    SPEAKER,
    decoder_steps,
    draw_kept,
)
from lora_cli.tasks.texts.marked_tokens import marked
from lora_cli.tasks.texts.text_task import TextTask

ENCODING = 1  # of rows into examples; a change of it makes what is kept on the disk useless
MASKED = -100.0  # what fills a spectrogram, as transformers marks it
HEARD_SECONDS = 30.0  # of a recording that the report plays
TRIAL_TOKENS, TRIAL_FRAMES = (5, 24), (9, 40)  # of the texts that the model is tried on


class SpokenTexts(TextTask):
    """A task whose rows are a text, who speaks, and a recording of it."""

    spec: TextToSpeechSpec  # type: ignore[assignment]  # its length is that of a recording
    unit = "frame"
    length_key = "model.name"
    can_fill_left = False
    fixed: Vector | None = None
    """The speaker of all rows, if the recipe names one."""

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
        require_bands_of(self.extractor, self.config, self.recipe)
        if self.spec.vocoder is not None:
            vocoder_config(self.recipe, self.spec.vocoder, self.n_bands, self.rate)
        self.fixed = self._read_speaker()
        if dropped := layer_drop_of(self.config):
            self.notes.append(dropped)

    def _read_speaker(self) -> Vector | None:
        """Return the speaker of all rows; None where each row has its own.

        Raises:
            LoraError: If nothing says who speaks, or the file cannot be used.
        """
        file = self.spec.speaker_embedding
        if file is None and self.spec.speaker_column is None:
            hint = "name the column of the speakers' vectors, or a file with one vector with "
            hint += f"`task.speaker_embedding: speaker.npy`; `{ZEROS}` is no speaker"
            at = self.recipe.at("task.speaker_column")
            raise LoraError("nothing says who speaks", at, hint)
        if file == ZEROS:
            return np.zeros(self.speaker_size, dtype=np.float32)
        copy = None if self.trained_in is None else self.trained_in / SPEAKER_FILE
        return None if file is None else read_vector(self.recipe, file, copy, self.speaker_size)

    def model_config(self) -> Any:
        """Return the model's configuration, by which training leaves no layer out."""
        return keep_all_layers(super().model_config())

    def save_processor(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Write the tokenizer, the feature extractor and the speaker into a folder."""
        super().save_processor(folder, facts)
        self.extractor.save_pretrained(folder)
        if self.fixed is not None and self.spec.speaker_embedding != ZEROS:
            np.save(folder / SPEAKER_FILE, self.fixed)

    @property
    def base_facts(self) -> dict[str, Any]:
        """What of the base decides the computation besides its tensors."""
        return {**super().base_facts, "processor": processor_hash(self.extractor)}

    def cache_key(self) -> list[str]:
        """Return what an encoded row depends on besides the row."""
        speaker = "" if self.fixed is None else self.fixed.tobytes().hex()
        own = [f"spoken texts {ENCODING}", processor_hash(self.extractor), speaker]
        return [*super().cache_key(), *own]

    @property
    def rate(self) -> int:
        """Samples a second that spectrograms are made of."""
        return int(self.extractor.sampling_rate)

    @property
    def n_bands(self) -> int:
        """Numbers of a frame of a spectrogram."""
        return int(self.config.num_mel_bins)

    @property
    def speaker_size(self) -> int:
        """Numbers that describe who speaks."""
        return int(self.config.speaker_embedding_dim)

    @property
    def positions(self) -> int:
        """Tokens of a text that the model has positions for."""
        return int(self.config.max_text_positions)

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """Frames of a recording that the model has positions for."""
        return int(self.config.max_speech_positions) * int(self.config.reduction_factor)

    @property
    def length_note(self) -> str | None:
        """Nothing: the length is the model's own."""
        return None

    @property
    def longer_hint(self) -> str:
        """What to do where recordings are too long."""
        return "divide the recording, and its text with it"

    # ------------------------------------------------------------------------------ rows

    def fields(self) -> list[Field]:
        """Return the columns of the text, of who speaks, and of the recording."""
        found = [Field("task.text_column", self.spec.text_column, "input", "text")]
        if (column := self.spec.speaker_column) is not None:
            found.append(Field("task.speaker_column", column, "input", "number"))
        return [*found, Field("task.audio_column", self.spec.audio_column, "target", "audio")]

    def compared_columns(self) -> list[str]:
        """Return the recording's column: the same words are said more than once."""
        return [self.spec.audio_column]

    def input_error(self, row: dict[str, Any]) -> str:
        """Return what is wrong with the text or with who speaks, or nothing."""
        if error := text_error(row, [self.spec.text_column]):
            return error
        if (column := self.spec.speaker_column) is not None:
            # rows are also checked where the model could not be read
            size = getattr(getattr(self, "config", None), "speaker_embedding_dim", None)
            try:
                vector_of(row.get(column), size)
            except SpeakerError as error:
                return f"column `{column}` {error}"
        return ""

    def answer_error(self, row: dict[str, Any]) -> str:
        """Return why a row cannot be said, or nothing."""
        return self.input_error(row) or self._text_length_error(self.tokens_of(row))

    def target_error(self, row: dict[str, Any]) -> str:
        """Return why the recording cannot be read, or nothing; it is decoded."""
        return recording_error(row, self.spec.audio_column)

    def control_token_in(self, row: dict[str, Any]) -> str | None:
        """Return the first control token that is spelled out in a text."""
        return self.control_tokens.first_in([row.get(self.spec.text_column)])

    def text_of(self, row: dict[str, Any]) -> str:
        """Return the text of a row, on one line."""
        return " ".join(str(row[self.spec.text_column]).split())

    def tokens_of(self, row: dict[str, Any]) -> list[int]:
        """Return a text's tokens, with the one that ends it."""
        text = self.text_of(row)
        ids = self.text_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*ids, int(self.tokenizer.eos_token_id)]

    def vector_of_row(self, row: dict[str, Any]) -> Vector:
        """Return who speaks in a row (D,)."""
        if self.spec.speaker_column is None:
            assert self.fixed is not None, "a speaker that was not read"
            return self.fixed
        return vector_of(row[self.spec.speaker_column], self.speaker_size)

    def _text_length_error(self, ids: Sequence[int]) -> str:
        if len(ids) <= self.positions:
            return ""
        tokens = counted(len(ids), "token")
        return f"its text has {tokens}, and the model reads {self.positions:,} at most"

    # -------------------------------------------------------------------------- examples

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Example]]:
        """Return an example for each row.

        Raises:
            LoraError: If a text or a recording is longer than the model has positions for.
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
            most = self.max_length * hop / self.rate
            what = f"its recording lasts {facts.seconds:.1f} s, and the model says {most:.1f} s "
            raise LoraError(f"{what}at most", hint=self.longer_hint)
        speaker = self.vector_of_row(row).tolist()
        about = {"n_frames": n_frames, **odd_facts(facts)}
        return {"audio": value, IDS: ids, SPEAKER: speaker, **about}

    def features(self) -> dict[str, str]:
        """Return the types of an example."""
        lists = {IDS: "list<int32>", SPEAKER: "list<float32>"}
        return {"audio": "media", **lists, "n_frames": "int32", **ODD_FEATURES}

    def cost(self, example: Example) -> int:
        """Return the frames of an example's spectrogram."""
        return int(example["n_frames"])

    def unknown_input(self, name: str, rows: Rows, examples: Any) -> tuple[float, str | None]:
        """Return warnings of letters that the model does not know, and of odd recordings."""
        share, unknown = super().unknown_input(name, rows, examples)
        odd = odd_rows(name, rows, examples, self.spec.audio_column, self.spec.text_column)
        return share, "; ".join(filter(None, (unknown, odd))) or None

    def shown(self, example: Example, colour: bool) -> tuple[list[str], str]:
        """Return the recording of an example, and what the model reads of its text."""
        facts, ids = recording_facts(example["audio"]), list(example[IDS])
        about = f"{described(example['audio'])}: {facts.seconds:.2f} s at {facts.rate:,} Hz, "
        about += counted(facts.channels, "channel")
        text = marked(self.tokenizer, ids, [False] * len(ids), colour)
        return [f"text {counted(len(ids), 'token')}"], f"{about}\n{text}"

    def shown_input(self, row: dict[str, Any]) -> str:
        """Return the text of a row."""
        return self.text_of(row)

    def thumbnail(self, row: dict[str, Any]) -> str | None:
        """Return a row's recording as a `data:` address that a page plays."""
        return playable(row[self.spec.audio_column], HEARD_SECONDS)

    def prepare(self, example: Example, rng: np.random.Generator, training: bool) -> Example:
        """Return an example with its spectrogram, and with what the pre-net keeps of it."""
        with still_whole(example["audio"]):
            samples = read_recording(example["audio"], self.rate)
        mel = self.spectrogram(samples)[: self.max_length]
        return {**example, "mel": mel, KEPT: self._kept(len(mel), rng)}

    def _kept(self, n_frames: int, rng: np.random.Generator) -> Tensor:
        return draw_kept(self.config, decoder_steps(n_frames, self.config), rng)

    def spectrogram(self, samples: Samples) -> Tensor:
        """Return the log-mel spectrogram (log10) of a recording (T, M)."""
        found = self.extractor(audio_target=samples, sampling_rate=self.rate)["input_values"]
        return torch.from_numpy(np.ascontiguousarray(found[0], dtype=np.float32))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Return the examples as one batch, filled to the longest text and the longest recording.

        A recording's frames are filled to a whole number of the decoder's steps.
        """
        factor = int(self.config.reduction_factor)
        texts, mels = [one[IDS] for one in examples], [one["mel"] for one in examples]
        lengths = torch.tensor([len(mel) for mel in mels])
        steps = torch.tensor([decoder_steps(len(mel), self.config) for mel in mels])
        n_steps = -(-int(steps.max()) // self.pad_multiple) * self.pad_multiple
        fill = [(0, 0, 0, n_steps * factor - len(mel)) for mel in mels]
        labels = torch.stack([F.pad(m, f, value=MASKED) for m, f in zip(mels, fill, strict=True)])
        heard, _ = shift_spectrograms_right(labels, factor)
        place = torch.arange(n_steps * factor)
        inputs = self.inputs_of({IDS: texts}, {IDS: int(self.config.pad_token_id)})
        kept = [F.pad(one[KEPT], (0, 0, 0, n_steps - one[KEPT].shape[1])) for one in examples]
        speakers = [torch.tensor(np.asarray(one[SPEAKER], dtype=np.float32)) for one in examples]
        inputs |= {
            FRAMES: heard, KEPT: torch.stack(kept), SPEAKER: torch.stack(speakers),
            INSIDE: place < factor * steps[:, None],
        }  # fmt: skip
        trained = place < lengths[:, None]
        targets = {
            "mel": labels.masked_fill(~trained[..., None], 0.0), "trained": trained,
            "ends": (place == lengths[:, None] - 1).float(),
            "last_step": steps - 1,
        }  # fmt: skip
        items = {MAIN: lengths.float() * self.n_bands, STOP: lengths.float()}
        if self.config.use_guided_attention_loss:
            targets["guide"], items[ATTENTION] = self._guides(texts, lengths, inputs[IDS], n_steps)
        cost = int(lengths.sum())
        return Batch(inputs, targets, items, cost, [one["row"] for one in examples])

    def _guides(
        self, texts: Sequence[Sequence[int]], lengths: Tensor, ids: Tensor, n_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Return how far attentions are from where speech would be (B, S, L), and their number."""
        found = torch.zeros(len(texts), n_steps, ids.shape[1])
        whole = (
            lengths // int(self.config.reduction_factor)
        ).tolist()  # steps that are all trained
        for i, (text, own) in enumerate(zip(texts, whole, strict=True)):
            found[i, :own, : len(text)] = guide(len(text), own, self.config)
        heads = guided_heads(self.config)
        counts = [heads * own * len(text) for text, own in zip(texts, whole, strict=True)]
        return found, torch.tensor(counts).float()

    # ------------------------------------------------------------------------------ trials

    def output_length(self, example: Example) -> int:
        """Return how many frames of an example the model says."""
        return len(example["mel"])

    def trial_examples(self, length: int) -> tuple[Example, Example]:
        """Return a short and a longer text with recordings of noise, to try the model on."""
        rng = np.random.default_rng(0)
        size, found = int(self.config.vocab_size), []
        for n_tokens, n_frames in zip(TRIAL_TOKENS, TRIAL_FRAMES, strict=True):
            frames = min(n_frames, self.max_length)
            mel = torch.from_numpy(rng.normal(-2, 1, (frames, self.n_bands)).astype(np.float32))
            found.append({
                IDS: rng.integers(0, size, min(n_tokens, self.positions)).tolist(), "mel": mel,
                SPEAKER: rng.normal(size=self.speaker_size), KEPT: self._kept(frames, rng),
                "row": 0, "n_frames": frames,
            })  # fmt: skip
        return found[0], found[1]

    def probe(self) -> dict[str, Tensor]:
        """Return texts with recordings of noise, the same every time."""
        batch = self.collate(self.trial_examples(TRIAL_FRAMES[1]))
        return dict(batch.inputs)
