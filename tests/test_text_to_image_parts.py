"""Tests of the parts of a text-to-image step: preparing, collating, denoising, losses."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lora_cli.errors import LoraError
from lora_cli.recipe import Recipe
from lora_cli.tasks.diffusion import caption_rows, captioned_pictures
from lora_cli.tasks.diffusion.check_settings import check_keys
from lora_cli.tasks.diffusion.diffusion_noise import DiffusionNoise
from lora_cli.tasks.diffusion.drawing import picture_name
from lora_cli.tasks.diffusion.flow_noise import FlowNoise
from lora_cli.tasks.examples import Batch, Prediction
from lora_cli.tasks.text_to_image import TextToImage, _dtype_of, _groups_by_size, _unflatten

ANY_SHAPE = {"aspect_ratios": True, "max_aspect_ratio": 4.0}
LENGTH = 4  # tokens that the first text encoder reads; the second reads one more


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str, max_length: int = 99, padding: str = "", **_: Any) -> Any:
        ids = [ord(letter) for letter in text][:max_length]
        return {"input_ids": ids + [0] * (max_length - len(ids) if padding else 0)}


class Noise:
    """A noise schedule with simple formulas."""

    steps = 100

    def sample_step(self, rng: np.random.Generator) -> int:
        return int(rng.integers(50, 100))

    def validation_step(self, rng: np.random.Generator, index: int, n_draws: int) -> int:
        return 10 * index + n_draws

    def times(self, steps: Tensor) -> Tensor:
        return 1000.0 - steps

    def noised(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return latents + noise * steps.view(-1, 1, 1, 1)

    def target(self, latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        return noise - latents

    def weights(self, steps: Tensor) -> Tensor | None:
        return steps / 10.0


class Vae(nn.Module):
    """An autoencoder: a latent's mean is that of 2 x 2 pixels, its log-variance twice that."""

    dtype = torch.float64

    def encode(self, pixels: Tensor) -> Any:
        assert pixels.dtype == torch.float64
        mean = nn.functional.avg_pool2d(pixels, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.cat([mean, 2 * mean],
                                                                                1)))  # fmt: skip


def make_task(
    texts: int = 2, prior: bool = False, family: dict[str, Any] | None = None, **values: Any
) -> Any:
    """Return a task whose base has a fake denoiser and fake text encoders."""
    sections: dict[str, Any] = {
        "model": {"name": "base"},
        "task": {"type": "text_to_image", "resolution": 16},
        "data": {"path": "rows.csv"},
    }
    if prior:
        sections["task"]["prior"] = {"path": "class", "caption": "dog", "weight": 0.5}
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        sections.setdefault(section or "task", {})[name] = value
    recipe = Recipe.model_validate(sections)
    task: Any = TextToImage(recipe, recipe.task)  # type: ignore[arg-type]
    names = ("text_encoder", "text_encoder_2")[:texts]

    def of_texts(parts: dict[str, Any], ids: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        assert tuple(parts) == names
        assert all(parts[name] == f"the {name}" for name in names)
        states = torch.cat([example.float() for example in ids], -1)[..., None]
        return states, states.sum((1, 2))[:, None] if texts == 2 else None

    def denoised(denoiser: Any, noisy: Tensor, times: Tensor, conditions: Any) -> Tensor:
        task.denoiser_call = denoiser, times, conditions
        return noisy + times.view(-1, 1, 1, 1) + conditions.texts[0].sum((1, 2)).view(-1, 1, 1, 1)

    defaults = {
        "name": "Kind", "uses_flow_matching": False, "optional": (), "never_adapted": (),
        "reads_guidance": False, "has_negative_prompt": True, "has_sizes": False, "divisor": 8,
        "pixels_per_latent": 2, "longest_side": None, "denoiser": "unet", "texts": of_texts,
        "denoised": denoised, "sampling_defaults": {"guidance_scale": 3.5},
        "token_limit": lambda name, _: LENGTH + (name == "text_encoder_2"),
    }  # fmt: skip
    task.base = SimpleNamespace(
        family=SimpleNamespace(**{**defaults, **(family or {})}), text_encoders=names,
        latent_channels=3, configs={"vae": {"scaling_factor": 0.5}}, left_out=(),
    )  # fmt: skip
    task.tokenizers, task.noise = [Letters()] * texts, Noise()
    return task


class Model:
    """A model whose parts are found by name."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.unet, self.vae = nn.Linear(1, 1).to(dtype), Vae()

    def get_submodule(self, name: str) -> Any:
        return getattr(self, name, f"the {name}")


MODEL: Any = Model()


def make_image(width: int = 16, height: int = 16, name: str | None = None) -> dict[str, Any]:
    """Return an image whose colours encode the position."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 9 % 256, columns * 6 % 256, rows + columns], -1).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": name}


def make_example(task: Any, row: int = 0, caption: str = "a b", **image: Any) -> dict[str, Any]:
    (example,) = task.encode_to_train([{"image": make_image(**image), "text": caption}])[0]
    return {**example, "row": row}


# ------------------------------------------------------------------------------- rows and examples


@pytest.mark.parametrize(
    ("text", "ids", "is_cut"),
    [
        ("ab", [[97, 98, 0, 0], [97, 98, 0, 0, 0]], False),
        ("abcd", [[97, 98, 99, 100], [97, 98, 99, 100, 0]], False),
        (
            "abcde",
            [[97, 98, 99, 100], [97, 98, 99, 100, 101]],
            False,
        ),  # the second encoder reads all of it
        ("abcdef", [[97, 98, 99, 100], [97, 98, 99, 100, 101]], True),
    ],
)
def test_captions_are_padded_and_truncated_for_each_text_encoder(
    text: str, ids: list[list[int]], is_cut: bool
) -> None:
    task = make_task()
    assert task.token_limits == [4, 5]
    assert task.ids_of(text) == ids
    assert task.is_cut(text) == is_cut


def test_notes_count_truncated_texts() -> None:
    task = make_task(validation_prompts=["ab", "abcdefg", "abcdef"])
    task.note_cut_prompts()
    assert task.notes == [
        "warning: 2 texts have more than 5 tokens, of which the model reads the first: "
        "task.validation_prompts.1, task.validation_prompts.2"
    ]
    task = make_task(prior=True)
    task.note_cut_prompts()
    assert task.notes == []
    assert task.cut_note_of(1, "text") == (
        "1 text has more than 5 tokens, of which the model reads the first"
    )
    task.n_cut_prompts = 3
    assert task.take_warnings() == [task.cut_note_of(3, "text")]
    assert task.take_warnings() == []


def test_each_validation_draw_is_an_example() -> None:
    task = make_task(validation_draws=3)
    row = {"image": make_image(20, 18), "text": " a \n b "}
    (examples,) = task.encode([row])
    assert [example["draw"] for example in examples] == [0, 1, 2]
    for example in examples:
        assert (example["width"], example["height"], example["caption"]) == (16, 16, "a b")
        assert example["ids_0"] == task.ids_of("a b")[0]
        assert example["ids_1"] == task.ids_of("a b")[1]
        assert example["is_cut"] is False
        assert set(example) <= set(task.features())
    (training_examples,) = task.encode_to_train([row])
    assert [example["draw"] for example in training_examples] == [0]
    task = make_task(caption="x")
    assert task.caption_of({"text": "y"}) == "x"


def test_subject_images_are_paired_with_class_images() -> None:
    task = make_task(prior=True)
    rows = [{"image": make_image(16, 16 + i), "text": "a"} for i in range(2)]
    task.prior.pictures = [make_image(30 + i, 30) for i in range(3)]
    task.prior.read = lambda error_of: None
    task.learn_from({"train": [*rows, rows[0]]})
    assert list(task.positions.values()) == [0, 1]
    examples = task.encode_to_train([*rows, rows[0]])
    pictures = [[example["prior_image"] for example in row_examples] for row_examples in examples]
    indices = [[task.prior.pictures.index(picture) for picture in row] for row in pictures]
    assert indices == [[0, 2], [1], [0, 2]]
    assert task.cost(examples[0][0]) == 2
    assert task.cost({"image": 1}) == 1
    assert task.train_features()["prior_image"] == "media"
    assert "prior_image" not in task.features()
    assert "prior_image" not in make_task().train_features()


def test_class_images_are_not_read_without_train_rows() -> None:
    task = make_task(prior=True)
    task.prior.read = lambda _: pytest.fail("nothing to number")
    task.learn_from({"test": []})
    make_task().learn_from({"train": []})
    assert task.positions == {}


def test_fields_and_columns() -> None:
    task = make_task()
    assert [(f.key, f.column, f.role, f.kind) for f in task.fields()] == [
        ("task.caption_column", "text", "input", "text"),
        ("task.image_column", "image", "target", "image"),
    ]
    assert sorted(task.needed_columns().values()) == ["image", "text"]
    assert sorted(make_task(caption="x").needed_columns().values()) == ["image"]
    assert sorted(make_task(caption="x").needed_columns(training=True).values()) == ["image"]
    assert task.compared_columns() == ["image"]
    assert task.shown_input({"text": " a  b "}) == "a b"
    facts, text = task.shown(make_example(task, width=20, height=18, name="x/a.png"), colour=False)
    assert (facts, text) == ([], "a.png: 20 x 18 pixels, seen as 16 x 16\na b")
    assert str(task.thumbnail({"image": make_image()})).startswith("data:image/")
    assert task.thumbnail({"image": {"bytes": b"x", "path": None}}) is None


def test_truncated_captions_are_counted_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    rows = SimpleNamespace(place=lambda i: f"rows:{i}")
    calls: list[Any] = []
    monkeypatch.setattr(caption_rows, "odd_pictures", lambda *args: calls.append(args) or None)
    monkeypatch.setattr(
        caption_rows,
        "positions_where",
        lambda examples, key: [i for i, make_example in enumerate(examples) if make_example[key]],
    )
    examples = [{"row": 0, "is_cut": False}, *[{"row": 2, "is_cut": True}] * 3,
                {"row": 5, "is_cut": True}]  # fmt: skip
    assert task.unknown_input("train", rows, examples) == (
        0.0, "2 train captions have more than 5 tokens, of which the model reads the first: rows:2",
    )  # fmt: skip
    assert calls == [("train", rows, examples)]
    assert task.unknown_input("train", rows, examples[:1]) == (0.0, None)
    monkeypatch.setattr(caption_rows, "odd_pictures", lambda *_: "odd")
    assert task.unknown_input("train", rows, examples[:1]) == (0.0, "odd")
    assert str(task.unknown_input("train", rows, examples)[1]).startswith("odd; 2 train captions")


@pytest.mark.parametrize(
    ("values", "size", "message"),
    [
        ({}, (16, 16), ""), ({}, (17, 30), ""),
        ({}, (15, 16), "has 15 x 16 pixels, and is seen as 16 x 16"),
        ({}, (16, 15), "has 16 x 15 pixels, and is seen as 16 x 16"),
        ({"upscale": True}, (15, 15), ""),
        (ANY_SHAPE, (32, 8), ""), (ANY_SHAPE, (8, 32), ""),
        (ANY_SHAPE, (8, 31), "has 8 x 31 pixels, and is seen as 8 x 32"),
    ],
)  # fmt: skip
def test_images_that_are_too_small_are_errors(
    values: dict[str, Any], size: tuple[int, int], message: str
) -> None:
    error = make_task(**values).picture_error(make_image(*size))
    assert message in error
    assert bool(error) == bool(message)


def test_errors_of_missing_captions_name_the_file(tmp_path: Path) -> None:
    task = make_task()
    with_path = make_image(name=str(tmp_path / "a.png"))
    (tmp_path / "a.png").write_bytes(with_path["bytes"])
    assert task.row_error({"image": with_path, "text": "b"}) == ""
    assert "`a.png` has no caption: write one into `a.txt`" in task.row_error({"image": with_path})
    (tmp_path / "a.txt").write_text("")
    assert "has an empty caption" in task.row_error({"image": with_path, "text": ""})
    assert "has no caption" in task.row_error({"image": with_path, "text": None})
    assert task.row_error({"image": make_image(), "text": " "}) != ""
    assert make_task(caption="x").row_error({"image": with_path}) == ""
    assert make_task(caption="x").row_error({"image": make_image(4, 4)}) != ""


# ------------------------------------------------------------------------------ prepared examples


def prepare(
    task: Any, example: dict[str, Any], seed: int = 0, training: bool = True
) -> dict[str, Any]:
    prepared: dict[str, Any] = task.prepare(dict(example), np.random.default_rng(seed), training)
    return prepared


def test_shapes_and_ranges_of_prepared_examples() -> None:
    task = make_task()
    first = prepare(task, make_example(task))
    assert first["noise"].shape == first["sampled"].shape == (1, 3, 8, 8)
    assert not torch.equal(first["noise"], first["sampled"])
    assert (first["dropped"], first["ids"]) == ([False], [task.ids_of("a b")])
    assert 50 <= first["steps"][0] < 100
    rows, columns = np.mgrid[0:16, 0:16]
    expected = np.stack([rows * 9, columns * 6, rows + columns]).astype(np.float32) / 127.5 - 1
    assert torch.allclose(first["pixels"][0], torch.from_numpy(expected))
    assert "sizes" not in first
    assert "sampled" not in prepare(make_task(latents="mean"), make_example(task))
    again = prepare(task, make_example(task))
    assert torch.equal(again["noise"], first["noise"])
    assert not torch.equal(prepare(task, make_example(task), 1)["noise"], first["noise"])


def test_random_numbers_come_from_the_generator_alone() -> None:
    task = make_task()
    prepared = prepare(task, make_example(task), 4)
    rng = np.random.default_rng(4)
    assert prepared["steps"] == [int(rng.integers(50, 100))]
    for key in ("noise", "sampled"):
        expected = rng.standard_normal((3, 8, 8), dtype=np.float32)
        assert torch.equal(prepared[key][0], torch.from_numpy(expected))
    draws_task = make_task(validation_draws=3)
    ((_, second, _),) = draws_task.encode([{"image": make_image(), "text": "a"}])
    prepared = prepare(draws_task, second, 4, training=False)
    draw_rng = np.random.default_rng(4).spawn(3)[1]
    expected = draw_rng.standard_normal((3, 8, 8), dtype=np.float32)
    assert torch.equal(prepared["noise"][0], torch.from_numpy(expected))


def test_validation_draws_differ_in_noise_and_timestep() -> None:
    task = make_task(validation_draws=3)
    (all_draws,) = task.encode([{"image": make_image(), "text": "a"}])
    prepared_draws = [prepare(task, example, 5, training=False) for example in all_draws]
    assert [example["steps"] for example in prepared_draws] == [[3], [13], [23]]
    assert len({float(example["noise"].sum()) for example in prepared_draws}) == 3
    again = prepare(task, all_draws[1], 5, training=False)
    assert torch.equal(again["noise"], prepared_draws[1]["noise"])


def test_noise_offset_is_constant_per_channel() -> None:
    example = make_example(make_task())
    plain, offset = prepare(make_task(), example), prepare(make_task(noise_offset=0.5), example)
    difference = offset["noise"] - plain["noise"]
    assert torch.allclose(difference, difference[..., :1, :1].expand_as(difference), atol=1e-5)
    first = difference[0, :, 0, 0]
    assert len({round(float(value), 4) for value in first}) == 3
    rng = np.random.default_rng(0)
    plain_noise = rng.standard_normal((3, 8, 8), dtype=np.float32)
    offsets = rng.standard_normal((3, 1, 1), dtype=np.float32)
    assert torch.allclose(make_task(noise_offset=0.5)._noise(np.random.default_rng(0), (3, 8, 8)),
                          torch.from_numpy(plain_noise + 0.5 * offsets))  # fmt: skip


@pytest.mark.parametrize(("share", "dropped"), [(0.0, False), (0.999, True)])
def test_captions_are_dropped_in_training_only(share: float, dropped: bool) -> None:
    task = make_task(caption_dropout=share)
    example = make_example(task)
    assert [prepare(task, example, s)["dropped"] for s in range(3)] == [[dropped]] * 3
    assert prepare(task, example, training=False)["dropped"] == [False]


def test_tags_are_shuffled_in_training_only() -> None:
    task = make_task(texts=1, shuffle_tags=True, family={"token_limit": lambda *_: 40})
    example = make_example(task, caption="a, b, c, d, e, f")
    captions = {
        "".join(map(chr, filter(None, prepare(task, example, s)["ids"][0][0]))) for s in range(9)
    }
    assert len(captions) > 3
    assert all(text.startswith("a, ") for text in captions)
    assert all(sorted(text.split(", ")) == list("abcdef") for text in captions)
    assert prepare(task, example, training=False)["ids"] == [task.ids_of("a, b, c, d, e, f")]


def test_class_images_have_their_own_noise_and_caption() -> None:
    task = make_task(prior=True)
    example = {**make_example(task), "prior_image": make_image(40, 16)}
    prepared = prepare(task, example)
    assert prepared["noise"].shape == (2, 3, 8, 8)
    assert prepared["pixels"].shape == (2, 3, 16, 16)
    assert prepared["ids"] == [task.ids_of("a b"), task.ids_of("dog")]
    assert len(prepared["steps"]) == len(prepared["dropped"]) == 2
    assert not torch.equal(prepared["noise"][0], prepared["noise"][1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("values", [{}, {"crop": "random"}, {"flip": True}])
def test_images_are_augmented_in_training_only(values: dict[str, Any], training: bool) -> None:
    task = make_task(family={"has_sizes": True}, **values)
    example = make_example(task, width=40, height=16)
    all_prepared = [prepare(task, example, seed, training) for seed in range(12)]
    distinct = {tuple(prepared["sizes"][0].tolist()) for prepared in all_prepared}
    pixels = {
        float((prepared["pixels"][0] * torch.arange(16.0)).sum()) for prepared in all_prepared
    }
    middle = (16, 40, 0, 12, 16, 16)  # original height and width, top, left, crop height and width
    if training and values.get("crop") == "random":
        assert len(distinct) > 3
        assert {(h, w, top) for h, w, top, *_ in distinct} == {(16, 40, 0)}
        assert len(pixels) > 3
    else:
        assert distinct == {middle}
        assert len(pixels) == (2 if training and "flip" in values else 1)


def test_crop_coordinates_of_flipped_images() -> None:
    task = make_task(family={"has_sizes": True}, crop="random", flip=True)
    value = make_image(41, 16)
    flips = set()
    for seed in range(20):
        image = task._prepare_image(value, (16, 16), np.random.default_rng(seed), False)
        left = image.sizes[3]
        # the second channel encodes the column
        columns = ((image.pixels[1, 0] + 1) * 127.5 / 6).round()
        mirrored = bool(columns[0] > columns[-1])
        flips.add(mirrored)
        first = columns[-1] if mirrored else columns[0]
        assert int(first) == (41 - 16 - left if mirrored else left)
    assert flips == {True, False}


def test_pixels_are_not_read_if_latents_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioned_pictures, "open_picture", lambda _: pytest.fail("not read"))
    task = make_task()
    prepared = prepare(task, {**make_example(task), "latents": torch.zeros(1)})
    assert not {"pixels", "sizes"} & prepared.keys()
    task = make_task(family={"has_sizes": True})
    prepared = prepare(task, {**make_example(task, width=40, height=18), "latents": torch.zeros(1)})
    assert "pixels" not in prepared
    assert prepared["sizes"].tolist() == [[18, 40, 0, 10, 16, 16]]


# ------------------------------------------------------------------------------- batches and losses


def make_batch(task: Any, *examples: dict[str, Any]) -> Batch:
    batch: Batch = task.collate(
        [{**prepare(task, example, i), "row": i} for i, example in enumerate(examples)]
    )
    return batch


def test_batches_are_grouped_by_image_size() -> None:
    task = make_task(aspect_ratios=True, max_aspect_ratio=4.0, texts=1)
    examples = [make_example(task, width=w, height=h) for w, h in ((16, 16), (32, 8), (16, 16))]
    assert examples[0]["width"] == examples[0]["height"] == 16
    assert examples[1]["width"] > examples[1]["height"]
    assert task.size_of(8, 32) == task.size_of(32, 8)[::-1] == (
        examples[1]["height"], examples[1]["width"],
    )  # fmt: skip
    batch = make_batch(task, *examples)
    first, second = _groups_by_size(batch.inputs)
    assert first[0].tolist() == [0, 2]
    assert second[0].tolist() == [1]
    assert first[1]["pixels"].shape == (2, 1, 3, 16, 16)
    assert second[1]["noise"].shape[-2:] == tuple(s // 2 for s in second[1]["pixels"].shape[-2:])
    assert batch.inputs["steps"].shape == (3, 1)
    assert batch.inputs["ids.0"].shape == (3, 1, 4)
    assert "dropped" not in batch.inputs
    assert (batch.cost, batch.rows) == (3, [0, 1, 2])
    assert {key: items.tolist() for key, items in batch.items.items()} == {"loss": [1, 1, 1]}
    groups = task.batch_groups(SimpleNamespace(examples=SimpleNamespace(data=Columns(examples))))
    assert groups is not None
    assert groups[0] == groups[2] != groups[1]
    assert make_task().batch_groups(None) is None


class Columns:
    """The columns of an Arrow table."""

    def __init__(self, examples: list[dict[str, Any]]) -> None:
        self.examples = examples

    def column(self, name: str) -> Any:
        return SimpleNamespace(
            to_numpy=lambda: np.array([example[name] for example in self.examples])
        )


def test_class_images_add_a_loss_term() -> None:
    task = make_task(prior=True)
    example = {**make_example(task), "prior_image": make_image(30, 16)}
    two_images = make_batch(task, example, example)
    assert two_images.cost == 4
    assert {key: items.tolist() for key, items in two_images.items.items()} == {
        "loss": [1, 1], "prior": [1, 1],
    }  # fmt: skip
    assert two_images.inputs["ids.1"].shape == (2, 2, 5)
    one_image = make_batch(task, make_example(task))
    assert {key: items.tolist() for key, items in one_image.items.items()} == {
        "loss": [1], "prior": [0],
    }  # fmt: skip


def test_latents_are_sampled_and_scaled() -> None:
    pixels = torch.rand(2, 1, 3, 4, 4) - 0.5
    sampled = torch.randn(2, 1, 3, 2, 2)
    mean = nn.functional.avg_pool2d(pixels.flatten(0, 1).double(), 2).float()
    drawn = mean + torch.exp(mean) * sampled.flatten(0, 1)  # the log-variance is twice the mean
    task = make_task()
    latents = task._latents(MODEL, {"pixels": pixels, "sampled": sampled})
    torch.testing.assert_close(latents, 0.5 * drawn)
    torch.testing.assert_close(
        make_task(latents="mean")._latents(MODEL, {"pixels": pixels}), 0.5 * mean
    )
    task.base.configs["vae"]["shift_factor"] = 0.25
    latents = task._latents(MODEL, {"pixels": pixels, "sampled": sampled})
    torch.testing.assert_close(latents, 0.5 * (drawn - 0.25))
    parameters = torch.cat([torch.ones(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 99.0)], 2)
    latents = task._latents(MODEL, {"latents": parameters, "sampled": torch.ones(1, 1, 1, 1, 1)})
    torch.testing.assert_close(
        latents.flatten(), 0.5 * (1 - 0.25 + torch.exp(torch.tensor([10.0])))
    )
    parameters[:, :, 1] = -99.0
    latents = task._latents(MODEL, {"latents": parameters, "sampled": torch.ones(1, 1, 1, 1, 1)})
    torch.testing.assert_close(
        latents.flatten(), 0.5 * (1 - 0.25 + torch.exp(torch.tensor([-15.0])))
    )


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("prior", [True, False])
def test_losses_are_weighted_errors_of_single_images(prior: bool, is_cached: bool) -> None:
    task = make_task(aspect_ratios=True, max_aspect_ratio=4.0, prior=prior)
    examples = [make_example(task, width=w, height=h) for w, h in ((16, 16), (32, 8), (16, 16))]
    if prior:
        examples = [{**example, "prior_image": make_image(40, 40)} for example in examples]
    batch = make_batch(task, *examples)
    if is_cached:
        outputs = task.frozen_outputs(MODEL, batch)
        batch.inputs |= {key: outputs[key] for key in ("texts", "pooled")}
        for i, (rows, _) in enumerate(_groups_by_size(batch.inputs)):
            latents_of_size = [outputs["latents"][row] for row in rows.tolist()]
            batch.inputs[f"latents.{i}"] = torch.stack(latents_of_size)
    output = task.forward(MODEL, batch)
    losses = task.losses(None, output, batch)
    n = 2 if prior else 1
    for row, example in enumerate(examples):
        prepared = prepare(task, example, row)
        for term, k in (("loss", 0), ("prior", 1))[:n]:
            pixels = prepared["pixels"][k : k + 1].double()
            mean = nn.functional.avg_pool2d(pixels, 2).float()
            latents = 0.5 * (mean + torch.exp(mean) * prepared["sampled"][k])
            noise, step = prepared["noise"][k], prepared["steps"][k]
            text = float(sum(map(sum, prepared["ids"][k])))
            predicted = latents + noise * step + 1000.0 - step + text
            error = ((predicted - (noise - latents)) ** 2).mean() * step / 10
            assert float(losses[term][row]) == pytest.approx(float(error), rel=1e-4)
    assert set(losses) == ({"loss", "prior"} if prior else {"loss"})
    weights = {"loss": 1.0, "prior": 0.5} if prior else {"loss": 1.0}
    assert task.loss_weights == weights
    assert [p.row for p in task.predictions(None, output, batch)] == [0, 1, 2]


def test_the_prior_loss_is_zero_without_class_images() -> None:
    task = make_task(prior=True)
    batch = make_batch(task, make_example(task))
    losses = task.losses(None, task.forward(MODEL, batch), batch)
    assert losses["prior"].tolist() == [0.0]
    assert losses["loss"].tolist() != [0.0]


def test_dropped_captions_are_encoded_as_empty() -> None:
    task = make_task()
    batch = make_batch(task, make_example(task, caption="ab"), make_example(task, caption="cd"))
    plain, pooled = task._caption_tensors(MODEL, batch.inputs)
    batch.inputs["dropped"] = torch.tensor([[False], [True]])
    batch.inputs |= {f"empty.{i}": torch.tensor([ids]) for i, ids in enumerate(task.ids_of(""))}
    texts, pooled_texts = task._caption_tensors(MODEL, batch.inputs)
    assert torch.equal(texts[0], plain[0])
    assert torch.equal(pooled_texts[0], pooled[0])
    assert not texts[1].any()
    assert not pooled_texts[1].any()
    assert plain.shape == (2, 1, 9, 1)


def test_batches_with_dropped_captions_have_the_empty_caption() -> None:
    task = make_task(caption_dropout=0.999)
    inputs = make_batch(task, make_example(task), make_example(task)).inputs
    assert inputs["dropped"].tolist() == [[True], [True]]
    assert [inputs[f"empty.{i}"].tolist() for i in range(2)] == [[ids] for ids in task.ids_of("")]


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("guidance", [None, 7.0])
def test_the_denoiser_s_inputs_have_its_dtype(sizes: bool, guidance: float | None) -> None:
    flow = {"flow": {"guidance": guidance}} if guidance else {}
    task = make_task(family={"has_sizes": sizes, "uses_flow_matching": True}, **flow)
    batch = make_batch(task, make_example(task), make_example(task, width=40))
    model: Any = Model(torch.float64)
    output = task.forward(model, batch)
    assert output[0].predicted.dtype == torch.float64
    denoiser, times, conditions = task.denoiser_call
    assert denoiser is model.unet
    assert torch.equal(times, 1000.0 - batch.inputs["steps"].flatten())
    assert [text.dtype for text in conditions.texts] == [torch.float64] * 2
    assert conditions.guidance == (guidance or 3.5)
    if sizes:
        assert conditions.sizes.tolist() == [[16, 16, 0, 0, 16, 16], [16, 40, 0, 12, 16, 16]]
        assert conditions.sizes.dtype == torch.float64
    else:
        assert conditions.sizes is None


def test_the_dtype_of_a_part_is_that_of_its_frozen_weights() -> None:
    part = nn.Linear(2, 2).half()
    part.adapter = nn.Parameter(torch.zeros(2))
    part.weight.requires_grad_(False)
    assert _dtype_of(part) == torch.float16
    assert _dtype_of(nn.Linear(2, 2).bfloat16()) == torch.bfloat16
    part.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert _dtype_of(part) == torch.float16


def test_flattened_images_are_unflattened() -> None:
    assert _unflatten(torch.arange(12).view(6, 2), (2, 3)).shape == (2, 3, 2)
    assert _groups_by_size({"steps": torch.zeros(1)}) == []


# ------------------------------------------------------------------------ settings and generation


def test_frozen_outputs_that_never_change_are_cached() -> None:
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["vae", "text_encoder", "text_encoder_2"]),
        ({"crop": "random"}, ["text_encoder", "text_encoder_2"]),
        ({"flip": True}, ["text_encoder", "text_encoder_2"]),
        ({"shuffle_tags": True}, ["vae"]), ({"train_text_encoder": True}, ["vae"]),
        ({"flip": True, "train_text_encoder": True}, []),
    ]  # fmt: skip
    for values, names in cases:
        task = make_task(**values)
        parts = task.frozen_parts(MODEL)
        assert list(parts) == names
        batch = make_batch(task, make_example(task))
        keys = {"latents"} if "vae" in names else set()
        keys |= {"texts", "pooled"} if "text_encoder" in names else set()
        assert set(task.frozen_outputs(MODEL, batch)) == keys
    task = make_task(texts=1)
    outputs = task.frozen_outputs(MODEL, make_batch(task, make_example(task)))
    assert set(outputs) == {"latents", "texts"}


def test_frozen_parts() -> None:
    both = ["text_encoder", "text_encoder_2"]
    assert make_task().frozen == ["vae", *both]
    assert make_task(train_text_encoder=True).frozen == ["vae"]
    never = {"never_adapted": ("text_encoder_2",)}
    assert make_task(train_text_encoder=True, family=never).frozen == ["vae", "text_encoder_2"]
    assert make_task(family=never).frozen == ["vae", *both]


@pytest.mark.parametrize(
    ("family", "values", "keys"),
    [
        ({}, {"snr_gamma": 5.0, "noise_offset": 0.1}, []),
        ({"uses_flow_matching": True}, {"snr_gamma": 5.0, "noise_offset": 0.1},
         ["task.snr_gamma", "task.noise_offset"]),
        ({"uses_flow_matching": True}, {"flow": {"timesteps": "uniform"}}, []),
        ({}, {"flow": {"timesteps": "uniform"}}, ["task.flow"]),
        ({}, {"without_t5": True}, ["task.without_t5"]),
        ({"optional": ("text_encoder_2",)}, {"without_t5": True}, []),
        ({"uses_flow_matching": True}, {"flow": {"guidance": 2.0}}, ["task.flow.guidance"]),
        ({"uses_flow_matching": True, "reads_guidance": True}, {"flow": {"guidance": 2.0}}, []),
        ({"has_negative_prompt": False}, {"evaluate__drawing": {"negative_prompt": "x"}},
         ["evaluate.drawing.negative_prompt"]),
        ({}, {"evaluate__drawing": {"negative_prompt": "x"}}, []),
    ],
)  # fmt: skip
def test_keys_without_effect_for_the_base_are_rejected(
    family: dict[str, Any], values: dict[str, Any], keys: list[str]
) -> None:
    task = make_task(family=family, **values)
    if not keys:
        check_keys(task.recipe, task.spec, task.base.family)
        return
    with pytest.raises(LoraError) as caught:
        check_keys(task.recipe, task.spec, task.base.family)
    assert [problem.at.partition(" ")[0] for problem in caught.value.problems] == keys


@pytest.mark.parametrize(
    ("resolution", "divisor", "near"),
    [(16, 8, None), (20, 8, 16), (21, 8, 24), (3, 8, 8), (20, 16, 16), (512, 16, None)],
)
def test_invalid_resolutions_are_rejected(resolution: int, divisor: int, near: int | None) -> None:
    task = make_task(resolution=resolution, family={"divisor": divisor})
    if near is None:
        task._check_sizes()
        return
    with pytest.raises(LoraError, match=f"is no multiple of {divisor} pixels") as caught:
        task._check_sizes()
    assert caught.value.problems[0].hint == f"for example {near}"


@pytest.mark.parametrize(("longest_side", "fits"), [(None, True), (16, True), (15, False)])
def test_images_beyond_the_last_position_are_rejected(longest_side: int | None, fits: bool) -> None:
    task = make_task(family={"longest_side": longest_side})
    if fits:
        task._check_sizes()
        task.learn_from({})
        return
    with pytest.raises(LoraError, match="pictures of up to 16 pixels a side are too large"):
        task._check_sizes()
    task.spec.model_fields_set.discard("resolution")
    task._check_sizes()  # the default resolution is only checked with the images
    with pytest.raises(LoraError, match="too large"):
        task.learn_from({})


class FakeImage:
    """An image that saves its prompt."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def save(self, file: Path) -> None:
        file.write_text(self.prompt)


@pytest.mark.parametrize("has_folder", [True, False])
def test_answers_are_names_of_generated_images(
    has_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = make_task(evaluate__drawing={"seed": 7})
    task.answer_folder = tmp_path / "new/drawn" if has_folder else None
    calls: list[Any] = []

    def draw(model: Any, prompts: list[str]) -> list[FakeImage]:
        calls.append((model, prompts))
        return [FakeImage(prompt) for prompt in prompts]

    monkeypatch.setattr(task, "draw_pictures", draw)
    answers = task.answer(MODEL, [{"text": " a  b"}, {"text": "abcdefgh"}])
    prompts = ["a b", "abcdefgh"]
    assert calls == [(MODEL, prompts)]
    assert task.n_cut_prompts == 1
    names = [picture_name(prompt, 7) for prompt in prompts]
    assert answers == [[f"drawn/{name}" if has_folder else name] for name in names]
    folder = tmp_path / "new/drawn" if has_folder else tmp_path
    assert [(folder / name).read_text() for name in names] == prompts
    assert task.answer_columns() == {"picture": "string"}
    assert task.join({}, [Prediction(3, None, None), Prediction(3, None, None)]) == Prediction(
        3, None, None
    )


def test_images_are_generated_with_the_recipe_s_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(evaluate__drawing={"seed": 9})
    generator = SimpleNamespace(generate=lambda prompts, seed: [(prompts, seed)])
    monkeypatch.setattr(task, "_image_generator", lambda model: generator)
    assert task.draw_pictures(MODEL, ["a"]) == [(["a"], 9)]


@pytest.mark.parametrize(("has_prior", "missing"), [(True, 3), (True, 0), (False, 0)])
def test_missing_class_images_are_generated_by_the_base(
    has_prior: bool, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(prior=has_prior, train__seed=5)
    calls: list[Any] = []
    if has_prior:
        task.prior = SimpleNamespace(
            missing=missing, generate_missing=lambda *args: calls.append(args)
        )
    model = nn.Dropout()
    monkeypatch.setattr(task, "load_model", lambda device: (model, []))
    monkeypatch.setattr(task, "_image_generator", lambda base: ("generator", base, base.training))
    task.complete_data(torch.device("cpu"))
    assert calls == ([(("generator", model, False), 5)] if missing else [])


@pytest.mark.parametrize("flow", [True, False])
def test_the_noise_schedule_is_of_the_base_s_kind(
    flow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = SimpleNamespace()
    for values, notes in (
        ({}, 0), ({"crop": "random"}, 1), ({"flip": True}, 1), ({"crop": "random", "flip": True}, 1)
    ):  # fmt: skip
        spec = {"flow": {"timesteps": "uniform"}} if flow else {"snr_gamma": 5.0}
        task = make_task(family={"uses_flow_matching": flow}, **spec, **values)
        base = task.base
        base.tokenizers, base.noise_scheduler = lambda: ["tokens"], lambda: scheduler
        monkeypatch.setattr(task, "read_config", lambda: None)
        monkeypatch.setattr(task, "note_cut_prompts", lambda: None)
        task.load_processor()
        assert task.tokenizers == ["tokens"]
        assert task.noise.scheduler is scheduler
        assert type(task.noise) is (FlowNoise if flow else DiffusionNoise)
        assert (task.noise.spec if flow else task.noise.snr_gamma) == (
            task.spec.flow if flow else 5.0
        )
        assert len(task.notes) == notes
    task = make_task(family={"reads_guidance": True, "optional": ("text_encoder_2",)})
    for left_out, without, drawing, notes in (
        ((), False, {}, ["`guidance_scale: 7.5`"]), ((), False, {"guidance_scale": 2.0}, []),
        (("text_encoder_2", "tokenizer_2"), False, {"guidance_scale": 2.0},
         ["the base has no `text_encoder_2`: zeros"]),
        (("text_encoder_2",), True, {"guidance_scale": 2.0}, []),
    ):  # fmt: skip
        task = make_task(
            family={"reads_guidance": True, "optional": ("text_encoder_2",)}, without_t5=without,
            evaluate__drawing=drawing,
        )  # fmt: skip
        base = task.base
        base.tokenizers, base.noise_scheduler = list, lambda: scheduler
        base.left_out = left_out
        monkeypatch.setattr(task, "read_config", lambda: None)
        monkeypatch.setattr(task, "note_cut_prompts", lambda: None)
        task.load_processor()
        assert len(task.notes) == len(notes)
        assert all(part in note for part, note in zip(notes, task.notes, strict=True))
        assert task.unused_parts == left_out
        assert task.completed_recipe.task.without_t5 == (without or bool(left_out))
    recipe = task.recipe
    assert TextToImage(recipe, recipe.task).unused_parts == ()  # before the base is known


def test_the_probe_is_deterministic_and_has_texts_and_sizes() -> None:
    task = make_task(family={"has_sizes": True})
    first, second = task.probe(), task.probe()
    assert first.keys() == second.keys() == {"noisy", "steps", "ids.0", "ids.1", "sizes"}
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["noisy"].shape == (2, 3, 8, 8)
    assert first["steps"].tolist() == [25, 50]
    assert first["sizes"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    texts = ("a red bicycle", "a photo of a dog")
    assert first["ids.0"].tolist() == [[task.ids_of(text)[0]] for text in texts]
    assert first["ids.1"].tolist() == [[task.ids_of(text)[1]] for text in texts]
    output = task.probed(MODEL, first)
    text = first["ids.0"].sum((1, 2)) + first["ids.1"].sum((1, 2))
    expected = first["noisy"] + (1000.0 - first["steps"] + text).view(2, 1, 1, 1)
    torch.testing.assert_close(output, expected)
    assert "sizes" not in make_task().probe()
