"""The recipes for texts run as a user runs them, on tiny models and local files of rows of differing length."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from support.texts import sentences, tiny_bert, tiny_llama
from transformers import BertForSequenceClassification, LlamaForCausalLM

RECIPES = Path(__file__).parents[1] / "recipes"
TRAINING = "--num_train_epochs 2 --per_device_train_batch_size 4 --use_cpu --save_strategy epoch --report_to none"
FREEZING = "--policy manual --freeze_points 1:2 --cache always --codec fp32"


@pytest.fixture(autouse=True)
def recipes_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


@pytest.fixture
def classified(tmp_path):
    """A csv file of 12 texts with named classes."""
    path = tmp_path / "texts.csv"
    kinds = [["loss", "payment", "fee"][row % 3] for row in range(12)]
    Dataset.from_dict({"text": sentences(12), "label": kinds}).to_csv(path)
    return path


@pytest.fixture
def prompted(tmp_path):
    """A parquet file of 12 prompts with completions."""
    path = tmp_path / "prompts.parquet"
    Dataset.from_dict({"prompt": sentences(12), "completion": sentences(24)[12:][::-1]}).to_parquet(path)
    return path


def modes(report):
    return {phase["mode"] for phase in report["freeze_cache"]["phases"]}


def test_text_classification_on_csv_replays_rows_of_differing_length(classified, tmp_path):
    import text_classification

    output = tmp_path / "run"
    arguments = (
        f"--model_name_or_path {tiny_bert(tmp_path / 'model')} --train_files {classified} --output_dir {output}"
    )
    text_classification.main(f"{arguments} {TRAINING} {FREEZING} --eval_strategy epoch".split())

    report = json.loads((output / "report.json").read_text())
    assert {"live", "build", "replay"} <= modes(report)
    assert report["train_texts"] + report["validation_texts"] == 12
    assert 0 <= report["metrics"]["eval_accuracy"] <= 1
    assert BertForSequenceClassification.from_pretrained(output).config.id2label == {0: "fee", 1: "loss", 2: "payment"}


def test_text_classification_grouped_by_length_equals_freezing_without_a_cache(classified, tmp_path):
    import text_classification

    arguments = f"--model_name_or_path {tiny_bert(tmp_path / 'model')} --train_files {classified}"
    arguments += f" --validation_files {classified} --train_sampling_strategy group_by_length {TRAINING} {FREEZING}"
    weights = {}
    for cache in ("never", "always"):
        output = tmp_path / cache
        text_classification.main(f"{arguments} --output_dir {output} --cache {cache}".split())
        weights[cache] = BertForSequenceClassification.from_pretrained(output).state_dict()
    for name, value in weights["never"].items():
        assert value.equal(weights["always"][name]), name


def test_text_classification_of_pairs_resumes_from_last(tmp_path):
    import text_classification

    path = tmp_path / "pairs.json"
    rows = {"premise": sentences(12), "hypothesis": sentences(24)[12:], "answer": [row % 2 for row in range(12)]}
    Dataset.from_dict(rows).to_json(path)
    arguments = f"--model_name_or_path {tiny_bert(tmp_path / 'model')} --train_files {path} --label_column answer"
    arguments += f" --output_dir {tmp_path / 'run'} {TRAINING} {FREEZING} --resume_from_checkpoint last"
    text_classification.main(arguments.split())
    report = text_classification.main([*arguments.split(), "--num_train_epochs", "3"])
    assert "replay" in modes(report)
    (state,) = (tmp_path / "run").glob("checkpoint-9/trainer_state.json")
    assert json.loads(state.read_text())["epoch"] == 3


def test_text_classification_without_known_columns_names_the_option(tmp_path):
    import text_classification

    path = tmp_path / "texts.csv"
    Dataset.from_dict({"words": sentences(12), "label": [row % 2 for row in range(12)]}).to_csv(path)
    arguments = f"--model_name_or_path {tiny_bert(tmp_path / 'model')} --train_files {path} --output_dir {tmp_path}"
    with pytest.raises(ValueError, match="--text_columns"):
        text_classification.main(arguments.split())


def test_text_classification_with_plan_prints_it(classified, tmp_path, capsys):
    import text_classification

    output = tmp_path / "run"
    arguments = f"--model_name_or_path {tiny_bert(tmp_path / 'model')} --train_files {classified} --plan"
    found = text_classification.main(f"{arguments} --output_dir {output} {TRAINING} {FREEZING}".split())
    assert [row["cut"] for row in found["rows"]] == [1, 2, 3, 4, 5]
    assert "Plain training, nothing frozen" in capsys.readouterr().out


@pytest.mark.parametrize("cache", ["never", "always"])
def test_sft_of_a_causal_language_model_trains_on_completions_alone(cache, prompted, tmp_path):
    import causal_lm_sft

    output = tmp_path / "run"
    arguments = f"--model_name_or_path {tiny_llama(tmp_path / 'model')} --train_files {prompted}"
    arguments += f" --validation_files {prompted} --output_dir {output} {TRAINING} {FREEZING}"
    arguments += f" --freeze_points 0:2 --cache {cache}"
    report = causal_lm_sft.main(arguments.split())
    assert ("replay" in modes(report)) == (cache == "always")
    before = LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    after = LlamaForCausalLM.from_pretrained(output).state_dict()
    assert before["model.layers.0.mlp.up_proj.weight"].equal(after["model.layers.0.mlp.up_proj.weight"])
    assert not before["model.layers.1.mlp.up_proj.weight"].equal(after["model.layers.1.mlp.up_proj.weight"])


def test_sft_rows_have_labels_on_the_completion_alone(prompted, tmp_path):
    import causal_lm_sft
    from datasets import DatasetDict
    from support.texts import tiny_tokenizer

    args = causal_lm_sft.DataArguments(train_files=[str(prompted)])
    rows = Dataset.from_dict({"prompt": ["my card is"], "completion": ["lost"]})
    tokenizer = tiny_tokenizer()
    (row,) = causal_lm_sft.tokenize(DatasetDict(train=rows), args, tokenizer, most=32)["train"]
    assert row["input_ids"] == tokenizer("my card is lost")["input_ids"]
    assert row["labels"] == [-100] * 4 + row["input_ids"][4:]
