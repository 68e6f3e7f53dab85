"""Functions for the pods of the workflow: configuration from variables, lists for the fan-outs, and small files that
become output parameters.

Everything in this module also runs outside of a cluster: `MOE_ASR_STORE=s3://… python -m stages plan`.
"""

import hashlib
import json
import logging
import os
import time
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.config import Config, parse_yaml, resolve
from common.console import echo
from common.errors import ConfigError, MoeAsrError, UsageError
from common.json_files import to_json
from common.options import parse_setting
from common.pipeline.plan import Plan, Planned
from common.storage import open_store
from common.storage.manifest import KEY_DIGEST
from stages import STAGES
from stages.local_runner import Run, finish, quarantine_stale, read_record

log = logging.getLogger(__name__)
PREFIX = "MOE_ASR_"


def variable(name: str, default: str = "") -> str:
    """The value of `MOE_ASR_<name>`, stripped; the default where it is empty or unset."""
    return os.environ.get(PREFIX + name, "").strip() or default


def in_pod() -> bool:
    """Whether this process is configured by variables: one of them names a store, or the workflow."""
    return bool(variable("STORE") or variable("WORKFLOW"))


def config_from_variables() -> Config:
    """The configuration that the workflow's parameters describe, merged as `moe-asr run` merges its options.

    The variables are MODE, CONFIG (YAML text), GPU, SETTINGS (`section.key=value` lines), STORE, ENDPOINT_URL, RUN and,
    for an extension, PARENT, from which the default of RUN is made.

    Raises:
        ConfigError: CONFIG is not a YAML mapping, or a value does not validate.
        UsageError: a store that only this pod could see.
    """
    chosen: dict[str, Any] = dict(parse_setting(line) for line in variable("SETTINGS").splitlines() if line.strip())
    parent = variable("PARENT")
    run = variable("RUN", f"{parent}-extended" if parent else "")
    places = {"store": variable("STORE"), "endpoint_url": variable("ENDPOINT_URL"), "run": run}
    places |= {"runtime.processes": variable("GPUS")}  # of joint training, each of which has a process
    chosen |= {path: value for path, value in places.items() if value}
    tree = config_text(variable("CONFIG"))
    mode = variable("MODE") or (None if tree else "full")
    config = resolve(mode, tree=tree, gpu=variable("GPU") or None, options=chosen)
    if "://" not in config.store and not Path(config.store).is_absolute():
        raise UsageError(
            f"store {config.store!r} would vanish with its pod: give s3://bucket/prefix, or a mounted folder"
        )
    return config


def config_text(text: str) -> dict[str, Any]:
    """The mapping in a configuration's text; empty for an empty one.

    Raises:
        ConfigError: it is not YAML, or no mapping.
    """
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"parameter config is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"parameter config must contain a mapping of sections (found {type(tree).__name__})")
    return tree


def memo_key(planned: Planned, nonce: str) -> str:
    """Name of a task in the workflow engine's cache, which does not check whether an artifact still exists.

    A finished task keeps the name under which it was made; an unfinished task gets a new name, so that an old cache
    entry cannot hide a lost or damaged artifact.

    Args:
        nonce: differs between workflows, but not between the tries of one workflow.
    """
    key = planned.task.key.digest
    if planned.status == "done" and planned.manifest is not None:
        memo = planned.manifest.metrics.get("memo")
        known = isinstance(memo, str) and KEY_DIGEST.fullmatch(memo)  # it becomes a name in the cluster
        return str(memo) if known else digest(key, planned.manifest.attempt)
    return digest(key, nonce)


def digest(*parts: str) -> str:
    """A digest of these texts, as 32 hex digits."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]


def fan_out_lists(plan: Plan, store_url: str, nonce: str, lanes: int) -> dict[str, list[dict[str, str]]]:
    """Stage → one small item per task, for the workflow's fan-outs; empty for stages that are not needed or not
    known yet.

    An item's `lock` is the same in all workflows that would run the same task in the same store; its `lane` is one of
    `lanes` numbers, and only one task per lane runs at once.

    Args:
        lanes: number of tasks of one stage that may run at once.
    """
    lists: dict[str, list[dict[str, str]]] = {contract.name: [] for contract in STAGES}
    for planned in plan.planned:
        task = planned.task
        number = task.shard or 0
        item = {"shard": str(number), "key": task.key.digest, "memo": memo_key(planned, nonce)}
        item |= {"lock": digest(store_url, task.key.digest), "lane": str(number % lanes)}
        lists[task.contract.name].append(item)
    return lists


def plan_stage(stage: str) -> None:
    """Reads the store and writes the fan-out list of one stage, or of all known stages if none is named.

    The known tasks are written to the run's record, which the first plan of a workflow opens.
    """
    config = config_from_variables()
    first = not stage
    run = Run(config, None if first else variable("MODEL"))
    if first:
        run.check_same(variable("RESUME") == "true")
    plan = run.plan(deep=first and variable("VERIFY") == "true")
    _say(plan, stage)
    if first:
        quarantine_stale(run.store, plan.planned)
        run.record["workflow"] = variable("WORKFLOW")
    run.save("running", plan)
    lanes = max(1, int(variable("PARALLELISM", "1")))
    lists = fan_out_lists(plan, run.store.url, variable("NONCE", str(time.time())), lanes)
    for name, items in lists.items():
        if first or name == stage:
            write_output(name, items)
    if first:
        write_output("model", run.sources["model"])


def _say(plan: Plan, stage: str) -> None:
    for planned in plan.planned:
        if not stage or planned.task.contract.name == stage:
            log.info("%s: %s, %s", planned.task.label, planned.status, planned.reason)
    if not stage:
        for contract in plan.open_ended:
            log.info("%s: its tasks are known once the stage before it is done", contract.name)


def write_output(name: str, value: Any) -> None:
    """Writes a JSON file that becomes an output parameter of the pod; prints it where no folder is given."""
    folder = variable("OUTPUTS")
    if not folder:
        echo(json.dumps({name: value}))
        return
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, separators=(",", ":")), encoding="utf-8")


def write_report() -> dict[str, Any]:
    """Writes summary and report of a run whose stages are done, and the rates as output parameters.

    Raises:
        MoeAsrError: a stage is not done.
    """
    run = Run(config_from_variables(), variable("MODEL"))
    plan = run.plan()
    missing = [p for p in plan.planned if p.status != "done"]
    if missing or plan.open_ended:
        unfinished = "; ".join(f"{p.task.label}: {p.reason}" for p in missing[:3]) or plan.open_ended[0].name
        raise MoeAsrError(f"the run is not complete ({unfinished}): submit it again")
    started = float(variable("STARTED", "0"))
    for planned in plan.planned:
        if planned.manifest is not None:
            run.note(planned.task, planned.manifest, ran=planned.manifest.started >= started)
    summary = finish(run, plan)
    for name in ("wer_before", "wer_after"):
        write_output(name.replace("_", "-"), summary.get(name))
    folder = variable("OUTPUTS")
    if folder:
        for name in ("report.html", "summary.json"):
            run.store.get(f"{run.config.run}/{name}", Path(folder) / name)
    return summary


def write_outcome(status: str, failures: str) -> dict[str, Any]:
    """Writes the result of a workflow and its failures to the store, and posts them to a webhook if one is given.

    Args:
        status: Argo's status of the workflow.
        failures: Argo's JSON list of failed nodes.
    """
    outcome: dict[str, Any] = {
        "workflow": variable("WORKFLOW"),
        "status": status,
        "finished": time.time(),
        "failures": failed_nodes(failures),
    }
    try:
        config = config_from_variables()
        outcome["run"] = config.run
        _store_outcome(config, outcome)
    except MoeAsrError as error:  # the cause of the failure may prevent storing this, but not posting it
        log.warning("the outcome is not in the store: %s", error)
    _post(variable("WEBHOOK"), outcome)
    return outcome


def _store_outcome(config: Config, outcome: Mapping[str, Any]) -> None:
    store = open_store(config.store, endpoint_url=config.endpoint_url)
    store.write(f"{config.run}/outcome.json", to_json(outcome))
    record = read_record(store, config.run)
    if record and outcome["status"] != "Succeeded" and record.get("workflow") == outcome["workflow"]:
        record |= {"status": "failed", "updated": time.time()}
        store.write(f"{config.run}/run.json", to_json(record))


def failed_nodes(text: str) -> list[dict[str, str]]:
    """The failed pods and their messages from Argo's `workflow.failures`; nodes that only propagate a failure are left
    out.
    """
    try:
        nodes: Sequence[Mapping[str, Any]] = json.loads(json.loads(text) if text.startswith('"') else text or "[]")
    except (ValueError, RecursionError):
        return [{"task": "?", "message": text[:500]}]
    messages = [n for n in nodes or [] if n.get("message") and not str(n["message"]).startswith("child '")]
    return [{"task": str(n.get("displayName", "")), "message": str(n["message"])} for n in messages]


def _post(url: str, outcome: Mapping[str, Any]) -> None:
    if not url:
        return
    body = json.dumps(outcome).encode()
    host = None
    try:
        host = urlsplit(url).hostname
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        urllib.request.urlopen(request, timeout=10).close()
    except (OSError, ValueError, HTTPException) as error:
        # Of the address its host alone: chat services put their secret into the path.
        log.warning("webhook at %s: %s", host, type(error).__name__)
