"""Split twelve intents of Banking77: many labels for a teacher, two per intent for a student."""

import csv
import random
import sys
from collections import defaultdict

folder, to = sys.argv[1:3]


def read(name: str) -> dict[str, list[dict[str, str]]]:
    """Return the rows of the first twelve intents, by intent."""
    rows = defaultdict(list)
    with open(f"{folder}/{name}.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["category"]].append(row)
    return {intent: rows[intent] for intent in sorted(rows)[:12]}


def write(name: str, rows: list[dict[str, str]]) -> None:
    """Write rows in random order."""
    random.Random(1).shuffle(rows)
    with open(f"{to}/{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "category"])
        writer.writeheader()
        writer.writerows(rows)


train = read("train")
for rows in train.values():
    random.Random(0).shuffle(rows)
few = [row for rows in train.values() for row in rows[50:52]]
unlabelled = [row | {"category": ""} for rows in train.values() for row in rows[52:100]]
write("teacher", [row for rows in train.values() for row in rows[:50]])
write("few", list(few))
write("few_and_unlabelled", few + unlabelled)
write("test", [row for rows in read("test").values() for row in rows])
