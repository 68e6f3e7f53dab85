"""From audio to text: decoding, alignment, audio of any length."""
