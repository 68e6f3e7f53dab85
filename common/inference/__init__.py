"""Any model by name or path, and transcripts from it: short and long audio, segmentation, subtitles."""
