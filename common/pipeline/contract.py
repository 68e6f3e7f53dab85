"""The declaration of a stage: a single source that does not import torch.

The local runner, the workflow, the help texts, the dry run and the drift tests read these declarations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from common.config import Config
from common.data.corpus import Corpus
from common.storage.manifest import Manifest

FanOut = Callable[[Config, Corpus, Mapping[str, Manifest]], int | None]

# Files whose bytes may differ between equal runs: they are not part of an artifact's content digest. The two
# descriptions name where the base model was found, on this machine or in a bucket; its content is in the key. The
# projection is drawn only, by a method that is in no key.
VOLATILE = (
    "*.png",
    "*.svg",
    "*.log",
    "projection.jsonl",
    "throughput.json",
    "*adapter_config.json",
    "*recogniser.json",
)


@dataclass(frozen=True, slots=True)
class Contract:
    """Contract of one stage.

    Attributes:
        name: name of the stage and of its folder in the store.
        summary: one line for help texts.
        output: name of the folder that it writes, and of the argument by which later stages receive it.
        inputs: outputs of earlier stages that it reads; outputs of inactive stages are omitted.
        sources: `corpus` and/or `model`, fetched by the pipeline.
        reads: sections or keys of the configuration that its result depends on.
        format: version of the output format; incremented when the same inputs give another output.
        fan_out: (config, corpus, manifests of finished stages) → number of shards, None while unknown; a stage without
            this function has one task.
        active: whether a configuration needs the stage.
        gpus: number of GPUs that it requests on a cluster; 0 runs on CPU nodes.
        together: whether `runtime.processes` processes work on it together, with one GPU each.
        part_of: the stage whose folder, image and section of the configuration it shares; empty if it has its own.
    """

    name: str
    summary: str
    output: str
    inputs: tuple[str, ...] = ()
    sources: tuple[Literal["corpus", "model"], ...] = ()
    reads: tuple[str, ...] = ()
    format: int = 1
    fan_out: FanOut | None = None
    active: Callable[[Config], bool] = lambda config: True
    gpus: int = 0
    together: bool = False
    part_of: str = ""

    @property
    def section(self) -> str:
        """The folder, the image and the section of the configuration that belong to it."""
        return self.part_of or self.name

    def processes(self, config: Config) -> int:
        """Number of processes that work together on one task."""
        return config.runtime.processes if self.together else 1
