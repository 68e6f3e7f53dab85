"""What every stage shares: corpus, model, mixture, training loop, artifacts, evaluation."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("moe-asr")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
