"""Commands of the pods of the extending workflow: the fan-out over the speakers, one added expert, the run of all
experts.

They are configured by variables like the pods of the pipeline (`stages.pod`), and by MOE_ASR_PARENT (a run), _CORPUS,
_SPEAKERS (a JSON list) and _METHOD. All other settings are those of the parent run.
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.config import Config, merge, nest, validate
from common.data.corpus import Corpus
from common.errors import UsageError
from common.inference.load_model import OpenedModel, open_model
from common.model.added_experts import Method
from common.pipeline.plan import Planned
from common.pipeline.runs import run_record, settings_alone
from common.signals import handle_signals
from common.storage import open_store
from common.storage.artifacts import inspect
from common.storage.store import Store
from stages import pod
from stages.extend.enrolment import parse_where
from stages.extend.extension import Plan, Wish, check_experts_stay, join, make, make_plan, slug
from stages.inputs import load_corpus
from stages.local_runner import cache_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """The objects described by the variables."""

    config: Config
    store: Store
    cache: Path
    opened: OpenedModel
    corpus: Corpus

    def plan(self, who: str) -> Plan:
        """The plan for a speaker, or for a group as COLUMN=VALUE."""
        column, value = parse_where(who) if "=" in who else ("speaker", who)
        method = cast(Method, pod.variable("METHOD", "auto"))
        wish = Wish(slug(value), column, value, method, self.config.run, replace=True)
        return make_plan(self.opened, self.corpus, self.config, self.store, wish, check_run=False)


def _work() -> _Work:
    given = pod.config_from_variables()
    store, cache = open_store(given.store, endpoint_url=given.endpoint_url), cache_folder()
    parent = pod.variable("PARENT")
    if not parent or not pod.variable("CORPUS"):
        raise UsageError("parameters parent (a run of the store) and corpus (address of the new speech) are required")
    tree: dict[str, Any] = settings_alone(run_record(store, parent))
    for name in ("run", "store", "endpoint_url", "runtime", "precision"):
        tree[name] = given.model_dump(mode="json")[name]
    merge(tree, nest("corpus.path", pod.variable("CORPUS")))
    opened = open_model(
        parent,
        store=store,
        cache=cache,
        device=given.runtime.device,
        precision=given.precision,
        endpoint_url=given.endpoint_url,
    )
    merge(tree, nest("model.name", str(opened.base)))
    config = validate(tree)
    return _Work(config, store, cache, opened, load_corpus(config, cache))


def speakers() -> list[str]:
    """The list of speakers and groups.

    Raises:
        UsageError: the variable is not a JSON list of names, is empty, or contains a name twice.
    """
    text = pod.variable("SPEAKERS")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f'parameter speakers {text[:80]!r}: write a JSON list, as ["F07", "etiology=ataxia"]')
    if len(set(names)) < len(names):
        raise UsageError("parameter speakers lists a speaker or group twice")
    return names


def plan_all() -> None:
    """Writes one small item for each speaker or group; errors are reported before any expert is made."""
    work, items = _work(), []
    plans = {who: work.plan(who) for who in speakers()}
    names = [plan.request.name for plan in plans.values()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"parameter speakers: two of them would get an expert named {twice[0]!r}; rename one of them")
    check_experts_stay(list(plans.values()), work.store, work.cache)
    lanes = max(1, int(pod.variable("PARALLELISM", "1")))
    for number, (who, plan) in enumerate(plans.items()):
        task = plan.task
        state = inspect(work.store, task.key)
        planned = Planned(task, "done" if state.status == "done" else "todo", state.reason, state.manifest)
        log.info("%s: %s", who, planned.status)
        item = {"who": who, "key": task.key.digest, "lock": pod.digest(work.store.url, task.key.digest)}
        item |= {"memo": pod.memo_key(planned, pod.variable("NONCE", str(time.time()))), "lane": str(number % lanes)}
        items.append(item)
    pod.write_output("extend", items)


def make_one(who: str) -> None:
    """Makes one added expert unless it exists."""
    work = _work()
    memo = pod.variable("MEMO")
    with handle_signals() as stopping:
        made = make(
            work.plan(who),
            work.opened,
            work.corpus,
            work.config,
            work.store,
            work.cache,
            stopping=stopping,
            notes={"memo": memo} if memo else None,
        )
    pod.write_output("result", {"method": made.info.method, "utterances": made.info.utterances})


def join_all() -> None:
    """Writes the run that contains all added experts."""
    work = _work()
    plans = [work.plan(who) for who in speakers()]
    pod.write_output("added", [info.name for info in join(plans, work.store, work.cache)])
