"""Input data: corpora, audio, log-mel features, batches."""
