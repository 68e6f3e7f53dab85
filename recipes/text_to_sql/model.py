"""A T5 that maps questions to queries, by name, from a folder or new and small.

Shape letters: B pairs, O output tokens, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from common.errors import DataError
from common.files import let_others_read
from common.tensors import check_names, check_weights
from recipes.text_to_sql.data import IGNORED, Batch

VOCABULARY = 2000  # tokens of a tokenizer made for a new model
SPECIALS = ("<pad>", "</s>", "<unk>")  # in T5's order


class TextToSql(nn.Module):
    """T5 with its loss: cross-entropy, summed over the tokens of the queries."""

    def __init__(self, t5: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.t5 = t5

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(summed loss, nothing more to log)."""
        logits_BOV = self.t5(
            input_ids=batch.inputs_BI,
            attention_mask=batch.mask_BI,
            decoder_input_ids=self.t5.prepare_decoder_input_ids_from_labels(batch.labels_BO),
            use_cache=False,
        ).logits
        loss = F.cross_entropy(
            logits_BOV.flatten(0, 1).float(), batch.labels_BO.flatten(), reduction="sum", ignore_index=IGNORED
        )
        return loss, {}


def pretrained(name: str, queries: Sequence[str]) -> tuple[TextToSql, Any]:
    """Model and tokenizer of a hub name or folder, made fit for SQL.

    Raises:
        DataError: it cannot be loaded, or is no T5.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        t5, info = T5ForConditionalGeneration.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"--model {name} is no T5 that can be loaded ({first}): give a folder, or a hub name") from None
    check_names(info["unexpected_keys"], info["missing_keys"], f"--model {name}")
    check_weights(t5.state_dict(), f"--model {name}")
    add_missing(tokenizer, queries)
    if len(tokenizer) > t5.config.vocab_size:
        t5.resize_token_embeddings(len(tokenizer))
    return TextToSql(t5), tokenizer


def add_missing(tokenizer: Any, queries: Sequence[str]) -> list[str]:
    """Adds the characters of the queries that the vocabulary lacks; T5's has no `<`, `{` or `~`."""
    characters = sorted(set("".join(queries)) - {" "})
    missing = [
        character
        for character in characters
        if tokenizer.unk_token_id in tokenizer(character, add_special_tokens=False)["input_ids"]
    ]
    tokenizer.add_tokens(missing)
    return missing


def from_scratch(texts: Sequence[str], *, width: int, layers: int, seed: int) -> tuple[TextToSql, Any]:
    """A new T5 of this width and so many layers on each side, with a tokenizer of the texts' own words."""
    tokenizer = make_tokenizer(texts)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=32,
        num_heads=width // 32,
        d_ff=4 * width,
        num_layers=layers,
        num_decoder_layers=layers,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(seed)
    return TextToSql(T5ForConditionalGeneration(config)), tokenizer


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose frequent words, `flight_1.flight_id` for one, are a token each."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^ ]+| +"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIALS), initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad, end, unknown = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown)


def save(model: TextToSql, tokenizer: Any, folder: Path) -> None:
    """Writes a folder that `pretrained` and Hugging Face load."""
    model.t5.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    let_others_read(folder)
