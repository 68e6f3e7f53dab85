"""A configuration that cannot be is refused at once, in one short line, and no password of it is shown or kept."""

import json
import time

import pytest
from click.testing import CliRunner

from cli.main import cli
from common.config import Config, parse_yaml, resolve, validate
from common.errors import ConfigError, UsageError
from common.options import parse_setting
from common.storage import open_store
from stages.pod import config_text

SECRET = "passWORD"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
VALUES = ("-1", "1" + "0" * 30, ".inf", "-.inf", ".nan", "0x" + "f" * 5000, "9" * 5000, "[1]", "{}", "null", "''")
COUNTS = ("seed", "num_experts", "asr.epochs", "audio.margin")
RATES = ("asr.learning_rate", "lora.alpha", "runtime.checkpoint_minutes")
TEXTS = {
    "bomb": BOMB + "seed: *i",
    "loop": "seed: &a [*a]",
    "merge": "x: &a {seed: 1}\n<<: *a",
    "deep": "seed: " + "[" * 500_000,
    "deep mapping": "{a: " * 200_000,
    "deep block": "".join(f"{' ' * depth}a:\n" for depth in range(1200)),
    "long": "# " + "x" * 2**20,
    "date": "seed: 2020-99-99",
    "long name": "a" * 100_000 + ": 1",
    "names": "".join(f"n{i}: 1\n" for i in range(2000)),
    "number as a name": "1: 2",
    "object": "!!python/object/apply:os.system ['true']",
    "control": "seed: \x00",
    "tab": "seed:\t- a\n\t- b",
    "section": "asr: 7",
    "nothing": "asr:",
    "float": "asr: {learning_rate: 1e999}",
    "huge": "asr: {epochs: 1" + "0" * 30 + "}",
}


def refusal(act):
    """The error's text; None where it was accepted."""
    started = time.process_time()
    try:
        act()
    except (ConfigError, UsageError) as error:
        told = str(error)
        assert "\n" not in told and len(told) < 500, told
        return told
    finally:
        assert time.process_time() - started < 5


@pytest.mark.parametrize("path", [*COUNTS, *RATES])
def test_no_number_that_no_run_can_have_is_accepted(path, tally):
    fine = {"num_experts": {"null"}} | {rate: {VALUES[1]} for rate in RATES}
    for value in VALUES:
        told = refusal(lambda value=value: resolve(None, options=dict([parse_setting(f"{path}={value}")])))
        assert (told is None) == (value in fine.get(path, ())), (value, told)
    tally(len(VALUES))


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, float("nan"), float("inf"), 1.5])
def test_seeds_are_numbers_that_all_generators_take(seed):
    assert refusal(lambda: validate({"seed": seed})).startswith("seed: ")
    assert validate({"seed": 2**32 - 1}).seed == 2**32 - 1


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_configuration_is_refused_in_one_short_line(name, tmp_path):
    (tmp_path / "c.yaml").write_text(TEXTS[name])
    assert refusal(lambda: resolve(None, file=tmp_path / "c.yaml"))
    assert refusal(lambda: resolve(None, tree=config_text(TEXTS[name])))


def test_what_is_written_is_read_back():
    from common.config import to_yaml

    config = resolve("demo")
    assert validate(parse_yaml(to_yaml(config))) == config


# Secrets

ADDRESSES = {
    "endpoint_url": [f"http://user:{SECRET}@host:9000", f"user:{SECRET}@host:9000", f"https://host/?token={SECRET}"],
    "store": [f"s3://KEY:{SECRET}@bucket/runs"],
    "corpus.path": [f"s3://KEY:{SECRET}@bucket/corpus", f"https://user:{SECRET}@host/x"],
    "model.name": [f"https://user:{SECRET}@host/model"],
}


@pytest.mark.parametrize(("path", "address"), [(path, address) for path, some in ADDRESSES.items() for address in some])
def test_an_address_with_a_password_is_refused_without_it(path, address, tmp_path, monkeypatch):
    words = ["--set", f"{path}={json.dumps(address)}"]
    for command in (["config", "show"], ["run", "--dry-run"], ["submit", "--dry-run"]):
        done = CliRunner().invoke(cli, [*command, *words])
        assert isinstance(done.exception, ConfigError), (command, done.output)
        assert SECRET not in f"{done.output}{done.exception}" and path in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ADDRESSES["endpoint_url"])
@pytest.mark.parametrize("store", ["s3://bucket/x", "folder"])
def test_no_store_is_opened_with_a_password_in_its_endpoint(store, url):
    with pytest.raises(ConfigError, match="endpoint_url contains credentials") as told:
        open_store(store, endpoint_url=url)
    assert SECRET not in str(told.value)


def test_addresses_without_a_password_are_fine():
    config = validate({"endpoint_url": "http://host:9000", "corpus": {"path": "data/a@b"}, "store": "s3://b/a@b"})
    assert isinstance(config, Config)
