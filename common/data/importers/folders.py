"""Data files of a folder, and the kind of a folder."""

from collections.abc import Iterable, Iterator
from pathlib import Path

# Files of operating systems and tools: macOS's copies of attributes, notebooks' checkpoints, bins.
LEFTOVERS = frozenset({"__MACOSX", ".ipynb_checkpoints", ".Trashes", "$RECYCLE.BIN", "@eaDir"})

# A pattern of files that is typical → what the folder is and what to do with it.
_KINDS = {
    "index.jsonl": "it is a corpus already (index.jsonl): use it as it is",
    "*.arrow": "it is what Hugging Face's `save_to_disk` wrote: write the audio to files, and a metadata.csv",
    "**/*.parquet": "it holds Parquet files: write the audio to files, and a metadata.csv",
    "wav.scp": "it is a Kaldi data folder: write a table of audio_filepath, text, speaker, start, end from its files",
    "*cuts*.jsonl*": "it holds manifests of Lhotse: write a table of audio_filepath, offset, duration, text from them",
    "clips/*": "it looks like Common Voice: `moe-asr corpus import validated.tsv OUT --audio-root clips`",
    "**/*.trans.txt": "it looks like LibriSpeech: write a table of audio_filepath, text, speaker from its *.trans.txt",
    "**/*.TextGrid": "it holds TextGrids: write a table of audio_filepath, start, end, text from them",
    "**/*.eaf": "it holds ELAN's files: export them as tab-delimited text, with begin, end and the name of the audio",
    "**/prompts/*.txt": "it looks like TORGO: add --format torgo",
    "*.zip": "it holds archives: unpack them first",
    "*.tar*": "it holds archives: unpack them first",
    **dict.fromkeys(("*.csv", "*.tsv", "*.jsonl"), "name the table itself, not its folder"),
    "**/*.json": "name the table itself, not its folder; for Speech Accessibility Project data, add --format sap",
}


def visible_files(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    """Files below a folder with one of these suffixes (lower case), in order, without files of operating systems."""
    wanted = frozenset(suffixes)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in wanted and is_data(path, folder) and path.is_file():
            yield path


def is_data(path: Path, folder: Path) -> bool:
    """Whether a path below a folder is data, not a file of an operating system."""
    return not path.name.startswith("._") and LEFTOVERS.isdisjoint(path.relative_to(folder).parts)


def kind_of_folder(folder: Path) -> str:
    """The kind of a folder in another format, and what to do with it, as the end of an error message."""
    if not folder.is_dir():
        return "it does not exist or is not a folder: check the path"
    for pattern, kind in _KINDS.items():
        if next(folder.glob(pattern), None) is not None:
            return kind
    return "make a table of audio_filepath, text, speaker, and import that"
