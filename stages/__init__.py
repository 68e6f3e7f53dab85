"""The five stages: a contract and a run function each, in the order in which data flows.

`experts` has a second contract for its first part, `shared`: the shared expert, where it is pre-trained before the
routed experts.
"""

from collections.abc import Callable
from importlib import import_module

from common.pipeline.contract import Contract
from stages.asr import CONTRACT as ASR
from stages.cluster import CONTRACT as CLUSTER
from stages.experts import CONTRACT as EXPERTS
from stages.experts import SHARED
from stages.extract import CONTRACT as EXTRACT
from stages.gating import CONTRACT as GATING

STAGES: tuple[Contract, ...] = (EXTRACT, CLUSTER, GATING, SHARED, EXPERTS, ASR)


def run_function(name: str) -> Callable[..., None]:
    """The function of a stage; imports torch."""
    contract = next(contract for contract in STAGES if contract.name == name)
    module = f"stages.{contract.part_of}.{name}" if contract.part_of else f"stages.{name}.run"
    function: Callable[..., None] = import_module(module).run
    return function
