"""What a run says of its corpus: one sentence for each kind."""

import pytest

from common.evaluation.routing_hint import corpus_hint


def judged_rows(*intervals):
    return [{"gain_interval": interval, "utterances": 5} for interval in intervals]


UNUSED = {"gain_interval": None, "utterances": 0}  # no utterance of dev chooses it
EARNED = [*judged_rows([0.1, 0.2], [-0.1, 0.1]), UNUSED]
NONE_EARNED = [*judged_rows([-0.1, 0.1], None), UNUSED]


def hint(utterance, speaker, *, judged=EARNED, rand=1.0, route_by="utterance", target="cluster", groups="etiology"):
    new = {"groups": groups, "utterance_accuracy": utterance, "speaker_accuracy": speaker}
    gate = {"target": target, "held_out_speakers": new}
    return corpus_hint(gate, {"adjusted_rand": {"etiology": rand}}, judged, route_by=route_by, routed=2)


def test_groups_that_are_heard_in_one_utterance_need_nothing_else():
    told = hint(0.97, 1.0)
    assert told.startswith("One utterance identifies the group") and "97%" in told
    assert told.endswith("routing by utterance fits it.")


def test_clusters_that_are_other_groups_than_the_audible_ones_suggest_labels_as_the_target():
    assert "adjusted Rand index 0.10); try --set gating.target=etiology." in hint(0.97, 1.0, rand=0.1)
    assert "gating.target" not in hint(0.97, 1.0, rand=0.1, target="etiology")


def test_groups_that_all_of_a_speakers_utterances_tell_suggest_routing_by_speaker_or_by_table():
    told = hint(0.75, 0.96, rand=0.1)
    assert told.startswith("Groups sound alike") and "75% of cases" in told and "96%" in told
    assert "--set asr.route_by=speaker --set gating.target=etiology" in told
    assert "--set asr.route_by=table --set asr.route_column=etiology" in told
    assert hint(0.75, 0.96, target="etiology", route_by="speaker").endswith("routing by speaker fits it.")


def test_groups_that_nothing_tells_suggest_a_table():
    told = hint(0.3, 0.4)
    assert told.startswith("Utterances do not identify the group") and told.endswith("asr.route_column=etiology.")


def test_experts_that_bring_nothing_suggest_one_adapter():
    assert hint(0.97, 1.0, judged=NONE_EARNED).endswith("(--num-experts 1) is simpler and as good.")
    assert corpus_hint(None, None, NONE_EARNED, route_by="table", routed=2).startswith("None of the 2 routed experts")
    assert "--num-experts" not in hint(0.75, 0.96, judged=NONE_EARNED)  # other routing comes first


@pytest.mark.parametrize("told", [{}, {"held_out_speakers": None}])
def test_without_labels_only_the_experts_are_spoken_of(told):
    assert corpus_hint(told, {}, EARNED, route_by="utterance", routed=2) == ""
    assert hint(0.2, 0.9, groups="cluster") == ""


def test_one_adapter_gets_no_hint():
    assert corpus_hint(None, None, [], route_by="utterance", routed=1) == ""
