"""Joint training: what its random parts are made from."""

import numpy as np
import torch

from common.clustering.embeddings import EmbeddingTable
from common.config import validate
from stages.asr.run import build


def test_a_random_gate_takes_its_scale_from_the_training_utterances_alone(micro_model):
    config = validate({"num_experts": 2, "asr": {"pretrain": "none"}, "lora": {"targets": ["fc1"]}})
    vectors_ND = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    vectors_ND[4:] += 100  # dev and test are elsewhere
    table = EmbeddingTable(tuple("abcdef"), vectors_ND)
    gates = [build(config, micro_model, table, [], [], fit=fit).gate for fit in (["d", "b", "a", "c"], None)]
    for gate, rows_ND in zip(gates, (vectors_ND[:4], vectors_ND), strict=True):
        torch.testing.assert_close(gate.mean_D, torch.from_numpy(rows_ND.mean(0)))
        torch.testing.assert_close(gate.std_D, torch.from_numpy(rows_ND.std(0)))
