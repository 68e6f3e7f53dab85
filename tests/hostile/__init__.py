"""Input made to harm: what a store, a corpus, a model file or a network may hold. Each test counts what it tried."""
