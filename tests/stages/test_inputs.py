"""Which utterances are evaluated."""

from common.config import validate
from common.data.corpus import read_corpus
from stages.inputs import evaluation_subset


def test_the_part_of_test_that_is_looked_at_is_the_same_for_every_seed(tones):
    """Else runs of several seeds could not be compared."""
    corpus = read_corpus(tones)

    def chosen(seed, split):
        tree = {"corpus": {"path": str(tones)}, "model": {"name": "openai/whisper-tiny"}, "num_experts": 1}
        config = validate(tree | {"seed": seed, "subsets": {"dev_samples": 4, "test_samples": 4}})
        return [u.id for u in evaluation_subset(config, corpus, split)]

    assert len(chosen(1, "test")) == 4
    assert all(chosen(seed, "test") == chosen(0, "test") for seed in range(1, 6))
    assert any(chosen(seed, "dev") != chosen(0, "dev") for seed in range(1, 6))
