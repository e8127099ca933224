"""The nearest neighbour: what an answer is worth that was only looked up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

__all__ = ["jaccard_nearest", "tf_idf_nearest"]


def jaccard_nearest(known: Sequence[str]) -> Callable[[str], int]:
    """A function from a text to the index of the known text that shares most of its words with it (intersection over
    union of the word sets; the first of equals)."""
    sets = [frozenset(text.split()) for text in known]

    def nearest(text: str) -> int:
        words = frozenset(text.split())
        shares = [len(words & other) / max(1, len(words | other)) for other in sets]
        return shares.index(max(shares))

    return nearest


def tf_idf_nearest(known: Sequence[str]) -> Callable[[str], int]:
    """A function from a text to the index of the known text with the largest cosine of word counts, each word weighted
    by log(texts / texts with it) (the first of equals). Words of no known text have no weight."""
    counts = [Counter(text.split()) for text in known]
    texts_with = Counter(word for count in counts for word in count)
    weight = {word: math.log(len(known) / texts) for word, texts in texts_with.items()}

    def vector(count: Counter[str]) -> dict[str, float]:
        weighed = {word: number * weight[word] for word, number in count.items() if word in weight}
        length = math.sqrt(sum(value * value for value in weighed.values())) or 1.0
        return {word: value / length for word, value in weighed.items()}

    vectors = [vector(count) for count in counts]

    def nearest(text: str) -> int:
        own = vector(Counter(text.split()))
        cosines = [sum(value * other.get(word, 0.0) for word, value in own.items()) for other in vectors]
        return cosines.index(max(cosines))

    return nearest
