"""Requests on their way: who runs when, in which slot, by which program.

sequence.py    one request, from submit to result
chunks.py      how a prompt is cut into chunks
scheduler.py   queue, slots, token budget: integers only
programs.py    the registry of compiled programs
runner.py      the slots' tensors and the programs that change them
engine.py      submit, step, cancel
"""
