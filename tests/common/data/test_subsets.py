"""Which utterances are evaluated."""

from common.data.corpus import read_corpus
from common.data.subsets import evaluation_subset


def test_the_part_of_test_that_is_looked_at_is_the_same_for_every_seed(tones):
    """Else runs of several seeds could not be compared."""
    corpus = read_corpus(tones)

    def chosen(seed, split):
        return [u.id for u in evaluation_subset(corpus, split, samples=4, seed=seed)]

    assert len(chosen(1, "test")) == 4
    assert all(chosen(seed, "test") == chosen(0, "test") for seed in range(1, 6))
    assert any(chosen(seed, "dev") != chosen(0, "dev") for seed in range(1, 6))
