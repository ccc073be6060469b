"""Model cards: what was measured in a training, and nothing else."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import datasets
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer, infer_metric_tags_from_eval_results
from transformers.utils import logging

from .. import __version__
from ..cache.manifest import StoreError
from ..cache.store import FeatureStore
from ..config import FreezeCacheConfig
from ..units import show_bytes, show_flops, show_seconds
from .head_config import HeadConfig
from .subject import FreezingTrainer

logger = logging.get_logger(__name__)

TEMPLATE = "card.md.jinja"
TAG = "hf_freezecache"
#: End of an architecture's name -> the task on the Hub.
_TASKS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
    "ForAudioClassification": "audio-classification",
    "ForSequenceClassificationWithTeacher": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
}
#: What `Trainer` logs beside the metrics of an evaluation.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
#: Settings that name places of a machine, or what a card says elsewhere.
_NOT_SHOWN = ("feature_cache_dir", "push_head_only", "report")


@dataclass(frozen=True)
class CardFacts:
    """What a card says that a model and its training do not tell.

    Args:
        model_name: the card's title.
        repo_id: where the model will be on the Hub.
        dataset: name of the data, for people.
        dataset_tags: ids of the data sets on the Hub.
        license: of the result.
        language: of the data.
        tasks: ids of the task on the Hub.
        tags: more tags.
        finetuned_from: id of the base on the Hub, if it is another than the model tells.
        plain: metrics of a plain training of the same model, as the trainer's are named: `{"accuracy": 0.91}`.
        limits: sentences on what the model is not good for.
    """

    model_name: str | None = None
    repo_id: str | None = None
    dataset: str | None = None
    dataset_tags: Sequence[str] = ()
    license: str | None = None
    language: str | None = None
    tasks: Sequence[str] = ()
    tags: Sequence[str] = ()
    finetuned_from: str | None = None
    plain: Mapping[str, float] = field(default_factory=dict)
    limits: Sequence[str] = ()


@dataclass(frozen=True)
class Shown:
    """What of a model its card shows.

    Args:
        architecture: name of its class.
        base: id on the Hub; None if it has none.
        revision: commit of the base.
        config: of its head; None if it is a whole model.
        head_bytes: size of the head's file.
        whole_bytes: size of the whole model.
        has_processor: whether an image processor or tokenizer is beside it.
        is_loadable: whether a whole model is loaded by the `from_pretrained` of its class.
    """

    architecture: str
    base: str | None = None
    revision: str | None = None
    config: HeadConfig | None = None
    head_bytes: int = 0
    whole_bytes: int = 0
    has_processor: bool = True
    is_loadable: bool = True


def render_card(shown: Shown, trainer: Any, facts: CardFacts) -> str:
    """The text of a README.

    Args:
        shown: the model.
        trainer: that has trained it; None if it is not known.
        facts: what neither tells.
    """
    base, config = facts.finetuned_from or shown.base, shown.config
    training = _training(trainer)
    metrics = _metrics(trainer)
    task = list(facts.tasks) or [name for end, name in _TASKS.items() if shown.architecture.endswith(end)]
    title = facts.model_name or (facts.repo_id or "").rpartition("/")[2] or f"Head of a {shown.architecture}"
    missing = list(training.missing)
    if not metrics:
        missing.append("how well it does on data that it was not trained on")
    if not facts.plain:
        missing.append("what plain training would have reached")
    card = ModelCard.from_template(
        _metadata(facts, base, title, metrics, task),
        template_str=files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title=title,
        is_head=config is not None,
        article="an" if shown.architecture[:1] in "AEIOU" else "a",
        architecture=shown.architecture,
        base=base,
        revision=shown.revision if base == shown.base else None,
        cut=None if config is None else config.cut,
        blocks=None if config is None else len(config.blocks),
        included=[] if config is None else [part.name for part in config.parts if part.included],
        has_processor=shown.has_processor,
        head_bytes=show_bytes(shown.head_bytes),
        whole_bytes=show_bytes(shown.whole_bytes),
        snippet=_snippet(shown, facts),
        dataset=facts.dataset or ", ".join(facts.dataset_tags),
        timeline=training.timeline,
        facts=training.facts,
        settings=training.settings,
        hyperparameters=training.hyperparameters,
        metrics={name: f"{value:.4g}" for name, value in metrics.items()},
        plain={name: f"{value:.4g}" for name, value in facts.plain.items()},
        missing=missing,
        limits=[*training.limits, *facts.limits],
        libraries=_libraries(config),
    )
    return card.content.rstrip() + "\n"


@dataclass
class _Training:
    """What a card shows of a training."""

    timeline: list[tuple[str, ...]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def _training(trainer: Any) -> _Training:
    shown = _Training(limits=["It was tried on no other data than those of its training and evaluation."])
    if trainer is None:
        shown.missing.append("what the training took")
        return shown
    shown.hyperparameters = {
        **extract_hyperparameters_from_trainer(trainer),
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
    }
    shown.facts["hardware"] = describe_hardware(trainer.args)
    if not isinstance(trainer, FreezingTrainer):
        shown.missing.append("what the training took")
        return shown
    report, settings = trainer.freeze_cache_report(), trainer.freeze_settings
    shown.settings = settings.changed(_NOT_SHOWN)
    if not report.phases:
        shown.missing.append("what the training took")
        return shown
    shown.timeline = [
        (
            str(phase.cut),
            phase.mode,
            str(phase.epochs),
            str(phase.steps),
            f"{phase.seconds:.1f}",
            f"{phase.flops / 1e12:.4g}",
            show_bytes(phase.store_bytes) if phase.store_bytes else "",
        )
        for phase in report.phases
    ]
    _add_totals(shown, report)
    _add_store(shown, trainer, settings)
    return shown


def _add_totals(shown: _Training, report: Any) -> None:
    epochs = {mode: sum(phase.epochs for phase in report.phases if phase.mode == mode) for mode in ("live", "replay")}
    totals, plain = report.totals, report.plain_estimate
    seconds = totals.train_seconds + totals.build_seconds + totals.plan_seconds
    seconds += totals.head_start_seconds + totals.trial_seconds
    shown.facts["epochs"] = f"{epochs['live']} on samples, {epochs['replay']} on stored features"
    shown.facts["training, measured"] = (
        f"{show_seconds(seconds)} with builds and without evaluation, {show_flops(totals.flops)}"
    )
    if plain.seconds is not None:
        shown.facts["seconds saved, estimated from measured steps of plain training"] = show_seconds(
            plain.seconds - seconds
        )
    else:
        shown.missing.append("the seconds saved (no epoch was trained without frozen blocks)")
    if plain.flops is not None:
        shown.facts["operations saved, estimated from a measured step"] = show_flops(plain.flops - totals.flops)


def _add_store(shown: _Training, trainer: Any, settings: FreezeCacheConfig) -> None:
    status = trainer.freeze_status()
    if status.store_path is None:
        return
    try:
        manifest = FeatureStore.open(status.store_path).manifest
    except (StoreError, OSError) as error:  # deleted meanwhile: the card says less
        logger.info(f"The card does not tell the codec: {error}")
        shown.missing.append("the codec of the store")
        return
    shown.facts["store"] = (
        f"cut {manifest.cut}, codec {manifest.codec}, {show_bytes(status.store_bytes)}, {manifest.views} augmented "
        "views beside the base view"
    )
    shown.limits.append(
        f"From the freeze on, training repeated at most {1 + manifest.views} stored "
        f"{'views' if manifest.views else 'view'} of each sample."
    )
    if manifest.codec != "fp32":
        shown.limits.append(f"The stored outputs of the frozen blocks were approximated by codec `{manifest.codec}`.")


def _metrics(trainer: Any) -> dict[str, float]:
    """Those of the last evaluation."""
    logs = [] if trainer is None else trainer.state.log_history
    for entry in reversed(logs):
        found = {
            name.removeprefix("eval_"): float(value)
            for name, value in entry.items()
            if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith(_NO_METRICS)
        }
        if found:
            return found
    return {}


def _metadata(
    facts: CardFacts, base: str | None, title: str, metrics: Mapping[str, float], tasks: Sequence[str]
) -> ModelCardData:
    known = {tag: metrics[name] for tag, name in infer_metric_tags_from_eval_results(metrics).items()}
    data = facts.dataset or ", ".join(facts.dataset_tags)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=tag,
            dataset_name=data,
            metric_type=name,
            metric_value=value,
        )
        for task in tasks[:1]
        for tag in facts.dataset_tags[:1]
        for name, value in known.items()
    ]
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        license=facts.license,
        language=facts.language,
        datasets=list(facts.dataset_tags) or None,
        metrics=list(known) or None,
        pipeline_tag=tasks[0] if tasks else None,
        tags=list(dict.fromkeys([TAG, *facts.tags])),
        model_name=title if results else None,
        eval_results=results or None,
    )


def _snippet(shown: Shown, facts: CardFacts) -> str | None:
    """The code that loads the model; None if that takes the user's own."""
    place = facts.repo_id or "."
    config = shown.config
    if config is None:
        name = shown.architecture
        return (
            f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{place}")'
            if shown.is_loadable
            else None
        )
    base = ""
    if config.base is None and config.needs_base:
        base = f', base="{facts.finetuned_from or "folder or id of the base"}"'
    if config.recipe.kind == "own":
        base = ", base=model"  # as it was before the training
    return f'from hf_freezecache import load_head\n\nmodel = load_head("{place}"{base})'


def describe_hardware(args: TrainingArguments) -> str:
    """What a training runs on: number of processes, and the accelerator or the processor of each."""
    if torch.device(args.device).type == "cuda":
        device = torch.cuda.get_device_name(args.device)
    else:
        threads = torch.get_num_threads()
        device = f"CPU ({platform.machine()}), {threads} thread{'' if threads == 1 else 's'}"
    return f"{args.world_size} x {device}"


def _libraries(config: HeadConfig | None) -> str:
    versions = library_versions() if config is None else config.libraries
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def library_versions() -> dict[str, str]:
    """The installed releases of what a training runs on."""
    names = {"hf_freezecache": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
    return {**names, "datasets": datasets.__version__}
