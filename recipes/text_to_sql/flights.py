"""A flights-like database and questions about it with their queries, from the grammar in flights.yaml.

The schema is normalised like that of an airline: a simple question joins five tables, and a missing condition causes a
cross join.
"""

import random
import sqlite3
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from recipes.text_to_sql.sql import write_lines


@cache
def grammar() -> dict[str, Any]:
    """The content of flights.yaml."""
    read: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("flights.yaml").read_text(encoding="utf-8"))
    return read


def make_database(path: Path, *, flights: int, seed: int) -> None:
    """Writes an SQLite database with the given number of flights to a new file."""
    chance, words = random.Random(f"database/{seed}"), grammar()
    slots, airports = words["slots"], {code: f"C{city[:3]}" for code, city in words["airports"].items()}
    rows: dict[str, list[tuple[Any, ...]]] = {"flight": [], "flight_day": [], "fare": []}
    for number in range(1, flights + 1):
        leaves = chance.randrange(60, 276) * 5  # minutes since midnight
        lands = min(1435, leaves + chance.randrange(12, 60) * 5)
        clock = [minutes // 60 * 100 + minutes % 60 for minutes in (leaves, lands)]
        kinds = chance.choice(list(slots["airline"].values())), chance.choice(list(words["aircraft"]))
        extras = chance.choice((0, 0, 1, 2)), chance.choice((*slots["meal"], None))
        rows["flight"].append((number, *chance.sample(list(airports), 2), *kinds, *clock, *extras))
        rows["flight_day"] += [(number, day) for day in slots["day"] if chance.random() < 0.6]
        base = chance.randrange(60, 400)
        rows["fare"] += [(number, kind, base * factor) for kind, factor in zip(slots["class"], (4, 2, 1), strict=True)]
    cities = [(f"C{city[:3]}", city) for city in slots["start"]]
    rows |= {"city": cities, "airport": list(airports.items()), "aircraft": list(words["aircraft"].items())}
    rows["airline"] = [(code, name.upper()) for name, code in slots["airline"].items()]
    offers = [(code, kind) for code, _ in cities for kind in slots["transport"] if chance.random() < 0.7]
    rows["ground_service"] = [(*offer, chance.randrange(5, 60)) for offer in offers]
    connection = sqlite3.connect(path)
    connection.executescript(words["schema"])
    for table, values in rows.items():
        connection.executemany(f"INSERT INTO {table} VALUES ({','.join('?' * len(values[0]))})", values)
    connection.commit()
    connection.close()


def make_pair(chance: random.Random) -> tuple[str, str]:
    """One question and its query."""
    words = grammar()
    slots = {name: draw(values, chance) for name, values in words["slots"].items()}
    while slots["end"] == slots["start"]:
        slots["end"] = draw(words["slots"]["end"], chance)
    if chance.random() < 0.08:
        pieces = [chance.choice(words["ground"])]
        select, tables = "ground_service_1.fare", ["ground_service ground_service_1", "city city_1"]
    else:
        question = chance.choice(words["questions"])
        pieces = [question, words["route"], *chance.sample(words["wishes"], chance.choice((0, 1, 1, 2, 2, 3)))]
        select, tables = question["select"], ["flight flight_1"]
    spoken = " ".join(chance.choice(piece["say"]) for piece in pieces)
    tables += [table for piece in pieces for table in piece.get("from", ())]
    where = " AND ".join(condition for piece in pieces for condition in piece.get("where", ()))
    query = f"SELECT {select} FROM {' , '.join(tables)} WHERE {where}"
    said, written = ({name: pair[i] for name, pair in slots.items()} for i in (0, 1))
    return spoken.format_map(said), query.format_map(written)


def draw(values: dict[str, Any] | list[str], chance: random.Random) -> tuple[str, Any]:
    """A random value of a slot: its text in the question and its text in the query."""
    return chance.choice(
        list(values.items()) if isinstance(values, dict) else [(value.lower(), value) for value in values]
    )


def make_pairs(count: int, *, seed: int) -> list[tuple[str, str]]:
    """The given number of distinct questions with their queries."""
    chance = random.Random(f"pairs/{seed}")
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        pairs.setdefault(*make_pair(chance))
    return list(pairs.items())


def write_demo(folder: Path, *, train: int, dev: int, test: int, flights: int, seed: int) -> None:
    """Writes `flights.db`, and `.nl` and `.sql` of train, dev and test."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flights.db").unlink(missing_ok=True)
    make_database(folder / "flights.db", flights=flights, seed=seed)
    pairs = make_pairs(train + dev + test, seed=seed)
    for name, part in {"train": pairs[:train], "dev": pairs[train : train + dev], "test": pairs[train + dev :]}.items():
        for kind, lines in zip(("nl", "sql"), zip(*part, strict=True), strict=True):
            write_lines(folder / f"{name}.{kind}", lines)
