"""Other ways of embedding and clustering a finished run's utterances (`moe-asr clusterings`)."""

from collections.abc import Sequence
from pathlib import Path

from common.clustering.comparison import Source, compare_clusterings, embed_layers
from common.clustering.embeddings import read_tables
from common.config import merge, validate
from common.data.batches import BatchLoader, make_examples
from common.data.subsets import stratified_subset
from common.errors import DataError
from common.inference.load_model import open_model
from common.json_files import Row
from common.pipeline.runs import run_record, settings_alone, stage_folders
from common.storage.store import Store
from stages.inputs import load_corpus, training_subset


def run_clusterings(
    name: str,
    store: Store,
    cache: Path,
    *,
    corpus: str,
    endpoint_url: str | None,
    layers: Sequence[int],
    poolings: Sequence[str],
    samples: int,
    device: str,
) -> list[Row]:
    """A run's utterances, embedded and clustered in several ways.

    Args:
        name: of the run.
        store: holds the run.
        cache: where what is remote is kept.
        corpus: the run's corpus, a folder or an address; its location is not read from the record.
        endpoint_url: endpoint of an S3-compatible store that contains the corpus.
        layers, poolings: further settings to cluster, for which the audio is encoded again.
        samples: number of utterances at most.

    Returns:
        Rows of `compare_clusterings`, each with `own`: whether it is that of the run's configuration.

    Raises:
        DataError: there is no such run, it is not finished, or it has no gate.
    """
    record = run_record(store, name)
    place = {"store": store.url, "endpoint_url": endpoint_url, "corpus": {"path": corpus}}
    tree = settings_alone(record)
    opened = open_model(record["name"], store=store, cache=cache, device=device, precision=tree["precision"])
    merge(tree, place | {"model": {"name": str(opened.base)}})
    config = validate(tree)
    if opened.recogniser.gate is None:
        raise DataError(f"run {record['name']} has at most one expert, and so no gate: name a run with several")
    data, table = load_corpus(config, cache), read_tables(stage_folders(store, record, "extract", cache))
    pool = training_subset(config, data, "embeddings")
    some = stratified_subset(pool, count=samples, seed=config.seed)
    own: Source = (config.extract.layer, config.extract.pooling)
    points = {own: table.rows([u.id for u in some])}
    if layers or poolings:
        examples = make_examples(data, some, opened.codec, context=opened.context, margin=opened.margin)
        points = (
            embed_layers(
                opened.recogniser,
                examples,
                BatchLoader(examples, num_workers=0, device=opened.accelerator.device),
                opened.accelerator,
                layers=sorted(set(layers) or {own[0]}),
                poolings=sorted(set(poolings) or {own[1]}),
                batch_seconds=config.runtime.extract_batch_seconds,
            )
            | points
        )
    options = config.cluster.model_dump(include={"reduce_dim", "min_cluster_size", "min_samples"})
    options |= {"num_clusters": config.num_experts or 1, "seed": config.seed}
    groups = {"etiology": [u.etiology for u in some], "speaker": [u.speaker for u in some]}
    chosen = own, config.cluster.reduce, config.cluster.algorithm
    return [
        row | {"own": ((row["layer"], row["pooling"]), row["reduce"], row["algorithm"]) == chosen}
        for row in compare_clusterings(points, groups, options)
    ]
