"""What runs on the device: pure functions of tensors, compiled once per shape. No request, no text, no file.

model.py               the Transformer
cache.py               its keys and values
state.py               the slots' tensors
steps.py               the functions that become programs
sampling.py            choosing a token
logits_processors.py   penalties, bias and bans
token_info.py          log-probabilities and ranks
memory.py              the bytes that all of it takes
"""
