"""The peer of the regimes: plain LoRA of Hugging Face PEFT, trained by Seq2SeqTrainer on 30 s of padded audio.

python -m bench.peft --config bench/regimes.yaml --seed 0 --steps 384 --lr 1e-3 --rank 48

The same utterances, batch, precision and number of steps as a run of the sweep with this configuration; warm-up, linear
and clipping as ours; the weights of the last step. Then this project's evaluator decodes test, and the part of dev that
selects our checkpoints, with 30 s of audio and the configuration's decoding options.

Writes <store>/<run>-peft-s<seed>: adapter/, test/ (as `moe-asr evaluate`) and, last, peft.json. `bench.regimes` reads
it beside the runs of the sweep.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from bench.peers import TRAINING_ONLY, collate_padded, trainer_dataset
from common.config import Config, resolve
from common.console import echo
from common.data.subsets import stratified_subset
from common.data.tokens import load_codec
from common.evaluation.evaluate import decode_corpus
from common.evaluation.score import rates_of
from common.inference.load_model import OpenedModel, open_model
from common.json_files import write_object
from common.model.whisper import load_whisper
from common.options import parse_setting
from common.report.evaluation import evaluate_to_folder
from common.training.train import make_accelerator
from stages.inputs import base_model, evaluation_subset, load_corpus, training_subset
from stages.local_runner import cache_folder
from stages.settings import decoding_options, speech_examples

FACTS, ADAPTER, TEST = "peft.json", "adapter", "test"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, scores, writes; does nothing where that is done."""
    parser = argparse.ArgumentParser(prog="bench.peft", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    chosen = dict(parse_setting(text) for text in options.settings)
    config = resolve(None, file=options.config, options=chosen | {"seed": options.seed})
    out = options.out or Path(config.store) / f"{config.run}-peft-s{options.seed}"
    asked = {"seed": options.seed, "steps": options.steps, "learning_rate": options.lr, "rank": options.rank}
    if (out / FACTS).is_file():
        made = json.loads((out / FACTS).read_text(encoding="utf-8"))
        if {key: made[key] for key in asked} != asked:
            parser.error(f"{out} holds another run ({made}): give --out another folder")
        echo(f"{out}: done before")
        return
    facts = asked | {"corpus": config.corpus.path} | train(config, asked, out / ADAPTER)
    facts |= score(config, out)
    write_object(out / FACTS, facts)
    echo(f"{out}: dev {facts['dev_wer']:.1%}, test {facts['test_wer']:.1%}")


def train(config: Config, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains an adapter and saves it; returns the number of its weights, and the seconds without making features."""
    corpus, model = load_corpus(config, cache_folder()), base_model(config, cache_folder())
    codec = load_codec(model, language=config.model.language, task=config.model.task)
    utterances = training_subset(config, corpus, "asr")
    set_seed(asked["seed"])
    whisper = load_whisper(model)
    examples = speech_examples(config, corpus, utterances, codec, context="30s")
    rows = trainer_dataset(examples, whisper.config.num_mel_bins)
    end = int(whisper.config.eos_token_id)
    lora = LoraConfig(r=asked["rank"], lora_alpha=2 * asked["rank"], target_modules=list(config.lora.targets))
    adapted = get_peft_model(whisper, lora)
    precision = make_accelerator(config.precision, config.runtime.device).mixed_precision
    trainer = Seq2SeqTrainer(
        model=adapted,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder.parent / "trainer"),
            per_device_train_batch_size=config.asr.batch_size,
            gradient_accumulation_steps=config.asr.gradient_accumulation_steps,
            max_steps=asked["steps"],
            learning_rate=asked["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=round(config.asr.warmup_ratio * asked["steps"]),
            weight_decay=config.asr.weight_decay,
            max_grad_norm=config.asr.max_grad_norm,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            disable_tqdm=config.runtime.quiet,
            use_cpu=config.runtime.device == "cpu",
            seed=asked["seed"],
            **TRAINING_ONLY,
        ),
        train_dataset=rows,
        data_collator=partial(collate_padded, end=end),
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    adapted.save_pretrained(str(folder))
    weights = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return {"trained_parameters": weights, "seconds": seconds, "utterances": len(utterances)}


def score(config: Config, out: Path) -> dict[str, Any]:
    """Decodes test and dev with the adapter; returns their word error rates, of dev as our checkpoints are selected."""
    corpus = load_corpus(config, cache_folder())
    base = str(base_model(config, cache_folder()))
    opened = open_model(
        str(out / ADAPTER),
        store=None,
        cache=cache_folder(),
        base=base,
        device=config.runtime.device,
        precision=config.precision,
        language=config.model.language,
        task=config.model.task,
        context="30s",
    )
    decoding = decoding_options(config)
    samples = config.subsets.test_samples
    test = evaluate_to_folder(opened, corpus, decoding, out / TEST, samples=samples, overwrite=True)
    return {"dev_wer": dev_wer(config, opened), "test_wer": test["overall"]["wer"]}


def dev_wer(config: Config, opened: OpenedModel) -> float:
    """On the part of dev that the asr stage decodes to select a checkpoint."""
    corpus = load_corpus(config, cache_folder())
    dev = evaluation_subset(config, corpus, "dev")
    some = stratified_subset(dev, count=min(config.asr.select_samples, len(dev)), seed=config.seed)
    rate: float = rates_of(decode_corpus(opened, corpus, some, decoding_options(config)))["overall"]["wer"]
    return rate


if __name__ == "__main__":
    main()
