"""Speech on its way in: corpora, audio, log-mel features, batches."""
