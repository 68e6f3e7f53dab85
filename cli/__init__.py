"""The console command `moe-asr`."""
