"""Data and metric of tagging.py: sentences with tagged names and places, and the F1 of whole entities."""

import random

import torch

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
NAMES = [
    line.split() for line in ("Paris", "Paris Hall", "Ann Lee", "Jordan", "Austin Wood", "Lima Diaz", "Kim", "Sofia")
]
PLACES = [line.split() for line in ("Paris", "New York", "Jordan", "Austin", "Lima", "Sofia", "Port Said", "Kim Park")]
TEXTS = [
    "LOC lies in the south",
    "PER saw LOC , and PER did not",
    "they left LOC for LOC with PER",
    "PER won",
    "in LOC it rains",
]
VOCABULARY = ["", *sorted({word for line in [*NAMES, *PLACES, *map(str.split, TEXTS)] for word in line})]


def sentences(number, seed):  # (words, tags) as numbers
    chance, found = random.Random(seed), []
    for _ in range(number):
        pairs = []
        for word in chance.choice(TEXTS).split():
            of = {"PER": NAMES, "LOC": PLACES}.get(word)
            part = chance.choice(of) if of else [word]
            pairs += [(w, f"{'BI'[i > 0]}-{word}" if of else "O") for i, w in enumerate(part)]
        found.append(tuple(torch.tensor([p.index(x) for x in xs]) for p, xs in zip((VOCABULARY, TAGS), zip(*pairs))))
    return found


def spans(sentences):
    found = set()
    for number, tags in enumerate(sentences):
        for first, tag in enumerate(tags):
            if tag.startswith("B"):
                last = next((i for i in range(first + 1, len(tags)) if tags[i] != f"I{tag[1:]}"), len(tags))
                found.add((number, first, last, tag[2:]))
    return found


def f1(true, predicted):  # of entities: all of their words, and the kind
    true, predicted = spans(true), spans(predicted)
    return 2 * len(true & predicted) / max(1, len(true) + len(predicted))
