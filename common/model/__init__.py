"""The model: Whisper, the mixture in its layers, the gate, and how they are kept and exported."""
