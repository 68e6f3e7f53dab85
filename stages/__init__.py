"""The five stages: a contract and a run function each, in the order in which data flows."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from common.pipeline.contract import Contract
from stages.asr import CONTRACT as ASR
from stages.cluster import CONTRACT as CLUSTER
from stages.experts import CONTRACT as EXPERTS
from stages.extract import CONTRACT as EXTRACT
from stages.gating import CONTRACT as GATING

STAGES: tuple[Contract, ...] = (EXTRACT, CLUSTER, GATING, EXPERTS, ASR)


def run_function(name: str) -> Callable[..., None]:
    """The function of a stage; imports torch."""
    function: Callable[..., None] = import_module(f"stages.{name}.run").run
    return function
