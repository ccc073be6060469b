"""Policies asked epoch by epoch."""

from hypothesis import settings

from hf_freezecache.policies import FreezePolicy, Moment

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def cuts(policy, epochs, blocks=12):
    """What a policy decides in each of the epochs."""
    policy.start(blocks)
    return [policy.decide(Moment(epoch, epochs, 0, 100, 0, blocks)) for epoch in range(epochs)]


class Answers(FreezePolicy):
    """Decides what it was given, epoch by epoch, and notes when it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def decide(self, moment):
        self.asked.append(moment.epoch)
        return self.answers[moment.epoch]

    def state_dict(self):
        return {"asked": list(self.asked)}

    def load_state_dict(self, state):
        self.asked = list(state["asked"])
