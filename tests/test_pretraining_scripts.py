"""The scripts that pretrain small models: a few steps of each, and folders that can be loaded."""

from __future__ import annotations

import gzip
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module(script)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, arguments)])
    module.main()


def test_a_schedule_ends_with_its_steps_or_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pretraining = importlib.import_module("pretraining")
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
    monkeypatch.syspath_prepend(str(SCRIPTS))
    pretraining = importlib.import_module("pretraining")
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
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("pretrain_translation")
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
