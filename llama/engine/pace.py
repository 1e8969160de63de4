"""How many drafted tokens a step checks, if any: always as many as there are, or as many as pay on this machine.

Checking K drafts takes longer than one decode step, by how much depends on the model, the weights' dtype, the rows and
the machine; and how many drafts come true depends on the text. ``AdaptivePace`` measures both while it runs. Integers
and seconds only.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from llama.engine.sequence import Sequence

RECENT = 5  # measurements of a step's seconds, whose median counts
STALE = 512  # steps after which a measurement is forgotten, so that one bad moment does not decide for ever
COST_OF_A_DRAFT = 0.12  # of a decode step, until it has been measured
ASKING = 0.01  # of the time of decode steps that may go into asking a drafter in vain
LONGEST_WAIT = 256  # steps between two questions
GAIN = 1.05  # drafts are checked where that promises so many times the tokens a second
DECAY = 0.9  # of what earlier proposals of a sequence count
PRIOR = {1: 0.3, 3: 0.5, 6: 0.7}  # chance of a drafted token before anything is known, by length of the draft


@dataclass(frozen=True)
class Offer:
    """A drafter's guess for one sequence, and how many tokens it has."""

    sequence: Sequence
    count: int


class Pace:
    """Checks every draft, by the step whose length is nearest to the longest of them.

    Args:
        draft_lens: how many drafts a step can check, ascending.
        always: check also where there is nothing to check, by the longest step: the arithmetic of a text is then the
            same whatever is drafted.
    """

    def __init__(self, draft_lens: Sequences[int], always: bool = False) -> None:
        self.draft_lens, self._always = tuple(draft_lens), always

    @property
    def longest(self) -> int:
        """The most drafts that a step can check."""
        return self.draft_lens[-1]

    @property
    def wait(self) -> int:
        """How many decode steps to run before the drafter is asked again."""
        return 0

    def choose(self, offers: Sequences[Offer], rows: int) -> int:
        """How many drafts the next step checks; 0 for a decode step.

        Args:
            offers: one for each sequence that gets a token.
            rows: that the step would run.
        """
        most = max((offer.count for offer in offers), default=0)
        if self._always or not most:
            return self.longest if self._always else 0
        return min(self.draft_lens, key=lambda d: (abs(d - most), d))  # a few guesses more are not worth a longer step

    def learn(self, offer: Offer, accepted: int) -> None:
        """Take notice of how many tokens of a guess came true, whether a step checked them or not."""

    def took(self, draft_len: int, rows: int, seconds: float) -> None:
        """Take notice of the seconds of one step; ``draft_len`` 0 is a decode step."""

    def asked(self, seconds: float) -> None:
        """Take notice of the seconds that the drafter took for a proposal."""


@dataclass
class Rate:
    """A share that follows what happens.

    Attributes:
        hits, trials: what was seen, the older the less.
    """

    hits: float = 0.0
    trials: float = 0.0

    def add(self, hits: int, trials: int) -> None:
        """See some more."""
        self.hits, self.trials = DECAY * self.hits + hits, DECAY * self.trials + trials

    def mean(self, before: float, weight: float) -> float:
        """The share, where ``before`` stands for ``weight`` trials that were not seen."""
        return (self.hits + weight * before) / (self.trials + weight)


@dataclass
class Costs:
    """The seconds of recent steps of one kind."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    last: int = 0
    warm: bool = False


class AdaptivePace(Pace):
    """Checks as many drafts as promise the most tokens a second, and none where decode steps promise more.

    What promises: the chance that a drafted token is right, learnt for each sequence and for short and long guesses
    apart, because a drafter offers long ones where it is sure; and the measured seconds of each kind of step and of a
    proposal. While nothing is checked the drafter is asked less and less often, and its guesses are compared with what
    came.

    Args:
        draft_lens: how many drafts a step can check, ascending.
        longest_wait: steps between two questions, if a question costs little.
    """

    def __init__(self, draft_lens: Sequences[int], longest_wait: int) -> None:
        super().__init__(draft_lens)
        self._longest_wait = longest_wait
        self._asking: deque[float] = deque(maxlen=RECENT)
        self._wait = 0
        self._step = 0
        self._costs: dict[tuple[int, int], Costs] = {}
        self._all = {size: Rate() for size in PRIOR}
        self._rates: WeakKeyDictionary[Sequence, dict[int, Rate]] = WeakKeyDictionary()

    @property
    def wait(self) -> int:
        """How many decode steps to run before the drafter is asked again: more each time that nothing paid."""
        return self._wait

    def choose(self, offers: Sequences[Offer], rows: int) -> int:
        """The number of drafts that promises the most tokens a second; 0 for a decode step."""
        if self._measured(0, rows) is None:  # nothing to compare with
            return 0
        asking = statistics.median(self._asking) if self._asking else 0.0
        best, promise = 0, GAIN * len(offers) / self.seconds(0, rows)
        for draft_len in self.draft_lens if any(offer.count for offer in offers) else ():
            tokens = sum(self._expected(offer, draft_len) for offer in offers)
            rate = tokens / (self.seconds(draft_len, rows) + asking)
            if rate > promise:
                best, promise = draft_len, rate
        longest = max(self._longest_wait, min(int(asking / (ASKING * self.seconds(0, rows))), LONGEST_WAIT))
        self._wait = 0 if best else min(2 * self._wait + 1, longest)
        return best

    def asked(self, seconds: float) -> None:
        """Take notice of the seconds that the drafter took for a proposal."""
        self._asking.append(seconds)

    def learn(self, offer: Offer, accepted: int) -> None:
        """Take notice of a guess: each token that was right, and the first that was not, is a trial."""
        trials = min(accepted + 1, offer.count)
        own = self._rates.setdefault(offer.sequence, {})
        for rates in (own, self._all):
            rates.setdefault(_size(offer.count), Rate()).add(accepted, trials)

    def took(self, draft_len: int, rows: int, seconds: float) -> None:
        """Take notice of a step's seconds; a program's first run, which touches new memory, does not count."""
        self._step += 1
        costs = self._costs.setdefault((draft_len, rows), Costs())
        costs.last = self._step
        if costs.warm:
            costs.seconds.append(seconds)
        costs.warm = True

    def seconds(self, draft_len: int, rows: int) -> float:
        """A step's seconds, or what is likely as long as it has not been measured."""
        found = self._measured(draft_len, rows)
        if found is not None:
            return found
        return self.seconds(0, rows) * (1 + COST_OF_A_DRAFT * draft_len) if draft_len else 1.0

    def _measured(self, draft_len: int, rows: int) -> float | None:
        costs = self._costs.get((draft_len, rows))
        if costs is None or not costs.seconds or (draft_len and self._step - costs.last > STALE):
            return None
        return statistics.median(costs.seconds)

    def _expected(self, offer: Offer, draft_len: int) -> float:
        """The tokens that a step is likely to give a sequence: one, and one for each draft up to the first wrong."""
        size = _size(offer.count)
        everyone = self._all[size].mean(PRIOR[size], 4.0)
        chance = self._rates.get(offer.sequence, {}).get(size, Rate()).mean(everyone, 2.0)
        return sum(chance**place for place in range(min(offer.count, draft_len) + 1))


def _size(count: int) -> int:
    """The class of drafts of about this length, a key of PRIOR."""
    return max((size for size in PRIOR if size <= count), default=1)
