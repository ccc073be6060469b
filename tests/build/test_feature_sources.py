"""Where a build gets features from, and what processes agree on before."""

import pytest
from support.token_rows import Choices, Pad, PadChoices, Texts, bert, bert_of_choices

from hf_freezecache import BlockChain
from hf_freezecache.build.feature_sources import ImageFeatures, agree_on_padding
from hf_freezecache.cache.rows import RowError, RowSource
from hf_freezecache.distributed import Group
from hf_freezecache.model.tokens import TextInputs


class TwoProcesses(Group):
    """This process beside one that has found other things."""

    def __init__(self, other):
        object.__setattr__(self, "other", other)
        super().__init__(rank=0, size=2)

    def gather(self, value):
        return [value, self.other]


def test_padding_that_counts_on_one_process_is_kept_on_all():
    """Else one of them would refuse to store texts while the others wait for it."""
    batch = Pad()([*Texts(8)])
    batch.pop("labels")
    chain = BlockChain.from_model(bert().eval(), probe=batch)
    assert not agree_on_padding(chain, 2, TwoProcesses((["right"], None))) and chain.padding.ignored(2)
    assert agree_on_padding(chain, 2, TwoProcesses(([], "texts are padded on the left")))
    assert not chain.padding.ignored(2) and chain.padding.why_kept(2) == "texts are padded on the left"
    assert not agree_on_padding(chain, 2, TwoProcesses(([], "texts are padded on the left")))


def test_samples_of_another_number_of_texts_are_refused():
    """One at a time they can be collated, but they cross the cut as another number of rows."""
    questions = Choices(4)
    probe = PadChoices()([questions[0], questions[1]])
    chain = BlockChain.from_model(bert_of_choices().eval(), probe=probe)
    questions.rows[3]["input_ids"] = questions.rows[3]["input_ids"][:2]
    source = RowSource(
        questions, PadChoices(), batch_size=1, seed=0, texts=TextInputs("input_ids", frozenset({"input_ids"}))
    )
    features = ImageFeatures(chain, 2, source, chain.stored_layout(2), lambda batch: batch)
    assert len([*features.run([0, 1, 2])]) == 3
    with pytest.raises(RowError, match="samples from 3 on are not 3 texts each"):
        [*features.run([3])]
