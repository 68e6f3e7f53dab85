"""What a run leaves in a store and in a cluster, from its parts: objects, and the size of the Workflow object."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

# Objects that each part of a finished run leaves, manifests included, plots not (tests count them in a real run).
PER_SHARD = 3  # manifest.json, embeddings.npy, ids.json
PER_EXPERT = 7  # five of its own pre-training, two in the final model
FIXED = 22  # four of cluster, five of gating, nine of asr, four of the run


def objects(count: int, experts: int, shard_size: int = 20_000) -> Row:
    """Objects of a finished run in the store.

    Args:
        count: utterances that are embedded.
    """
    shards = -(-count // shard_size)
    total = PER_SHARD * shards + PER_EXPERT * experts + FIXED
    return {"utterances": count, "shards": shards, "experts": experts, "objects": total}


def workflow_size(pieces: int) -> Row:
    """Bytes of a finished Workflow object with so many pieces (shards and experts together) that never failed.

    The specification is the template's own (Argo stores it with the workflow); each piece has three nodes, with the
    fields that Argo 4 fills, and its item stands in the outputs of the plan's two nodes.
    """
    from argo.workflow import build

    specification = json.dumps(build().to_dict()["spec"], separators=(",", ":"))
    nodes = {node["id"]: node for number in range(pieces) for node in _nodes(number)}
    items = [
        {name: _hash(number, name) for name in ("shard", "key", "memo", "lock", "lane")} for number in range(pieces)
    ]
    listed = json.dumps(items, separators=(",", ":"))
    status = json.dumps(
        {"nodes": nodes, "plans": [{"outputs": listed}] * 2, "children": list(nodes)}, separators=(",", ":")
    )
    compressed = 4 * len(gzip.compress(status.encode())) // 3  # as base64
    return {
        "pieces": pieces,
        "specification": len(specification),
        "bytes": len(specification) + len(status),
        "compressed": len(specification) + compressed,
        "per_piece": round(len(status) / pieces),
        "compressed_per_piece": round(compressed / pieces),
    }


def _hash(number: int, name: str) -> str:
    return str(number) if name in ("shard", "lane") else hashlib.sha256(f"{number}{name}".encode()).hexdigest()[:32]


def _nodes(number: int) -> Iterator[Row]:
    """DAG, Retry and Pod of one piece."""
    item = {name: _hash(number, name) for name in ("key", "lane", "lock", "memo", "shard")}
    base = f"moe-asr-x7k2p.experts({number}:{','.join(f'{name}:{value}' for name, value in item.items())})"
    inputs = [{"name": name, "value": value} for name, value in item.items()]
    inputs.append({"name": "model", "value": f"sha256:{_hash(0, 'a')}{_hash(0, 'b')}"})
    result = json.dumps({"key": item["key"], "seconds": 1234.5, "status": "done", "wer": 0.1234, "steps": 12345})
    for kind, suffix in (("DAG", ""), ("Retry", ".pod"), ("Pod", ".pod(0)")):
        yield {
            "id": f"moe-asr-x7k2p-{int(_hash(number, kind)[:8], 16)}",
            "name": base + suffix,
            "displayName": base.partition(".")[2] if kind == "DAG" else suffix[1:],
            "type": kind,
            "templateName": "experts" if kind == "DAG" else "experts-pod",
            "templateScope": "local/",
            "phase": "Succeeded",
            "boundaryID": "moe-asr-x7k2p-1003400323",
            "startedAt": "2026-11-21T16:02:05Z",
            "finishedAt": "2026-11-21T16:04:23Z",
            "estimatedDuration": 138,
            "progress": "1/1",
            "resourcesDuration": {"cpu": 138, "memory": 1104, "nvidia.com/gpu": 138},
            "inputs": {"parameters": inputs},
            "outputs": {"parameters": [{"name": "result", "value": result, "valueFrom": {"path": "/x/result.json"}}]},
            "children": ["moe-asr-x7k2p-2052551396"],
            "outboundNodes": ["moe-asr-x7k2p-2052551396"],
            "hostNodeName": "node-name-of-some-length-0.region.internal",
            "memoizationStatus": {"hit": False, "key": item["memo"], "cacheName": "moe-asr-cache"},
        }
