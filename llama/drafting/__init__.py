"""Drafters that need no model: they guess a request's next tokens from texts that are there already.

lookup.py            the last few tokens stood somewhere before in the history: prompt lookup
suffix.py            the longest suffix that occurred before, in the history or in earlier outputs
suffix_automaton.py  the index under it
retrieval.py         what followed in a datastore of texts, or in earlier answers
datastore.py         the datastore: a file in which any few tokens are found at once
suffix_array.py      the index in it
word_bank.py         n-grams of earlier answers, kept in a file between runs
chain.py             several drafters, tried in order
files.py             which tokenizer a file belongs to; headers, safe writing
history.py           a guess that goes on as the history did before

Integers and numpy only: nothing here knows a device or a tensor. The interface is ``llama.engine.drafting``.
"""

from llama.drafting.chain import Chain
from llama.drafting.datastore import Datastore
from llama.drafting.files import Fingerprint, fingerprint
from llama.drafting.lookup import Lookup
from llama.drafting.retrieval import Retrieval
from llama.drafting.suffix import Suffix
from llama.drafting.word_bank import WordBank

__all__ = ["Chain", "Datastore", "Fingerprint", "Lookup", "Retrieval", "Suffix", "WordBank", "fingerprint"]
