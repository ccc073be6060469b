"""What the experiments on texts compute besides trainings: pieces of documents, ways of storing tokens, gains."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from support.texts import tiny_tokenizer

from benchmarks.text.codecs import gains, magnitudes
from benchmarks.text.hidden_states import END, FIRST, OTHER, Vectors
from benchmarks.text.language_model import as_pieces, train_tokenizer
from benchmarks.text.schemes import Scheme, make_schemes
from benchmarks.text.sources import tokenized
from hf_freezecache.model.layout import FeatureLayout

CHANNELS = 32


@pytest.fixture
def case():
    """Hidden states whose first tokens are a hundred times larger, as are two channels."""
    generator = torch.Generator().manual_seed(0)

    def vectors(count):
        values = torch.randn(count, CHANNELS, generator=generator)
        kinds = torch.full((count,), OTHER)
        kinds[::10], kinds[9::10] = FIRST, END
        values[::10] *= 100
        values[:, [3, 17]] *= 50
        return Vectors(values, kinds)

    layout = FeatureLayout((CHANNELS,), None, 0, torch.float32)
    return SimpleNamespace(
        fit_vectors=vectors(400), test_vectors=vectors(100), layout=layout, weights=torch.ones(CHANNELS)
    )


def error(case, scheme):
    decoded, _ = scheme.run(case)
    return (decoded - case.test_vectors.values).square().mean().item()


def test_schemes_count_all_bits_they_store(case):
    bits = {name: scheme.run(case)[1] for name, scheme in make_schemes().items()}
    assert [bits[codec] for codec in ("fp32", "fp16", "int8", "int4", "int2")] == [32, 16, 8, 4, 2]
    assert bits["int4, first fp16"] == pytest.approx(0.9 * 4 + 0.1 * 16)
    assert bits["int4, first and end int8"] == pytest.approx(0.8 * 4 + 0.2 * 8)
    assert bits["int4, 4 channels fp16"] == pytest.approx((28 * 4 + 4 * 16) / CHANNELS)
    assert bits["int4, normed"] == pytest.approx(4 + 16 / CHANNELS)
    # A bit a token says whether it is an outlier; how many there are among the test texts is theirs.
    assert 4 + 1 / CHANNELS <= bits["int4, 3% of tokens fp16"] < 5


def test_kept_tokens_and_channels_are_as_exact_as_fp16(case):
    values, kinds = case.test_vectors.values, case.test_vectors.kinds
    decoded, _ = Scheme("int4", (FIRST,)).run(case)
    assert decoded[kinds == FIRST].equal(values[kinds == FIRST].half().float())
    decoded, _ = Scheme("int4", channels=2).run(case)
    assert decoded[:, [3, 17]].equal(values[:, [3, 17]].half().float())


def test_variants_lower_the_error_where_a_few_tokens_or_channels_are_far_larger(case):
    plain = error(case, Scheme("int4"))
    for variant in (Scheme("int4", (FIRST,)), Scheme("int4", normed=True), Scheme("int4", outliers=0.12)):
        assert error(case, variant) < plain / 4


def test_gain_compares_with_the_plain_codecs_at_the_same_bits():
    points = {"int2": (2, 1e-1), "int3": (3, 1e-2), "int4": (4, 1e-3), "int8": (8, 1e-5)}
    points |= {"mixed@2": (2, 1e-2), "mixed@2.5": (2.5, 5e-3), "mixed@3": (3, 1e-3), "mixed@4": (4, 1e-4)}
    points |= {"mixed@5": (5, 1e-5), "mixed@6": (6, 1e-6), "mixed@8": (8, 1e-7)}
    points |= {"int3, new": (3.5, 10**-2.5), "int4, new": (4, 1e-4), "mixed@3, new": (3.5, 10**-3)}
    found = gains({name: {"bits_per_value": bits, "kl": kl} for name, (bits, kl) in points.items()})
    assert found == pytest.approx({"int3, new": 1.0, "int4, new": 10.0, "mixed@3, new": 10**-0.5})


def test_magnitudes_find_large_tokens_and_channels(case):
    found = magnitudes(case.test_vectors)
    assert found["by_kind"]["first"]["median_norm"] > 50 * found["by_kind"]["other"]["median_norm"]
    assert set(found["largest_channels"][:2]) == {3, 17}
    assert "stop" not in found["by_kind"]


def test_massive_channels_are_kept_apart_and_only_they(case):
    for vectors in (case.fit_vectors, case.test_vectors):
        vectors.values[vectors.kinds == FIRST] /= 100
    assert magnitudes(case.test_vectors)["massive_channels"] == 0
    ordinary, bits = Scheme("int4", massive=True).run(case)
    assert bits == 4 and ordinary.equal(Scheme("int4").run(case)[0])
    for vectors in (case.fit_vectors, case.test_vectors):
        vectors.values[vectors.kinds == FIRST, 5] = 6e4
    decoded, bits = Scheme("int4", massive=True).run(case)
    assert bits == pytest.approx((8 * 16 + 16) / CHANNELS)  # 31 codes of 4 bits are 16 bytes
    assert decoded[:, 5].allclose(case.test_vectors.values[:, 5].half().float(), equal_nan=True)


def test_pieces_begin_with_bos_and_documents_end_with_eos():
    documents = ["the card is lost " * 9, "a fee"]
    tokenizer = train_tokenizer(documents, 300)
    rows = as_pieces(documents, tokenizer, 8)["input_ids"]
    assert all(row[0] == tokenizer.bos_token_id and len(row) <= 8 for row in rows)
    assert sum(row[-1] == tokenizer.eos_token_id for row in rows) == 2
    whole = [token for row in rows for token in row[1:]]
    assert tokenizer.decode(whole).replace("<eos>", "") == "".join(documents)


def test_questions_keep_their_own_lengths():
    rows = tokenized(Dataset.from_dict({"text": ["my card", "where is my card"], "label": [0, 1]}), tiny_tokenizer())
    assert [len(row["input_ids"]) for row in rows] == [4, 6]
    assert set(rows.column_names) == {"input_ids", "attention_mask", "label"}
