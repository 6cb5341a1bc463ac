"""A step of a model that draws, in parts: what is prepared, collated, denoised and added up."""

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
from lora_cli.tasks.text_to_image import TextToImage, _dtype_of, _groups, _unflat

ANY_SHAPE = {"aspect_ratios": True, "max_aspect_ratio": 4.0}
LENGTH = 4  # tokens that the first text encoder reads; the second reads one more


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, max_length: int = 99, padding: str = "", **_: Any) -> Any:
        ids = [ord(letter) for letter in text][:max_length]
        return {"input_ids": ids + [0] * (max_length - len(ids) if padding else 0)}


class Noise:
    """Noise that can be read from its numbers."""

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
    """Makes of 2 x 2 pixels a latent: their mean, and a log-variance of twice that."""

    dtype = torch.float64

    def encode(self, pixels: Tensor) -> Any:
        assert pixels.dtype == torch.float64
        mean = nn.functional.avg_pool2d(pixels, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.cat([mean, 2 * mean],
                                                                                1)))  # fmt: skip


def task(
    texts: int = 2, prior: bool = False, family: dict[str, Any] | None = None, **values: Any
) -> Any:
    """Return a task whose base has a plain denoiser and some text encoders."""
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
    made: Any = TextToImage(recipe, recipe.task)  # type: ignore[arg-type]
    names = ("text_encoder", "text_encoder_2")[:texts]

    def of_texts(parts: dict[str, Any], ids: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        assert tuple(parts) == names
        assert all(parts[name] == f"the {name}" for name in names)
        states = torch.cat([one.float() for one in ids], -1)[..., None]
        return states, states.sum((1, 2))[:, None] if texts == 2 else None

    def denoised(denoiser: Any, noisy: Tensor, times: Tensor, given: Any) -> Tensor:
        made.given = denoiser, times, given
        return noisy + times.view(-1, 1, 1, 1) + given.texts[0].sum((1, 2)).view(-1, 1, 1, 1)

    usual = {
        "name": "Kind", "learns_flow": False, "optional": (), "never_adapted": (),
        "reads_guidance": False, "has_negative_prompt": True, "has_sizes": False, "divisor": 8,
        "pixels_per_latent": 2, "longest_side": None, "denoiser": "unet", "texts": of_texts,
        "denoised": denoised, "usual_drawing": {"guidance_scale": 3.5},
        "token_limit": lambda name, _: LENGTH + (name == "text_encoder_2"),
    }  # fmt: skip
    made.base = SimpleNamespace(
        family=SimpleNamespace(**{**usual, **(family or {})}), text_encoders=names,
        latent_channels=3, configs={"vae": {"scaling_factor": 0.5}}, left_out=(),
    )  # fmt: skip
    made.tokenizers, made.noise = [Letters()] * texts, Noise()
    return made


class Model:
    """Finds its parts by name."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.unet, self.vae = nn.Linear(1, 1).to(dtype), Vae()

    def get_submodule(self, name: str) -> Any:
        return getattr(self, name, f"the {name}")


MODEL: Any = Model()


def picture(width: int = 16, height: int = 16, name: str | None = None) -> dict[str, Any]:
    """Return a picture whose colours say where they are."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 9 % 256, columns * 6 % 256, rows + columns], -1).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": name}


def example(of: Any, row: int = 0, caption: str = "a b", **image: Any) -> dict[str, Any]:
    (found,) = of.encode_to_train([{"image": picture(**image), "text": caption}])[0]
    return {**found, "row": row}


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("text", "ids", "is_cut"),
    [
        ("ab", [[97, 98, 0, 0], [97, 98, 0, 0, 0]], False),
        ("abcd", [[97, 98, 99, 100], [97, 98, 99, 100, 0]], False),
        ("abcde", [[97, 98, 99, 100], [97, 98, 99, 100, 101]], False),  # one of the two reads all
        ("abcdef", [[97, 98, 99, 100], [97, 98, 99, 100, 101]], True),
    ],
)
def test_captions_are_filled_and_cut_for_each_text_encoder(
    text: str, ids: list[list[int]], is_cut: bool
) -> None:
    made = task()
    assert made.token_limits == [4, 5]
    assert made.ids_of(text) == ids
    assert made.is_cut(text) == is_cut


def test_notes_say_how_many_texts_are_cut() -> None:
    made = task(validation_prompts=["ab", "abcdefg", "abcdef"])
    made.note_cut_prompts()
    assert made.notes == [
        "warning: 2 texts have more than 5 tokens, of which the model reads the first: "
        "task.validation_prompts.1, task.validation_prompts.2"
    ]
    made = task(prior=True)
    made.note_cut_prompts()
    assert made.notes == []
    assert made.cut_note_of(1, "text") == (
        "1 text has more than 5 tokens, of which the model reads the first"
    )
    made.n_cut_prompts = 3
    assert made.take_warnings() == [made.cut_note_of(3, "text")]
    assert made.take_warnings() == []


def test_each_draw_of_a_row_is_an_example() -> None:
    made = task(validation_draws=3)
    row = {"image": picture(20, 18), "text": " a \n b "}
    (found,) = made.encode([row])
    assert [one["draw"] for one in found] == [0, 1, 2]
    for one in found:
        assert (one["width"], one["height"], one["caption"]) == (16, 16, "a b")
        assert one["ids_0"] == made.ids_of("a b")[0]
        assert one["ids_1"] == made.ids_of("a b")[1]
        assert one["is_cut"] is False
        assert set(one) <= set(made.features())
    (trained,) = made.encode_to_train([row])
    assert [one["draw"] for one in trained] == [0]
    made = task(caption="x")
    assert made.caption_of({"text": "y"}) == "x"


def test_each_picture_of_the_subject_gets_pictures_of_the_class() -> None:
    made = task(prior=True)
    rows = [{"image": picture(16, 16 + i), "text": "a"} for i in range(2)]
    made.prior.pictures = [picture(30 + i, 30) for i in range(3)]
    made.prior.read = lambda error_of: None
    made.learn_from({"train": [*rows, rows[0]]})
    assert list(made.positions.values()) == [0, 1]
    found = made.encode_to_train([*rows, rows[0]])
    assert [[made.prior.pictures.index(one["prior_image"]) for one in of] for of in found] == [
        [0, 2], [1], [0, 2],
    ]  # fmt: skip
    assert made.cost(found[0][0]) == 2
    assert made.cost({"image": 1}) == 1
    assert made.train_features()["prior_image"] == "media"
    assert "prior_image" not in made.features()
    assert "prior_image" not in task().train_features()


def test_without_train_rows_no_pictures_of_the_class_are_read() -> None:
    made = task(prior=True)
    made.prior.read = lambda _: pytest.fail("nothing to number")
    made.learn_from({"test": []})
    task().learn_from({"train": []})
    assert made.positions == {}


def test_a_row_is_a_caption_that_is_read_and_a_picture() -> None:
    made = task()
    assert [(f.key, f.column, f.role, f.kind) for f in made.fields()] == [
        ("task.caption_column", "text", "input", "text"),
        ("task.image_column", "image", "target", "image"),
    ]
    assert sorted(made.needed_columns().values()) == ["image", "text"]
    assert sorted(task(caption="x").needed_columns().values()) == ["image"]
    assert sorted(task(caption="x").needed_columns(training=True).values()) == ["image"]
    assert made.compared_columns() == ["image"]
    assert made.shown_input({"text": " a  b "}) == "a b"
    facts, text = made.shown(example(made, width=20, height=18, name="x/a.png"), colour=False)
    assert (facts, text) == ([], "a.png: 20 x 18 pixels, seen as 16 x 16\na b")
    assert str(made.thumbnail({"image": picture()})).startswith("data:image/")
    assert made.thumbnail({"image": {"bytes": b"x", "path": None}}) is None


def test_captions_that_are_cut_are_counted_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = task()
    rows = SimpleNamespace(place=lambda i: f"rows:{i}")
    said: list[Any] = []
    monkeypatch.setattr(caption_rows, "odd_pictures", lambda *g: said.append(g) or None)
    monkeypatch.setattr(
        caption_rows, "positions_where", lambda of, key: [i for i, e in enumerate(of) if e[key]]
    )
    examples = [{"row": 0, "is_cut": False}, *[{"row": 2, "is_cut": True}] * 3,
                {"row": 5, "is_cut": True}]  # fmt: skip
    assert made.unknown_input("train", rows, examples) == (
        0.0, "2 train captions have more than 5 tokens, of which the model reads the first: rows:2",
    )  # fmt: skip
    assert said == [("train", rows, examples)]
    assert made.unknown_input("train", rows, examples[:1]) == (0.0, None)
    monkeypatch.setattr(caption_rows, "odd_pictures", lambda *_: "odd")
    assert made.unknown_input("train", rows, examples[:1]) == (0.0, "odd")
    assert str(made.unknown_input("train", rows, examples)[1]).startswith("odd; 2 train captions")


@pytest.mark.parametrize(
    ("values", "size", "said"),
    [
        ({}, (16, 16), ""), ({}, (17, 30), ""),
        ({}, (15, 16), "has 15 x 16 pixels, and is seen as 16 x 16"),
        ({}, (16, 15), "has 16 x 15 pixels, and is seen as 16 x 16"),
        ({"upscale": True}, (15, 15), ""),
        (ANY_SHAPE, (32, 8), ""), (ANY_SHAPE, (8, 32), ""),
        (ANY_SHAPE, (8, 31), "has 8 x 31 pixels, and is seen as 8 x 32"),
    ],
)  # fmt: skip
def test_small_pictures_are_named(values: dict[str, Any], size: tuple[int, int], said: str) -> None:
    found = task(**values).picture_error(picture(*size))
    assert said in found
    assert bool(found) == bool(said)


def test_rows_without_a_caption_are_named_by_their_file(tmp_path: Path) -> None:
    made = task()
    with_path = picture(name=str(tmp_path / "a.png"))
    (tmp_path / "a.png").write_bytes(with_path["bytes"])
    assert made.row_error({"image": with_path, "text": "b"}) == ""
    assert "`a.png` has no caption: write one into `a.txt`" in made.row_error({"image": with_path})
    (tmp_path / "a.txt").write_text("")
    assert "has an empty caption" in made.row_error({"image": with_path, "text": ""})
    assert "has no caption" in made.row_error({"image": with_path, "text": None})
    assert made.row_error({"image": picture(), "text": " "}) != ""
    assert task(caption="x").row_error({"image": with_path}) == ""
    assert task(caption="x").row_error({"image": picture(4, 4)}) != ""


# ------------------------------------------------------------------------------------ in a step


def prepared(of: Any, one: dict[str, Any], seed: int = 0, training: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = of.prepare(dict(one), np.random.default_rng(seed), training)
    return found


def test_noise_has_the_shape_of_the_latents_and_pixels_lie_between_minus_one_and_one() -> None:
    made = task()
    found = prepared(made, example(made))
    assert found["noise"].shape == found["sampled"].shape == (1, 3, 8, 8)
    assert not torch.equal(found["noise"], found["sampled"])
    assert (found["dropped"], found["ids"]) == ([False], [made.ids_of("a b")])
    assert 50 <= found["steps"][0] < 100
    rows, columns = np.mgrid[0:16, 0:16]
    wanted = np.stack([rows * 9, columns * 6, rows + columns]).astype(np.float32) / 127.5 - 1
    assert torch.allclose(found["pixels"][0], torch.from_numpy(wanted))
    assert "sizes" not in found
    assert "sampled" not in prepared(task(latents="mean"), example(made))
    again = prepared(made, example(made))
    assert torch.equal(again["noise"], found["noise"])
    assert not torch.equal(prepared(made, example(made), 1)["noise"], found["noise"])


def test_what_is_drawn_follows_from_the_generator_alone() -> None:
    made = task()
    found = prepared(made, example(made), 4)
    rng = np.random.default_rng(4)
    assert found["steps"] == [int(rng.integers(50, 100))]
    for key in ("noise", "sampled"):
        wanted = rng.standard_normal((3, 8, 8), dtype=np.float32)
        assert torch.equal(found[key][0], torch.from_numpy(wanted))
    draws = task(validation_draws=3)
    ((_, second, _),) = draws.encode([{"image": picture(), "text": "a"}])
    found = prepared(draws, second, 4, training=False)
    own = np.random.default_rng(4).spawn(3)[1]
    wanted = own.standard_normal((3, 8, 8), dtype=np.float32)
    assert torch.equal(found["noise"][0], torch.from_numpy(wanted))


def test_draws_of_a_row_differ_in_their_noise_and_lie_at_their_own_steps() -> None:
    made = task(validation_draws=3)
    (all_draws,) = made.encode([{"image": picture(), "text": "a"}])
    found = [prepared(made, one, 5, training=False) for one in all_draws]
    assert [one["steps"] for one in found] == [[3], [13], [23]]
    assert len({float(one["noise"].sum()) for one in found}) == 3
    again = prepared(made, all_draws[1], 5, training=False)
    assert torch.equal(again["noise"], found[1]["noise"])


def test_an_offset_of_the_noise_is_the_same_in_all_places_of_a_channel() -> None:
    one = example(task())
    plain, offset = prepared(task(), one), prepared(task(noise_offset=0.5), one)
    difference = offset["noise"] - plain["noise"]
    assert torch.allclose(difference, difference[..., :1, :1].expand_as(difference), atol=1e-5)
    first = difference[0, :, 0, 0]
    assert len({round(float(value), 4) for value in first}) == 3
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((3, 8, 8), dtype=np.float32)
    own = rng.standard_normal((3, 1, 1), dtype=np.float32)
    assert torch.allclose(task(noise_offset=0.5)._noise(np.random.default_rng(0), (3, 8, 8)),
                          torch.from_numpy(drawn + 0.5 * own))  # fmt: skip


@pytest.mark.parametrize(("share", "dropped"), [(0.0, False), (0.999, True)])
def test_captions_are_dropped_in_training_alone(share: float, dropped: bool) -> None:
    made = task(caption_dropout=share)
    one = example(made)
    assert [prepared(made, one, s)["dropped"] for s in range(3)] == [[dropped]] * 3
    assert prepared(made, one, training=False)["dropped"] == [False]


def test_tags_are_shuffled_in_training_alone() -> None:
    made = task(texts=1, shuffle_tags=True, family={"token_limit": lambda *_: 40})
    one = example(made, caption="a, b, c, d, e, f")
    seen = {"".join(map(chr, filter(None, prepared(made, one, s)["ids"][0][0]))) for s in range(9)}
    assert len(seen) > 3
    assert all(text.startswith("a, ") for text in seen)
    assert all(sorted(text.split(", ")) == list("abcdef") for text in seen)
    assert prepared(made, one, training=False)["ids"] == [made.ids_of("a, b, c, d, e, f")]


def test_a_picture_of_the_class_has_its_own_noise_and_caption() -> None:
    made = task(prior=True)
    one = {**example(made), "prior_image": picture(40, 16)}
    found = prepared(made, one)
    assert found["noise"].shape == (2, 3, 8, 8)
    assert found["pixels"].shape == (2, 3, 16, 16)
    assert found["ids"] == [made.ids_of("a b"), made.ids_of("dog")]
    assert len(found["steps"]) == len(found["dropped"]) == 2
    assert not torch.equal(found["noise"][0], found["noise"][1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("values", [{}, {"crop": "random"}, {"flip": True}])
def test_cuts_and_mirrored_pictures_are_drawn_in_training_alone(
    values: dict[str, Any], training: bool
) -> None:
    made = task(family={"has_sizes": True}, **values)
    one = example(made, width=40, height=16)
    found = [prepared(made, one, seed, training) for seed in range(12)]
    distinct = {tuple(f["sizes"][0].tolist()) for f in found}
    pixels = {float((f["pixels"][0] * torch.arange(16.0)).sum()) for f in found}
    middle = (16, 40, 0, 12, 16, 16)  # height, width, top, left, and the size as it is seen
    if training and values.get("crop") == "random":
        assert len(distinct) > 3
        assert {(h, w, top) for h, w, top, *_ in distinct} == {(16, 40, 0)}
        assert len(pixels) > 3
    else:
        assert distinct == {middle}
        assert len(pixels) == (2 if training and "flip" in values else 1)


def test_a_mirrored_cut_has_its_place_in_the_mirrored_picture() -> None:
    made = task(family={"has_sizes": True}, crop="random", flip=True)
    value = picture(41, 16)
    flips = set()
    for seed in range(20):
        seen = made._prepare_image(value, (16, 16), np.random.default_rng(seed), False)
        left = seen.sizes[3]
        # the second channel says the column
        columns = ((seen.pixels[1, 0] + 1) * 127.5 / 6).round()
        mirrored = bool(columns[0] > columns[-1])
        flips.add(mirrored)
        first = columns[-1] if mirrored else columns[0]
        assert int(first) == (41 - 16 - left if mirrored else left)
    assert flips == {True, False}


def test_where_latents_are_kept_no_pixels_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioned_pictures, "open_picture", lambda _: pytest.fail("not read"))
    made = task()
    found = prepared(made, {**example(made), "latents": torch.zeros(1)})
    assert not {"pixels", "sizes"} & found.keys()
    made = task(family={"has_sizes": True})
    found = prepared(made, {**example(made, width=40, height=18), "latents": torch.zeros(1)})
    assert "pixels" not in found
    assert found["sizes"].tolist() == [[18, 40, 0, 10, 16, 16]]


# ------------------------------------------------------------------------------- batches and losses


def batch(of: Any, *ones: dict[str, Any]) -> Batch:
    found: Batch = of.collate([{**prepared(of, one, i), "row": i} for i, one in enumerate(ones)])
    return found


def test_pictures_of_one_size_stand_together() -> None:
    made = task(aspect_ratios=True, max_aspect_ratio=4.0, texts=1)
    ones = [example(made, width=w, height=h) for w, h in ((16, 16), (32, 8), (16, 16))]
    assert ones[0]["width"] == ones[0]["height"] == 16
    assert ones[1]["width"] > ones[1]["height"]
    assert made.size_of(8, 32) == made.size_of(32, 8)[::-1] == (
        ones[1]["height"], ones[1]["width"],
    )  # fmt: skip
    found = batch(made, *ones)
    first, second = _groups(found.inputs)
    assert first[0].tolist() == [0, 2]
    assert second[0].tolist() == [1]
    assert first[1]["pixels"].shape == (2, 1, 3, 16, 16)
    assert second[1]["noise"].shape[-2:] == tuple(s // 2 for s in second[1]["pixels"].shape[-2:])
    assert found.inputs["steps"].shape == (3, 1)
    assert found.inputs["ids.0"].shape == (3, 1, 4)
    assert "dropped" not in found.inputs
    assert (found.cost, found.rows) == (3, [0, 1, 2])
    assert {key: items.tolist() for key, items in found.items.items()} == {"loss": [1, 1, 1]}
    groups = made.batch_groups(SimpleNamespace(examples=SimpleNamespace(data=Columns(ones))))
    assert groups is not None
    assert groups[0] == groups[2] != groups[1]
    assert task().batch_groups(None) is None


class Columns:
    """Columns of a table."""

    def __init__(self, ones: list[dict[str, Any]]) -> None:
        self.ones = ones

    def column(self, name: str) -> Any:
        return SimpleNamespace(to_numpy=lambda: np.array([one[name] for one in self.ones]))


def test_a_batch_with_pictures_of_the_class_has_a_second_term() -> None:
    made = task(prior=True)
    one = {**example(made), "prior_image": picture(30, 16)}
    found = batch(made, one, one)
    assert found.cost == 4
    assert {key: items.tolist() for key, items in found.items.items()} == {
        "loss": [1, 1], "prior": [1, 1],
    }  # fmt: skip
    assert found.inputs["ids.1"].shape == (2, 2, 5)
    alone = batch(made, example(made))
    assert {key: items.tolist() for key, items in alone.items.items()} == {
        "loss": [1], "prior": [0],
    }  # fmt: skip


def test_latents_are_drawn_from_the_distribution_and_scaled() -> None:
    pixels = torch.rand(2, 1, 3, 4, 4) - 0.5
    sampled = torch.randn(2, 1, 3, 2, 2)
    mean = nn.functional.avg_pool2d(pixels.flatten(0, 1).double(), 2).float()
    drawn = mean + torch.exp(mean) * sampled.flatten(0, 1)  # the log-variance is twice the mean
    made = task()
    found = made._latents(MODEL, {"pixels": pixels, "sampled": sampled})
    torch.testing.assert_close(found, 0.5 * drawn)
    torch.testing.assert_close(task(latents="mean")._latents(MODEL, {"pixels": pixels}), 0.5 * mean)
    made.base.configs["vae"]["shift_factor"] = 0.25
    found = made._latents(MODEL, {"pixels": pixels, "sampled": sampled})
    torch.testing.assert_close(found, 0.5 * (drawn - 0.25))
    kept = torch.cat([torch.ones(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 99.0)], 2)
    found = made._latents(MODEL, {"latents": kept, "sampled": torch.ones(1, 1, 1, 1, 1)})
    torch.testing.assert_close(found.flatten(), 0.5 * (1 - 0.25 + torch.exp(torch.tensor([10.0]))))
    kept[:, :, 1] = -99.0
    found = made._latents(MODEL, {"latents": kept, "sampled": torch.ones(1, 1, 1, 1, 1)})
    torch.testing.assert_close(found.flatten(), 0.5 * (1 - 0.25 + torch.exp(torch.tensor([-15.0]))))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("prior", [True, False])
def test_the_loss_of_an_example_is_the_weighted_error_of_its_picture(
    prior: bool, kept: bool
) -> None:
    made = task(aspect_ratios=True, max_aspect_ratio=4.0, prior=prior)
    ones = [example(made, width=w, height=h) for w, h in ((16, 16), (32, 8), (16, 16))]
    if prior:
        ones = [{**one, "prior_image": picture(40, 40)} for one in ones]
    given = batch(made, *ones)
    if kept:
        outputs = made.frozen_outputs(MODEL, given)
        given.inputs |= {key: outputs[key] for key in ("texts", "pooled")}
        for i, (rows, _) in enumerate(_groups(given.inputs)):
            together = [outputs["latents"][row] for row in rows.tolist()]
            given.inputs[f"latents.{i}"] = torch.stack(together)
    output = made.forward(MODEL, given)
    losses = made.losses(None, output, given)
    n = 2 if prior else 1
    for row, one in enumerate(ones):
        alone = prepared(made, one, row)
        for term, k in (("loss", 0), ("prior", 1))[:n]:
            pixels = alone["pixels"][k : k + 1].double()
            mean = nn.functional.avg_pool2d(pixels, 2).float()
            latents = 0.5 * (mean + torch.exp(mean) * alone["sampled"][k])
            noise, step = alone["noise"][k], alone["steps"][k]
            text = float(sum(map(sum, alone["ids"][k])))
            said = latents + noise * step + 1000.0 - step + text
            error = ((said - (noise - latents)) ** 2).mean() * step / 10
            assert float(losses[term][row]) == pytest.approx(float(error), rel=1e-4)
    assert set(losses) == ({"loss", "prior"} if prior else {"loss"})
    weights = {"loss": 1.0, "prior": 0.5} if prior else {"loss": 1.0}
    assert made.loss_weights == weights
    assert [p.row for p in made.predictions(None, output, given)] == [0, 1, 2]


def test_where_no_picture_of_the_class_is_measured_its_term_is_zero() -> None:
    made = task(prior=True)
    given = batch(made, example(made))
    found = made.losses(None, made.forward(MODEL, given), given)
    assert found["prior"].tolist() == [0.0]
    assert found["loss"].tolist() != [0.0]


def test_a_dropped_caption_is_read_as_an_empty_one() -> None:
    made = task()
    given = batch(made, example(made, caption="ab"), example(made, caption="cd"))
    plain, pooled = made._texts_of(MODEL, given.inputs)
    given.inputs["dropped"] = torch.tensor([[False], [True]])
    given.inputs |= {f"empty.{i}": torch.tensor([ids]) for i, ids in enumerate(made.ids_of(""))}
    found, whole = made._texts_of(MODEL, given.inputs)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(whole[0], pooled[0])
    assert not found[1].any()
    assert not whole[1].any()
    assert plain.shape == (2, 1, 9, 1)


def test_the_empty_caption_is_read_where_one_was_dropped() -> None:
    made = task(caption_dropout=0.999)
    found = batch(made, example(made), example(made)).inputs
    assert found["dropped"].tolist() == [[True], [True]]
    assert [found[f"empty.{i}"].tolist() for i in range(2)] == [[ids] for ids in made.ids_of("")]


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("guidance", [None, 7.0])
def test_the_denoiser_reads_in_its_own_precision(sizes: bool, guidance: float | None) -> None:
    flow = {"flow": {"guidance": guidance}} if guidance else {}
    made = task(family={"has_sizes": sizes, "learns_flow": True}, **flow)
    given = batch(made, example(made), example(made, width=40))
    model: Any = Model(torch.float64)
    output = made.forward(model, given)
    assert output[0].predicted.dtype == torch.float64
    denoiser, times, read = made.given
    assert denoiser is model.unet
    assert torch.equal(times, 1000.0 - given.inputs["steps"].flatten())
    assert [one.dtype for one in read.texts] == [torch.float64] * 2
    assert read.guidance == (guidance or 3.5)
    if sizes:
        assert read.sizes.tolist() == [[16, 16, 0, 0, 16, 16], [16, 40, 0, 12, 16, 16]]
        assert read.sizes.dtype == torch.float64
    else:
        assert read.sizes is None


def test_the_precision_is_that_of_a_part_s_own_weights() -> None:
    part = nn.Linear(2, 2).half()
    part.adapter = nn.Parameter(torch.zeros(2))
    part.weight.requires_grad_(False)
    assert _dtype_of(part) == torch.float16
    assert _dtype_of(nn.Linear(2, 2).bfloat16()) == torch.bfloat16
    part.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert _dtype_of(part) == torch.float16


def test_rows_and_pictures_of_a_row_are_parted_again() -> None:
    assert _unflat(torch.arange(12).view(6, 2), (2, 3)).shape == (2, 3, 2)
    assert _groups({"steps": torch.zeros(1)}) == []


# ----------------------------------------------------------------------------- what the base allows


def test_what_frozen_parts_compute_is_kept_where_it_is_the_same_in_every_step() -> None:
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["vae", "text_encoder", "text_encoder_2"]),
        ({"crop": "random"}, ["text_encoder", "text_encoder_2"]),
        ({"flip": True}, ["text_encoder", "text_encoder_2"]),
        ({"shuffle_tags": True}, ["vae"]), ({"train_text_encoder": True}, ["vae"]),
        ({"flip": True, "train_text_encoder": True}, []),
    ]  # fmt: skip
    for values, names in cases:
        made = task(**values)
        parts = made.frozen_parts(MODEL)
        assert list(parts) == names
        given = batch(made, example(made))
        keys = {"latents"} if "vae" in names else set()
        keys |= {"texts", "pooled"} if "text_encoder" in names else set()
        assert set(made.frozen_outputs(MODEL, given)) == keys
    assert set(task(texts=1).frozen_outputs(MODEL, batch(task(texts=1), example(task(texts=1))))
               ) == {"latents", "texts"}  # fmt: skip


def test_parts_that_are_used_as_they_are() -> None:
    both = ["text_encoder", "text_encoder_2"]
    assert task().frozen == ["vae", *both]
    assert task(train_text_encoder=True).frozen == ["vae"]
    never = {"never_adapted": ("text_encoder_2",)}
    assert task(train_text_encoder=True, family=never).frozen == ["vae", "text_encoder_2"]
    assert task(family=never).frozen == ["vae", *both]


@pytest.mark.parametrize(
    ("family", "values", "keys"),
    [
        ({}, {"snr_gamma": 5.0, "noise_offset": 0.1}, []),
        ({"learns_flow": True}, {"snr_gamma": 5.0, "noise_offset": 0.1},
         ["task.snr_gamma", "task.noise_offset"]),
        ({"learns_flow": True}, {"flow": {"timesteps": "uniform"}}, []),
        ({}, {"flow": {"timesteps": "uniform"}}, ["task.flow"]),
        ({}, {"without_t5": True}, ["task.without_t5"]),
        ({"optional": ("text_encoder_2",)}, {"without_t5": True}, []),
        ({"learns_flow": True}, {"flow": {"guidance": 2.0}}, ["task.flow.guidance"]),
        ({"learns_flow": True, "reads_guidance": True}, {"flow": {"guidance": 2.0}}, []),
        ({"has_negative_prompt": False}, {"evaluate__drawing": {"negative_prompt": "x"}},
         ["evaluate.drawing.negative_prompt"]),
        ({}, {"evaluate__drawing": {"negative_prompt": "x"}}, []),
    ],
)  # fmt: skip
def test_keys_that_change_nothing_for_the_base_are_named(
    family: dict[str, Any], values: dict[str, Any], keys: list[str]
) -> None:
    made = task(family=family, **values)
    if not keys:
        check_keys(made.recipe, made.spec, made.base.family)
        return
    with pytest.raises(LoraError) as caught:
        check_keys(made.recipe, made.spec, made.base.family)
    assert [problem.at.partition(" ")[0] for problem in caught.value.problems] == keys


@pytest.mark.parametrize(
    ("resolution", "divisor", "near"),
    [(16, 8, None), (20, 8, 16), (21, 8, 24), (3, 8, 8), (20, 16, 16), (512, 16, None)],
)
def test_a_size_that_the_model_cannot_draw_is_rejected(
    resolution: int, divisor: int, near: int | None
) -> None:
    made = task(resolution=resolution, family={"divisor": divisor})
    if near is None:
        made._check_sizes()
        return
    with pytest.raises(LoraError, match=f"is no multiple of {divisor} pixels") as caught:
        made._check_sizes()
    assert caught.value.problems[0].hint == f"for example {near}"


@pytest.mark.parametrize(("most", "fits"), [(None, True), (16, True), (15, False)])
def test_pictures_beyond_the_last_position_are_rejected(most: int | None, fits: bool) -> None:
    made = task(family={"longest_side": most})
    if fits:
        made._check_sizes()
        made.learn_from({})
        return
    with pytest.raises(LoraError, match="pictures of up to 16 pixels a side are too large"):
        made._check_sizes()
    made.spec.model_fields_set.discard("resolution")
    made._check_sizes()  # a size that nobody asked for matters where pictures are read
    with pytest.raises(LoraError, match="too large"):
        made.learn_from({})


class Saved:
    """A picture that notes where it is saved."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def save(self, file: Path) -> None:
        file.write_text(self.prompt)


@pytest.mark.parametrize("has_folder", [True, False])
def test_an_answer_is_the_name_of_the_picture_that_was_drawn(
    has_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = task(evaluate__drawing={"seed": 7})
    made.answer_folder = tmp_path / "new/drawn" if has_folder else None
    asked: list[Any] = []

    def draw(model: Any, prompts: list[str]) -> list[Saved]:
        asked.append((model, prompts))
        return [Saved(prompt) for prompt in prompts]

    monkeypatch.setattr(made, "draw_pictures", draw)
    found = made.answer(MODEL, [{"text": " a  b"}, {"text": "abcdefgh"}])
    prompts = ["a b", "abcdefgh"]
    assert asked == [(MODEL, prompts)]
    assert made.n_cut_prompts == 1
    names = [picture_name(prompt, 7) for prompt in prompts]
    assert found == [[f"drawn/{name}" if has_folder else name] for name in names]
    place = tmp_path / "new/drawn" if has_folder else tmp_path
    assert [(place / name).read_text() for name in names] == prompts
    assert made.answer_columns() == {"picture": "string"}
    assert made.join({}, [Prediction(3, None, None), Prediction(3, None, None)]) == Prediction(
        3, None, None
    )


def test_a_picture_is_drawn_by_the_recipe_s_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(evaluate__drawing={"seed": 9})
    generator = SimpleNamespace(generate=lambda prompts, seed: [(prompts, seed)])
    monkeypatch.setattr(made, "_image_generator", lambda model: generator)
    assert made.draw_pictures(MODEL, ["a"]) == [(["a"], 9)]


@pytest.mark.parametrize(("has_prior", "missing"), [(True, 3), (True, 0), (False, 0)])
def test_the_base_draws_the_pictures_of_the_class_that_are_missing(
    has_prior: bool, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = task(prior=has_prior, train__seed=5)
    drawn: list[Any] = []
    if has_prior:
        made.prior = SimpleNamespace(
            missing=missing, generate_missing=lambda *args: drawn.append(args)
        )
    model = nn.Dropout()
    monkeypatch.setattr(made, "load_model", lambda device: (model, []))
    monkeypatch.setattr(made, "_image_generator", lambda base: ("generator", base, base.training))
    made.complete_data(torch.device("cpu"))
    assert drawn == ([(("generator", model, False), 5)] if missing else [])


@pytest.mark.parametrize("flow", [True, False])
def test_the_noise_is_of_the_kind_that_the_base_learns(
    flow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = SimpleNamespace()
    for values, notes in (
        ({}, 0), ({"crop": "random"}, 1), ({"flip": True}, 1), ({"crop": "random", "flip": True}, 1)
    ):  # fmt: skip
        spec = {"flow": {"timesteps": "uniform"}} if flow else {"snr_gamma": 5.0}
        made = task(family={"learns_flow": flow}, **spec, **values)
        base = made.base
        base.tokenizers, base.noise_scheduler = lambda: ["tokens"], lambda: scheduler
        monkeypatch.setattr(made, "read_config", lambda: None)
        monkeypatch.setattr(made, "note_cut_prompts", lambda: None)
        made.load_processor()
        assert made.tokenizers == ["tokens"]
        assert made.noise.scheduler is scheduler
        assert type(made.noise) is (FlowNoise if flow else DiffusionNoise)
        assert (made.noise.spec if flow else made.noise.snr_gamma) == (
            made.spec.flow if flow else 5.0
        )
        assert len(made.notes) == notes
    made = task(family={"reads_guidance": True, "optional": ("text_encoder_2",)})
    for left_out, without, drawing, notes in (
        ((), False, {}, ["`guidance_scale: 7.5`"]), ((), False, {"guidance_scale": 2.0}, []),
        (("text_encoder_2", "tokenizer_2"), False, {"guidance_scale": 2.0},
         ["the base has no `text_encoder_2`: zeros"]),
        (("text_encoder_2",), True, {"guidance_scale": 2.0}, []),
    ):  # fmt: skip
        made = task(
            family={"reads_guidance": True, "optional": ("text_encoder_2",)}, without_t5=without,
            evaluate__drawing=drawing,
        )  # fmt: skip
        base = made.base
        base.tokenizers, base.noise_scheduler = list, lambda: scheduler
        base.left_out = left_out
        monkeypatch.setattr(made, "read_config", lambda: None)
        monkeypatch.setattr(made, "note_cut_prompts", lambda: None)
        made.load_processor()
        assert len(made.notes) == len(notes)
        assert all(part in note for part, note in zip(notes, made.notes, strict=True))
        assert made.unused_parts == left_out
        assert made.completed_recipe.task.without_t5 == (without or bool(left_out))
    recipe = made.recipe
    assert TextToImage(recipe, recipe.task).unused_parts == ()  # before the base is known


def test_the_probe_is_the_same_every_time_and_reads_texts_and_sizes() -> None:
    made = task(family={"has_sizes": True})
    first, second = made.probe(), made.probe()
    assert first.keys() == second.keys() == {"noisy", "steps", "ids.0", "ids.1", "sizes"}
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["noisy"].shape == (2, 3, 8, 8)
    assert first["steps"].tolist() == [25, 50]
    assert first["sizes"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    asked = ("a red bicycle", "a photo of a dog")
    assert first["ids.0"].tolist() == [[made.ids_of(text)[0]] for text in asked]
    assert first["ids.1"].tolist() == [[made.ids_of(text)[1]] for text in asked]
    found = made.probed(MODEL, first)
    text = first["ids.0"].sum((1, 2)) + first["ids.1"].sum((1, 2))
    wanted = first["noisy"] + (1000.0 - first["steps"] + text).view(2, 1, 1, 1)
    torch.testing.assert_close(found, wanted)
    assert "sizes" not in task().probe()
