"""Scores of predicted queries, by the records that they return and by their text."""

from collections.abc import Iterable, Mapping, Sequence

from recipes.text_to_sql.sql import Outcome, ResultRow


def record_f1(predicted: Iterable[ResultRow], gold: Iterable[ResultRow]) -> float:
    """F1 of two sets of records; order and repetition do not count, and two empty sets are equal."""
    ours, wanted = set(predicted), set(gold)
    if not ours and not wanted:
        return 1.0
    return 2 * len(ours & wanted) / (len(ours) + len(wanted))


def score(predicted: Sequence[str], gold: Sequence[str], outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """Scores of queries against gold ones, each in 0…1.

    Args:
        predicted, gold: queries, in the same order.
        outcomes: outcome of each query.

    Returns:
        record_f1: mean F1 of the records; 0 where a query or its gold query failed.
        record_em: share of queries with exactly the gold records.
        sql_em: share of queries whose text equals the gold query except for spaces.
        error_rate: share of predicted queries that failed.
    """
    f1 = []
    for query, wanted in zip(predicted, gold, strict=True):
        ours, theirs = outcomes[query], outcomes[wanted]
        f1.append(0.0 if ours.error or theirs.error else record_f1(ours.rows, theirs.rows))
    same = [query.split() == wanted.split() for query, wanted in zip(predicted, gold, strict=True)]
    count = max(1, len(f1))
    return {
        "record_f1": sum(f1) / count,
        "record_em": sum(value == 1 for value in f1) / count,
        "sql_em": sum(same) / count,
        "error_rate": sum(bool(outcomes[query].error) for query in predicted) / count,
    }
