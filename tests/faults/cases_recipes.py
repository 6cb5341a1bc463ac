"""Faults of the arguments and of the recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from cases import CASES, Case
from world import Printed, World

# --------------------------------------------------------------------------------- the arguments

ARGUMENTS: list[tuple[str, ...]] = [
    ("trian",),
    ("train",),
    ("train", "recipe.yaml", "again.yaml"),
    ("train", "recipe.yaml", "--sett", "train.epochs=1"),
    ("train", "recipe.yaml", "--resume=yes"),
    ("train", "recipe.yaml", "--set"),
    ("eval", "--adapter", "trained", "--max-drop", "abc"),
    ("eval", "--adapter", "trained", "--max-drop", "-1"),
    ("eval", "--adapter", "trained", "--split", "test", "--input", "rows.csv", "--split", "train"),
    ("eval", "--adapter", "trained", "--metric", "f1"),
    ("eval", "--adapter", "trained", "--max-drop", "0.1"),
    ("eval", "--adapter", "nowhere"),
    ("eval", "--adapter", "bare"),
    ("validate", "recipe.yaml", "--show", "3"),
    ("validate", "recipe.yaml", "--show", "many"),
    ("predict", "--adapter", "trained"),
    ("predict", "--adapter", "trained", "--input", "rows.csv"),
    ("predict", "--adapter", "trained", "--input", "rows.csv", "--output", "a.csv", "--json"),
    ("predict", "--adapter", "trained", "--interactive", "a text"),
    ("init", "one.csv", "two.csv", "three.csv", "--model", "base"),
    ("validate", "nowhere.yaml"),
    ("validate", "recipe.yml"),
    ("validate", "bare"),
    ("validate", "trained"),
    ("validate", "\udcff\n%s.yaml"),
]


def _arguments(arguments: Sequence[str]) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        world.recipe()
        world.trained()
        (world.folder / "bare").mkdir()
        return world.lora(*arguments)

    return run


for _arguments_of in ARGUMENTS:
    CASES.append(Case("Arguments", "", _arguments(_arguments_of)))


# ------------------------------------------------------------------------------------ the recipe

HEAD = "model: {name: m}\ntask: {type: sequence_classification}\ndata: {path: rows.csv}\n"
CHAT = "model: {name: m}\ntask: {type: causal_lm}\ndata: {path: rows.csv}\n"


def _in(section: str, keys: str, head: str = HEAD) -> str:
    """Return a recipe with more keys in a section."""
    if f"{section}: {{" in head:
        return re.sub(rf"({section}: {{.*)}}\n", lambda found: f"{found[1]}, {keys}}}\n", head)
    return f"{head}{section}: {{{keys}}}\n"


RECIPES: dict[str, str | bytes] = {
    "nothing in it": "# a comment\n",
    "a list": "- a\n- b\n",
    "not UTF-8": HEAD.encode() + "output_dir: f\xfcr\n".encode("latin-1"),
    "a control character": HEAD + "output_dir: a\x07\n",
    "too many bytes": "#" * 300_000,
    "a tab": "model:\n\tname: m\n",
    "a colon in a text": HEAD + "output_dir: out: put\n",
    "a bracket that is not closed": HEAD + "train: {seed: 1\n",
    "a list that is not closed": HEAD + "evaluate:\n  metrics: [f1\ntrain: {seed: 1}\n",
    "a bracket without a value": HEAD + "train: {seed: }}\n",
    "a quotation mark that is not closed": HEAD + "output_dir: 'out\n\n",
    "a text after its quotation mark": HEAD + "output_dir: 'it's'\n",
    "keys in another column": "model:\n  name: m\n revision: main\n",
    "neither key nor item": HEAD + "output_dir\ntrain: {}\n",
    "an item in a section": "model:\n  name: m\n  - x\n",
    "a list in a line": HEAD + "output_dir: - x\n",
    "a special character": HEAD + "output_dir: @out\n",
    "an alias without its anchor": HEAD + "output_dir: *.csv\n",
    "an anchor without a name": HEAD + "output_dir: & x\n",
    "an anchor twice": HEAD + "output_dir: &a x\ntrain: &a {}\n",
    "a backslash": HEAD + 'output_dir: "C:\\data"\n',
    "a backslash and a letter": HEAD + 'output_dir: "C:\\UFFFFFFFF"\n',
    "a block of text": HEAD + "output_dir: |x\n",
    "a directive": "%YAML 9.9\n---\n" + HEAD,
    "two documents": HEAD + "---\n" + HEAD,
    "a tag that runs code": HEAD + "output_dir: !!python/object/apply:os.system [true]\n",
    "a tag that is not complete": HEAD + "output_dir: !<x\n",
    "a tag's handle": HEAD + "output_dir: !a!b c\n",
    "a tag that the value is not": _in("train", "seed: !!int one"),
    "too deep": "[" * 5000,
    "an alias inside itself": "model: &m {name: m, more: *m}\n",
    "too large a number": _in("train", "seed: 99999999999999999999"),
    "too long a number": _in("train", "seed: " + "9" * 200),
    "a NUL": HEAD + 'output_dir: "a\\0b"\n',
    "half of a character": HEAD + 'output_dir: "\\ud800"\n',
    "a key that is no word": _in("train", "? [a] : 1"),
    "a key twice": HEAD + "model: {name: n}\n",
    "a merge": HEAD + "base: &b {seed: 1}\ntrain: {<<: *b}\n",
    "an unknown key": _in("train", "learning_rat: 1"),
    "an unknown key of another section": _in("train", "learning_rate: 1"),
    "an unknown key like no other": _in("train", "zzz: 1"),
    "many unknown keys": HEAD + "".join(f"key{i}: 1\n" for i in range(60)),
    "no sections": "output_dir: out\n",
    "a format of a later version": HEAD + "format: 2\nfuture: {}\n",
    "a missing key": "model: {}\ntask: {type: sequence_classification}\ndata: {path: rows.csv}\n",
    "an unknown task": "model: {name: m}\ntask: {type: classification}\ndata: {path: rows.csv}\n",
    "a task without a type": "model: {name: m}\ntask: {max_length: 3}\ndata: {path: rows.csv}\n",
    "a value for a section": HEAD + "train: 3\n",
    "a text for a number": _in("train", "seed: one"),
    "a number in quotation marks": _in("train", "seed: '1'"),
    "a number for a word": _in("task", "text_column: 3"),
    "true for a word": _in("task", "text_column: true"),
    "a fraction for a whole number": _in("train", "seed: 1.5"),
    "infinity": _in("adapter", "alpha: .inf"),
    "a number below its least": _in("train", "max_steps: 0"),
    "a number above its most": _in("adapter", "dropout: 1.5"),
    "a word of another list": _in("train", "precision: fp61"),
    "an empty value": _in("model", "revision: "),
    "an empty text": _in("model", "revision: ''"),
    "an empty list": _in("data", "format: {columns: []}"),
    "an empty item": _in("adapter", "target_modules: [query, ~]"),
    "one label column": _in("task", "label_columns: [a]"),
    "three betas": _in("train", "optimizer: {betas: [0.9, 0.99, 0.999]}"),
    "a split that is none": _in("data", "validation: 3"),
    "a range that is none": _in("adapter", "layers: 0..3"),
    "a range of a group that is none": _in(
        "train", "optimizer: {groups: {layers: {first: {learning_rate: 1}}}}"
    ),
    "a start that is none": _in("adapter", "init: pissa_niter_0"),
    "two delimiters": _in("data", "format: {delimiter: '||'}"),
    "several problems": "modle: {name: m}\ntask: {type: causal_lm}\ndata: {}\ntrain: {seed: x}\n",
}
CONFLICTS: dict[str, str] = {
    "no rows": "model: {name: m}\ntask: {type: causal_lm}\ndata: {train: train}\n",
    "a Hub data set and files": _in("data", "name: glue"),
    "a configuration of files": _in("data", "config: sst2"),
    "a split column without files": HEAD.replace("path: rows", "split_column: x, train: ./rows"),
    "an encoding": _in("data", "format: {encoding: rot13}"),
    "a layer in two groups": _in(
        "train", "optimizer: {groups: {layers: {0-5: {learning_rate: 1}, '5': {weight_decay: 1}}}}"
    ),
    "a column twice": _in("data", "format: {columns: [a, a]}"),
    "groups and substrings": _in(
        "data", "validation: {fraction: 0.1, group_by: a, disjoint: substring}"
    ),
    "strata without labels": _in("data", "validation: {fraction: 0.1, stratify: true}", CHAT),
    "a label twice": _in("task", "labels: [a, b, a]"),
    "a label that is blank": _in("task", "labels: [a, ' ']"),
    "label columns and names": _in("task", "labels: [a], label_columns: [x, y]"),
    "a label column twice": _in("task", "label_columns: [x, x]"),
    "label columns of numbers": _in("task", "label_columns: [x, y], problem: regression"),
    "label columns and a separator": _in(
        "task", "label_columns: [x, y], label_separator: ',', problem: multi_label"
    ),
    "smoothing": _in("task", "problem: multi_label, label_smoothing: 0.1"),
    "labels of a text file in a table": _in("data", "format: {type: csv, label_from: fasttext}"),
    "labels of lines and paragraphs": _in(
        "data", "format: {label_from: first_word, sample_by: paragraph}"),
    "labels to skip of several": _in("task", "problem: multi_label, skip_labels: ['-']"),
    "a label that is skipped too": _in("task", "labels: [a, b], skip_labels: [b]"),
    "labels of numbers": _in("task", "problem: regression, labels: [a, b]"),
    "weights of numbers": _in("task", "problem: regression, class_weights: balanced"),
    "a separator of one label": _in("task", "label_separator: ','"),
    "half a pair": _in("task", "prompt_column: p", CHAT),
    "two ways to read a row": _in("task", "text_column: t, messages_column: m", CHAT),
    "sharegpt": _in("task", "format: sharegpt", CHAT),
    "biases of an adapter that has none": _in("adapter", "type: loha, bias: all"),
    "frozen layers below adapters": _in("adapter", "type: lora, freeze: 0-5"),
    "frozen layers below a head": _in("adapter", "type: none, freeze: embeddings"),
    "frozen layers of a trained adapter": _in("adapter", "type: bitfit, from: ./old, freeze: '0'"),
    "an adapter for a whole model": _in("adapter", "type: full, from: ./old"),
    "a start of LoRA for another type": _in("adapter", "type: dora, init: pissa"),
    "a start at an adapter and anew": _in("adapter", "from: ./old, init: eva"),
    "dropout of the base's own weights": _in("adapter", "init: pissa_niter_4, dropout: 0.1"),
    "an error of quantising without it": _in("adapter", "init: loftq"),
    "a start from rows that are read once": _in("train", "max_steps: 1",
        _in("data", "streaming: true", _in("adapter", "init: eva"))),
    "DoRA on experts": _in("adapter", "type: dora, target_parameters: [experts.w]"),
    "single rows of a model that is trained in full": _in(
        "adapter", "type: full, train_tokens: [a]"),
    "single rows without an adapter": _in("adapter", "type: none, train_tokens: [a]"),
    "new tokens that are not trained": HEAD.replace("name: m", "name: m, add_tokens: [a]")
        + "adapter: {type: bitfit}\n",
    "tokens of a picture": "model: {name: m, add_tokens: [a]}\n"
        "task: {type: image_classification}\ndata: {path: pictures}\n",
    "dropout on experts": _in("adapter", "dropout: 0.1, target_parameters: [experts.w]"),
    "a start of LoRA for experts": _in(
        "adapter", "init: pissa, target_parameters: [experts.w]"),
    "another rate for factors that are no B": _in(
        "train", "optimizer: {lora_plus_ratio: 4.0}", _in("adapter", "type: loha")),
    "two warm-ups": _in("train", "scheduler: {warmup_steps: 1, warmup_ratio: 0.1}"),
    "epochs and steps": _in("train", "epochs: 1, max_steps: 1"),
    "the longest of rows that are read once": _in("train", "max_steps: 1, "
        "gradient_checkpointing: auto", _in("data", "streaming: true")),
    "packing and grouping": _in("train", "packing: true, group_by_length: true", CHAT),
    "packing a classification": _in("train", "packing: true"),
    "two sizes of a step": _in("train", "gradient_accumulation_steps: 2, examples_per_step: 8"),
    "auto without a step": _in("train", "micro_batch_size: auto"),
    "16 bits and fp32": _in("model", "dtype: bfloat16"),
    "other 16 bits": _in("model", "dtype: float16", _in("train", "precision: bf16")),
    "settings of another optimizer": _in(
        "train", "optimizer: {type: adafactor, betas: [0.8, 0.9], eps: 1.0e-6, momentum: 0.9}"),
    "ranks of another init": _in("adapter", "eva_rho: 3"),
    "streaming without an end": _in("data", "streaming: true"),
    "streaming and all rows": _in("train", "max_steps: 1, packing: true, micro_batch_size: auto, "
        "examples_per_step: 8", _in("data", "streaming: true", CHAT)),
    "streaming a slice": _in("train", "max_steps: 1",
        _in("data", "streaming: true, train: 'train[:9]'")),
    "streaming and drawing": _in("train", "max_steps: 1",
        _in("data", "streaming: true, validation: {fraction: 0.1}")),
    "early stopping without validation": _in("evaluate", "early_stopping: {patience: 1}"),
    "baselines without rows": _in("evaluate", "baselines: [majority]"),
    "baselines of a language model": _in("evaluate", "baselines: [majority]",
        _in("data", "test: ./a.csv", CHAT)),
    "a baseline that is off": _in("evaluate", "baselines: [base], baseline: false",
        _in("data", "test: ./a.csv")),
    "a baseline of an old adapter": _in("adapter", "from: ./old",
        _in("evaluate", "baselines: [base]", _in("data", "test: ./a.csv"))),
    "a baseline that is trained": _in("adapter", "type: none",
        _in("evaluate", "baselines: [none]", _in("data", "test: ./a.csv"))),
    "baselines and streaming": _in("train", "max_steps: 1", _in("evaluate", "baselines: [none]",
        _in("data", "streaming: true, test: ./a.csv"))),
}  # fmt: skip
FLAGS = ["train.epochs", "=1", "train..seed=1", "train.seed=[1", "model.name.x=1", "train.sed=1",
         "train.seed=x", "output_dir=", "output_dir=[a] b", "task.class_weights={a:1}",
         "adapter.rank=!!python/name:os.system", "output_dir=\udcff"]  # fmt: skip


def _recipe(text: str | bytes, *flags: str) -> Callable[[World], Printed]:
    def run(world: World) -> Printed:
        sets = [part for flag in flags for part in ("--set", flag)]
        return world.lora("validate", world.write("recipe.yaml", text), *sets)

    return run


for _name, _text in RECIPES.items():
    CASES.append(Case("Recipes", _name, _recipe(_text)))
for _name, _text in CONFLICTS.items():
    CASES.append(Case("Keys that do not go together", _name, _recipe(_text)))
for _flag in FLAGS:
    CASES.append(Case("Overrides", "", _recipe(HEAD, _flag)))
