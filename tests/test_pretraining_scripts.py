"""The scripts that pretrain small models: a few steps of each, and folders that can be loaded."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_speech
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lora_cli.recipe import load_recipe
from lora_cli.training import train

SCRIPTS = Path(__file__).parents[1] / "scripts" / "pretrain"


def load(monkeypatch: pytest.MonkeyPatch, script: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(script)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail where a GPU would have to be waited for, since no graph can hold that.

    A profiler sees what a dispatch mode changes: some gradients take another way under one.
    """
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
    with torch.autograd.profiler.profile() as profile:
        yield
    seen = {event.name() for event in profile.kineto_results.events()}
    assert "aten::add" in seen or "aten::mul" in seen
    assert not seen & waits


def compute_without_waiting(steps: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """Compute a step, all of it but the optimizer's, whose kinds for CPU and GPU differ."""
    steps.optimizer.zero_grad()
    with no_waiting():
        loss: torch.Tensor = steps.loss_of(*inputs)
        loss.backward()
    steps.optimizer.step()
    return loss.detach()


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    module = load(monkeypatch, script)
    pretraining = load(monkeypatch, "pretraining")
    monkeypatch.setattr(pretraining.Steps, "_compute", compute_without_waiting)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, arguments)])
    module.main()


def test_a_schedule_ends_with_its_steps_or_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pretraining = load(monkeypatch, "pretraining")
    clock = [100.0]
    monkeypatch.setattr(pretraining.time, "monotonic", lambda: clock[0])
    schedule = pretraining.Schedule(60.0, 100, peak=1.0, warmup=10, start=90.0, begun=100.0)
    assert [schedule.share(step) for step in (0, 50, 100, 200)] == [0.0, 0.5, 1.0, 1.0]
    assert schedule.rate(0) == pytest.approx(0.1)
    clock[0] = 125.0  # half of the 50 seconds that were left when training began
    assert schedule.share(10) == 0.5
    assert schedule.rate(10) == pytest.approx(0.02 + 0.98 * 0.5)
    clock[0] = 150.0
    assert schedule.share(10) == 1.0


def test_steps_are_those_of_plain_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    pretraining = load(monkeypatch, "pretraining")
    torch.manual_seed(0)
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(one.state_dict())
    steps = pretraining.Steps(lambda x: one(x).square().sum(), list(one.parameters()), clip=0.5)
    plain = torch.optim.AdamW(other.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for rate in (0.1, 0.01, 0.05):
        x = torch.randn(5, 4)
        found = steps(rate, x)
        plain.param_groups[0]["lr"] = rate
        plain.zero_grad()
        loss = other(x).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        plain.step()
        torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(one.weight, other.weight)


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    words = {"en": "dog cat runs sleeps", "de": "Hund Katze rennt schläft", "fr": "chien chat"}
    for split in ("train", "val", "test_2016_flickr"):
        for language, own in words.items():
            with gzip.open(tmp_path / f"{split}.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(f"{' '.join(own.split()[: 2 + i % 3])}.\n" for i in range(24))
    return tmp_path


def test_a_translation_model_is_pretrained(
    monkeypatch: pytest.MonkeyPatch, sentences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    to = sentences / "base"
    run(
        monkeypatch, "pretrain_translation", sentences, to, "--steps", 2, "--tokens", 96,
        "--width", 64, "--layers", 1, "--words", 80, "--test", 2, "--beams", 1,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_pretrained(to)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert tokenizer.decode(tokenizer("Katze rennt.")["input_ids"]) == "Katze rennt.</s>"
    printed = capsys.readouterr().out
    assert "100%  step 2" in printed
    assert "German: BLEU" in printed


def test_sentences_to_restore_keep_the_order_of_their_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = load(monkeypatch, "pretrain_translation")
    torch.manual_seed(0)
    words = torch.arange(10, 40)
    ids = torch.stack([torch.cat([words, torch.tensor([script.END, script.PAD])])] * 50)
    found = script.corrupted(ids)
    for row in found.tolist():
        kept = [token for token in row if token != script.PAD]
        assert row == kept + [script.PAD] * (len(row) - len(kept))
        assert kept[-1] == script.END
        seen = [token for token in kept[:-1] if token != script.MASK]
        assert seen == sorted(set(seen) & set(words.tolist()))
    masked = (found == script.MASK).float().sum() / (50 * 30)
    deleted = 1 - (found > script.MASK).float().sum() / (50 * 30) - masked
    assert 0.2 < float(masked) < 0.3
    assert 0.05 < float(deleted) < 0.15


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """A few digits and letters in the files of MNIST and Omniglot."""
    random = np.random.default_rng(0)
    (tmp_path / "mnist_test").mkdir()
    (tmp_path / "omniglot").mkdir()
    digits = np.arange(200, dtype=np.uint8) % 10
    images = np.zeros((200, 28, 28), np.uint8)
    for image, digit in zip(images, digits, strict=True):
        image[4:24, 4 + digit : 8 + digit] = random.integers(150, 255)
    for name, header, array in (("images-idx3", 16, images), ("labels-idx1", 8, digits)):
        with gzip.open(tmp_path / "mnist_test" / f"t10k-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + array.tobytes())
    with zipfile.ZipFile(tmp_path / "omniglot" / "images_background_small1.zip", "w") as archive:
        for letter in (
            "Early_Aramaic/character15",
            "Early_Aramaic/character10",
            "Greek/character01",
        ):
            for i in range(4):
                picture = io.BytesIO()
                Image.fromarray(random.random((105, 105)) > 0.1).save(picture, "PNG")
                name = f"images_background_small1/{letter}/{i}.png"
                archive.writestr(name, picture.getvalue())
    return tmp_path


def test_captions_say_what_pictures_show(monkeypatch: pytest.MonkeyPatch, drawings: Path) -> None:
    pictures = load(monkeypatch, "pictures")
    torch.manual_seed(0)
    glyphs = pictures.Glyphs(drawings, "cpu")
    facts = glyphs.sample(60, glyphs.known, styled=0.3, filled=0.5)
    captions = facts.captions(glyphs.names)
    said = [pictures.read_caption(caption, glyphs.names) for caption in captions]
    assert said == list(
        zip(facts.name.tolist(), facts.colour.tolist(), facts.background.tolist(), strict=True)
    )
    assert [caption.endswith(", sketch") for caption in captions] == facts.styled.tolist()
    colours, seconds = list(pictures.COLOURS), facts.second.tolist()
    for caption, fill, second in zip(captions, facts.fill.tolist(), seconds, strict=True):
        assert (f" with {colours[second]} {pictures.FILLS[fill]} on " in caption) == bool(fill)
    assert 0 < int((facts.fill > 0).sum()) < 40
    assert not any(word in caption for caption in captions for word in ("sks", "zuko"))
    for caption in facts.captions(glyphs.names, unsaid=1.0):  # such as "a large 3 on the left"
        assert pictures.read_caption(caption, glyphs.names)[1:] == (-1, -1)
    pixels = glyphs.paint(facts)
    assert pixels.shape == (60, 3, 64, 64)
    corners = (pixels[:, :, 0, 0] + 1) / 2  # no drawing reaches there
    torch.testing.assert_close(corners, glyphs.palette[facts.background][..., 0, 0])


def test_filled_things_have_their_two_colours(
    monkeypatch: pytest.MonkeyPatch, drawings: Path
) -> None:
    pictures = load(monkeypatch, "pictures")
    torch.manual_seed(0)
    glyphs = pictures.Glyphs(drawings, "cpu")
    facts = glyphs.sample(80, ["ball"], filled=1.0)
    facts = facts[facts.second != facts.background]
    pixels = (glyphs.paint(facts) + 1) / 2
    for fill, name in enumerate(pictures.FILLS[1:], 1):
        own = facts.fill == fill
        for colour in (facts.colour, facts.second, facts.background):
            far = (pixels - glyphs.palette[colour]).abs().amax(1)[own]
            share = (far < 0.15).flatten(1).float().mean(1)
            assert (share > 0.003).all(), name


def test_letters_are_as_large_as_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = load(monkeypatch, "pictures")
    ink = torch.zeros(105, 105)
    ink[20:84, 30:32] = 1  # a stroke of 64 x 2 pixels
    found = pictures.as_in_mnist(ink)
    assert found.shape == (32, 32)
    rows, columns = (found > 0.5).nonzero().unbind(1)
    assert (rows.min(), rows.max()) == (4, 27)
    assert 1 <= columns.max() - columns.min() + 1 <= 4


def test_drawings_for_measuring_are_not_in_other_pictures(
    monkeypatch: pytest.MonkeyPatch, drawings: Path
) -> None:
    pictures = load(monkeypatch, "pictures")
    glyphs = pictures.Glyphs(drawings, "cpu")
    facts = glyphs.sample(500, [name for name in glyphs.names if name not in pictures.SHAPES])
    facts = facts[facts.name != glyphs.names.index(pictures.OBJECT)]
    held_out, others = (set(glyphs._drawings(facts, flag).tolist()) for flag in (True, False))
    assert held_out
    assert others
    assert held_out.isdisjoint(others)


def test_a_classifier_is_trained_and_measures_folders(
    monkeypatch: pytest.MonkeyPatch, drawings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, pictures = drawings / "classifier", load(monkeypatch, "pictures")
    sizes = "--steps", 2, "--pool", 16, "--batch", 8, "--width", 8, "--new", 40
    run(monkeypatch, "picture_classifier", "train", to, drawings, *sizes)
    assert "new drawings, all: thing " in capsys.readouterr().out
    script = load(monkeypatch, "picture_classifier")
    model = script.load_classifier(to, "cpu")
    glyphs = pictures.Glyphs(drawings, "cpu")
    facts = glyphs.sample(12, glyphs.known)
    pixels = glyphs.paint(facts)
    pictures.save_pictures(drawings / "drawn", pixels, facts.captions(glyphs.names))
    run(monkeypatch, "picture_classifier", "measure", to, drawings / "drawn")
    rounded = ((pixels + 1) * 127.5).round() / 127.5 - 1
    right = script.shown(script.shares_right(model, rounded, script.answers(facts)))
    assert f"12 pictures: {right}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_diffusion_model_is_pretrained(
    monkeypatch: pytest.MonkeyPatch, drawings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    to, sets = drawings / "base", drawings / "pictures"
    sizes = "--steps", 2, "--pool", 16, "--batch", 8, "--width", 8, "--new", 40
    run(monkeypatch, "picture_classifier", "train", sets / "classifier", drawings, *sizes)
    run(
        monkeypatch, "pretrain_diffusion", drawings, to, sets, "--steps", 2, "--batch", 4,
        "--pool", 16, "--width", 32, "--prompts", 4, "--inference", 2,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "U-Net: 100%  step 2" in printed
    assert "drawn: thing " in printed
    stored = load_file(to / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(to)
    for name, tensor in pipeline.unet.state_dict().items():
        torch.testing.assert_close(tensor, stored[name].float())
    assert pipeline.tokenizer.tokenize("a red 3") == ["a</w>", "red</w>", "3</w>"]
    for name in ("style", "object", "character"):
        for split in ("train", "validation"):
            files = list((sets / name / split).glob("*.png"))
            assert len(files) >= 10
            assert all(file.with_suffix(".txt").exists() for file in files)


def test_boxes_surround_the_digits_of_a_scene(
    monkeypatch: pytest.MonkeyPatch, drawings: Path
) -> None:
    scenes = load(monkeypatch, "scenes")
    torch.manual_seed(0)
    monkeypatch.setattr(scenes, "background", lambda count, device: torch.zeros(count, 3, 128, 128))
    monkeypatch.setattr(scenes, "MOST", 1)  # so that all that is not background is one digit
    found = scenes.Painter(drawings, range(5), False, "cpu")(20)
    truth = scenes.coco_of(found)
    assert [entry["category_id"] for entry in truth["annotations"]] == [
        int(row[0]) + 1 for row in found.digits
    ]
    for entry, pixels in zip(truth["annotations"], found.pixels, strict=True):
        ground = pixels[:, :1, :1]
        y, x = ((pixels.int() - ground.int()).abs().amax(dim=0) > 0.3 * 255).nonzero().unbind(1)
        left, top, width, height = entry["bbox"]
        inside = [x.min() - left, y.min() - top, left + width - x.max(), top + height - y.max()]
        assert all(0 <= float(distance) <= 3 for distance in inside)


def test_the_loss_of_detection_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch, drawings: Path
) -> None:
    script = load(monkeypatch, "pretrain_detection")
    torch.manual_seed(0)
    scenes = script.Painter(drawings, script.KNOWN, False, "cpu")(6)
    model = script.build_model(64, 2, 16).eval()
    batch = scenes.pixels, scenes.boxes, scenes.digits
    numbers = (scenes.digits >= 0).sum(dim=1).tolist()
    assert min(numbers) < script.MOST  # so that some boxes are not there
    with no_waiting():
        costs = script.costs(model, *batch)
    matched = script.match(costs, numbers)
    states = script.states_of(model, scenes.pixels)
    found = script.loss_of(model, states, scenes.boxes, scenes.digits, matched)
    labels = [
        {"class_labels": digits[:number], "boxes": boxes[:number]}
        for boxes, digits, number in zip(scenes.boxes, scenes.digits, numbers, strict=True)
    ]
    output = model(pixel_values=scenes.pixels.float() / 127.5 - 1, labels=labels)
    torch.testing.assert_close(found, output.loss)
    gradients = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
    largest = max(float(own.abs().max()) for own in wanted if own is not None)
    for one, other in zip(gradients, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)


def test_patches_learn_the_box_that_they_lie_in(
    monkeypatch: pytest.MonkeyPatch, drawings: Path
) -> None:
    script = load(monkeypatch, "pretrain_detection")
    torch.manual_seed(0)
    scenes = script.Painter(drawings, script.KNOWN, False, "cpu")(6)
    wanted = []  # nothing and five digits, then the box: what a head would have to say
    for boxes, digits in zip(scenes.boxes.tolist(), scenes.digits.tolist(), strict=True):
        for y in range(8):
            for x in range(8):
                row = [50.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
                for (cx, cy, width, height), digit in zip(boxes, digits, strict=True):
                    is_inside = (
                        abs((x + 0.5) / 8 - cx) < width / 2 and abs((y + 0.5) / 8 - cy) < height / 2
                    )
                    if digit >= 0 and is_inside:
                        row = [0.0] * 6 + torch.tensor([cx, cy, width, height]).logit().tolist()
                        row[digit + 1] = 50.0
                wanted.append(row)
    head = nn.Linear(10, 10).requires_grad_(False)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    states = torch.tensor(wanted).view(6, 64, 10)
    assert (states[..., 0] == 0).any()
    right = script.loss_of_patches(head, states, scenes.boxes, scenes.digits)
    assert float(right) == pytest.approx(0, abs=1e-5)
    wrong = script.loss_of_patches(head, states.roll(1, dims=1), scenes.boxes, scenes.digits)
    assert float(wrong) > 1


def test_a_detector_is_pretrained(
    monkeypatch: pytest.MonkeyPatch, drawings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    to, sets = drawings / "base", drawings / "scenes"
    run(
        monkeypatch, "pretrain_detection", drawings, to, sets, "--steps", 2, "--batch", 4,
        "--pool", 8, "--test", 4, "--width", 64, "--layers", 2, "--patch", 16, "--count", 4,
    )  # fmt: skip
    assert "on new drawings: mAP" in capsys.readouterr().out
    model = AutoModelForObjectDetection.from_pretrained(to)
    assert model.config.id2label == {i: str(i) for i in range(5)}
    processor = AutoImageProcessor.from_pretrained(to)
    picture = Image.open(sets / "test" / "0000.png")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    own = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    torch.testing.assert_close(pixels, own.float() / 127.5 - 1, atol=1e-5, rtol=0)
    assert model(pixels.to(model.dtype)).pred_boxes.shape == (1, 16, 4)
    truth = json.loads((sets / "train.json").read_text())
    assert {entry["name"] for entry in truth["categories"]} <= {"5", "6", "7", "8", "9"}
    assert all((sets / image["file_name"]).exists() for image in truth["images"])


def save_spoken_digits(folder: Path) -> None:
    """Write recordings of tones as the data set of spoken digits has them."""
    lines = ["file,text,speaker,split"]
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "recordings.zip", "w") as archive:
        for n, speaker in enumerate(("ann", "bob", "theo")):
            for take in range(6):
                digit = ("one", "two")[take % 2]
                name = f"recordings/{digit}_{speaker}_{take}.wav"
                tone = tiny_speech.sound(7 * n + take, 0.5, 8_000)
                archive.writestr(name, tiny_speech.encoded(tone, 8_000))
                lines.append(f"{name},{digit},{speaker},{'test' if take > 3 else 'train'}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_a_model_that_speaks_its_vocoder_and_rows_of_another_speaker_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_spoken_digits(tmp_path / "data/fsdd")
    script = load(monkeypatch, "pretrain_speech_synthesis")
    arguments = [tmp_path / "data", tmp_path / "to", tmp_path / "rows", "--steps", 2]
    arguments += ["--batch", 3, "--width", 16, "--layers", 1]
    monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
    script.main()
    rows = {}
    for name in ("train", "validation", "test", "known"):
        text = (tmp_path / f"rows/{name}.jsonl").read_text()
        rows[name] = [json.loads(line) for line in text.splitlines()]
    assert [len(rows[name]) for name in rows] == [3, 1, 2, 4]
    for name, some in rows.items():
        whose = {Path(row["audio"]).stem.split("_")[1] for row in some}
        assert whose == ({"ann", "bob"} if name == "known" else {"theo"})
    recipe = Path(__file__).parents[1] / "configs/digits_speecht5.yaml"
    changes = [f"data.{name}={tmp_path}/rows/{name}.jsonl" for name in list(rows)[:3]]
    changes += [f"model.name={tmp_path}/to/speecht5", f"task.vocoder={tmp_path}/to/vocoder"]
    changes += [f"output_dir={tmp_path}/out", "train.epochs=null", "train.max_steps=1"]
    report = train(load_recipe(recipe, changes))
    assert report["metrics"]["after"]["test"]["mel_l1"] > 0
