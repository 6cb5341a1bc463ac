"""The recipes in configs/: each trains a tiny model on rows of the form of its data set."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_detectors
import tiny_embedders
import tiny_pictures
import tiny_speech
import tiny_synthesis
import tiny_translators
import yaml

from lora_cli.evaluation.open_adapter import open_adapter
from lora_cli.recipe import load_adapter_recipe, load_recipe
from lora_cli.training import train

Json = dict[str, Any]
Make = Callable[[int], Json]
CONFIGS = Path(__file__).parents[1] / "configs"
ENTITIES = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
LEAVES = ["angular_leaf_spot", "bean_rust", "healthy"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def sentence(i: int) -> Json:
    return {"sentence": f"{tiny.CORPUS[i % 8]}, number {i}", "label": i % 2, "idx": i}


def entities(i: int) -> Json:
    tokens = [f"x{i}", "Ada", "Byron", "met", "Rome", "."][: 2 + i % 5]
    return {
        "id": str(i), "tokens": tokens, "pos_tags": [0] * len(tokens),
        "ner_tags": [0, 1, 2, 0, 5, 0][: len(tokens)],
    }  # fmt: skip


def leaf(i: int) -> Json:
    file = tiny_pictures.encoded(tiny_pictures.picture(i, width=50, height=40), "JPEG")
    image = {"bytes": file, "path": f"{i}.jpg"}
    return {"image_file_path": f"/home/{i}.jpg", "image": image, "labels": i % 3}


def paragraph(i: int) -> Json:
    return {"text": "" if i % 2 else f" {tiny.CORPUS[i % 8]} {i} \n" * 4}


def instruction(i: int) -> Json:
    turns = [("user", f"say {i}"), ("assistant", f"{tiny.CORPUS[i % 8]} {i}")]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"prompt": f"say {i}", "messages": messages, "category": "Chat"}


def problem(i: int) -> Json:
    return {"question": f"{i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}


def translation(i: int) -> Json:
    return {"en": f"{tiny.CORPUS[i % 8]} , {i}", "de": f"{i} , {tiny.CORPUS[(i + 3) % 8]}"}


def paired_files(folder: Path) -> Path:
    """Write text files that belong together line by line, as Multi30k has them."""
    import gzip

    for n, split in enumerate(("train", "val", "test_2016_flickr")):
        rows = [translation(1000 * n + i) for i in range(10 if n else 120)]
        for language, column in (("en", "en"), ("fr", "de")):
            with gzip.open(folder / f"{split}.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(f"{row[column]}\n" for row in rows)
    return folder


def spoken_digits(folder: Path) -> Path:
    """Write recordings at 8 kHz, and tables of what is said in them."""
    for n, split in enumerate(("train", "validation", "test")):
        lines = ["file,text,speaker"]
        for i in range(6):
            name = f"recordings/{i}_{split}_0.wav"
            tiny_speech.write(folder / name, tiny_speech.sound(10 * n + i, 0.3, 8_000), 8_000)
            lines.append(f"{name},number {10 * n + i},{split}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def said_digits(folder: Path) -> Path:
    """Write tables of recordings with who speaks in them."""
    for n, split in enumerate(("train", "validation", "test")):
        rows = [tiny_synthesis.row(10 * n + i, folder) for i in range(6)]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def classes(*names: str) -> Any:
    import datasets

    return datasets.ClassLabel(names=list(names))


def boxes(*names: str) -> Any:
    """Return the type of objects whose categories have names."""
    import datasets

    box = datasets.List(datasets.Value("float32"))
    return {"bbox": datasets.List(box), "category": datasets.List(classes(*names))}


def scene(i: int) -> Json:
    image, objects = tiny_detectors.scene(i)
    numbers = [tiny_detectors.LABELS.index(name) for name in objects["category"]]
    media = {"bytes": tiny_pictures.encoded(image), "path": None}
    return {"image": media, "objects": {**objects, "category": numbers}}


def save_llama(folder: Path) -> Path:
    tokenizer, model = tiny.tokenizer("llama"), tiny.llama()
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = None
    # one of the many that Llama 3 reserves
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    tokenizer.save_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


def hub_folder(
    folder: Path, config: str | None, splits: list[str], make: Make, **kinds: Any
) -> Path:
    """Write a data set as the Hub keeps it: parquet files, and a README that names its splits."""
    import datasets

    files = []
    for n, split in enumerate(splits):
        rows = [make(1000 * n + i) for i in range(10 if n else 120)]
        dataset = datasets.Dataset.from_list(rows)
        for column, kind in kinds.items():
            dataset = dataset.cast_column(column, kind)
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        files.append({"split": split, "path": f"{split}-*.parquet"})
    head = yaml.safe_dump({"configs": [{"config_name": config or "default", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")
    return folder


def stand_ins(name: str, folder: Path) -> tuple[Path, Path]:
    """Return a base model and a data set of the structure that a recipe expects."""
    import datasets

    all_splits = ["train", "validation", "test"]
    base, data = folder / "base", folder / name  # `datasets` caches by the folder's own name
    data.mkdir()
    match name:
        case "sst2_roberta":
            kind = {"label": classes("negative", "positive")}
            splits = ["train", "validation"]
            return tiny.save_encoder(base), hub_folder(data, "sst2", splits, sentence, **kind)
        case "conll2003_roberta":
            kind = {"ner_tags": datasets.List(classes(*ENTITIES))}
            return tiny.save_encoder(base), hub_folder(data, None, all_splits, entities, **kind)
        case "beans_vit":
            kind = {"image": datasets.Image(), "labels": classes(*LEAVES)}
            return tiny_pictures.save("vit", base), hub_folder(data, None, all_splits, leaf, **kind)
        case "cppe5_yolos":
            kind = {"image": datasets.Image(), "objects": boxes(*tiny_detectors.LABELS)}
            data = hub_folder(data, None, ["train", "test"], scene, **kind)
            return tiny_detectors.save("yolos", base, ("person", "car")), data
        case "digits_yolos":
            splits = {"train": 8, "validation": 4, "test": 4}
            return tiny_detectors.save("yolos", base), tiny_detectors.write_coco(data, splits)
        case "opus_mt_en_de":
            data = hub_folder(data, None, all_splits, translation)
            return tiny_translators.save(base, "marian"), data
        case "multi30k_en_fr":
            return tiny_translators.save(base, "marian"), paired_files(data)
        case "whisper_digits":
            return tiny_speech.save(base), spoken_digits(data)
        case "digits_speecht5":
            tiny_synthesis.save_vocoder(folder / "vocoder")
            return tiny_synthesis.save(base), said_digits(data)
        case "banking77_minilm":
            for n, split in enumerate(("train", "test")):
                rows = [f'"{tiny.CORPUS[i % 8]} {i + 100 * n}",kind {i % 2}' for i in range(80)]
                (data / f"{split}.csv").write_text("\n".join(["text,category", *rows]))
            return tiny_embedders.save(base), data
        case "gpt2_wikitext":
            config = "wikitext-2-raw-v1"
            return tiny.save_gpt2(base), hub_folder(data, config, all_splits, paragraph)
        case "gsm8k_gemma":
            return tiny.save_llama(base), hub_folder(data, "main", ["train", "test"], problem)
        case "draw_a_style" | "draw_an_object" | "draw_a_character":
            tiny_diffusion = pytest.importorskip("tiny_diffusion")
            pictures = {"train": 4, "validation": 2}
            return tiny_diffusion.save(base), tiny_diffusion.write_folder(data, pictures)
        case "draw_with_stable_diffusion_3" | "draw_with_flux":
            tiny_diffusion = pytest.importorskip("tiny_diffusion")
            pictures, kind = {"train": 4, "validation": 2}, "flux" if "flux" in name else "sd3"
            return tiny_diffusion.save(base, kind), tiny_diffusion.write_folder(data, pictures)
        case "llama_instruct" | "llama_qlora":
            return save_llama(base), hub_folder(data, None, ["train", "test"], instruction)
    raise AssertionError(f"configs/{name}.yaml has no stand-ins: write them here")


NEEDS_HUB = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "demo")


@pytest.mark.parametrize("name", NEEDS_HUB)
@pytest.mark.slow_after(1)
def test_an_example_recipe_trains(name: str, tmp_path: Path) -> None:
    base, data = stand_ins(name, tmp_path)
    changes = [f"model.name={base}", f"output_dir={tmp_path / 'out'}"]
    if name == "whisper_digits":
        changes += [f"data.{split}={data}/{split}.csv" for split in ("train", "validation", "test")]
    elif name == "multi30k_en_fr":
        files = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
        changes += [f"data.{split}={data}/{file}.{{en,fr}}.gz" for split, file in files.items()]
    elif name == "digits_yolos":
        splits = ("train", "validation", "test")
        changes += [f"data.{split}={data}/{split}.json" for split in splits]
    elif name == "digits_speecht5":
        splits = ("train", "validation", "test")
        changes += [f"data.{split}={data}/{split}.jsonl" for split in splits]
        changes.append(f"task.vocoder={tmp_path / 'vocoder'}")
    elif name == "banking77_minilm":
        changes += [f"data.{split}={data}/{split}.csv" for split in ("train", "test")]
    elif name.startswith("draw_"):
        changes += [f"data.path={data}", "task.resolution=16", "evaluate.drawing.steps=1"]
        if name == "draw_an_object":
            changes += [f"task.prior.path={tmp_path / 'class'}", "task.prior.count=2"]
    else:
        changes.append(f"data.name={data}")
    changes += ["train.epochs=null", "train.max_steps=1", "train.micro_batch_size=4"]
    changes.append("evaluate.generation.max_new_tokens=4")
    if name == "cppe5_yolos":
        changes.append("task.image_size=48")
    if name == "sst2_roberta":
        changes.append("train.precision=fp32")  # fp16 needs a GPU
    with contextlib.redirect_stderr(io.StringIO()):
        report = train(load_recipe(CONFIGS / f"{name}.yaml", changes))
    draws = name.startswith("draw_")
    measured = report["metrics"]["after"]["validation" if draws else "test"]
    assert "loss" in measured if draws else measured.keys() > {"loss"}
    rank = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["adapter"]["rank"]
    configs = (tmp_path / "out").glob("*/adapter_config.json" if draws else "adapter_config.json")
    ranks = [json.loads(config.read_text())["r"] for config in configs]
    assert ranks == [rank] * len(ranks) != []
    open_adapter(tmp_path / "out", load_adapter_recipe(tmp_path / "out"))
