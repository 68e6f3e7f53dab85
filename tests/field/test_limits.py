"""30 s and a sample."""

import numpy as np
import pytest
import torch

from common.data.audit import audit
from common.data.batches import BatchLoader, make_examples
from common.data.tokens import load_codec
from common.errors import DataError
from common.whisper_limits import is_too_long
from tests.factories import write_wav
from tests.field.tables import imported


@pytest.mark.parametrize(("samples", "fits"), [(0, True), (1, True), (159, True), (160, False), (16000, False)])
def test_an_overhang_below_one_frame_is_cut_off(tmp_path, micro_model, samples, fits):
    """Limits by equality meet lengths that are rounded (lhotse-speech/lhotse#208, a difference below one sample)."""
    write_wav(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 480_000 + samples))
    made = imported(tmp_path, "path,text,speaker\na.wav,hello there,s\n")
    kinds = {finding.kind for finding in audit(made.corpus)}
    assert ("too-long" not in kinds) == fits == (not is_too_long(made.corpus.utterances[0].duration))
    codec = load_codec(micro_model)
    if fits:
        examples = make_examples(made.corpus, made.corpus.utterances, codec, context="dynamic", margin=64)
        (batch,) = BatchLoader(examples, num_workers=0, device=torch.device("cpu"))([[0]])
        assert batch.audio_BS.shape[1] == 480_000
    else:
        with pytest.raises(DataError, match="over Whisper's 30 s"):
            make_examples(made.corpus, made.corpus.utterances, codec, context="dynamic", margin=64)
