"""Where a build gets features from, and what processes agree on before."""

from support.token_rows import Pad, Texts, bert

from hf_freezecache import BlockChain
from hf_freezecache.build.feature_sources import agree_on_padding
from hf_freezecache.distributed import Group


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
