"""Benchmarks: how fast a model starts, prefills and decodes, beside other programs on the same machine, in turns.

    workload.py   what is measured: a shape or a checkpoint, prompt, tokens, rows, dtype
    ours.py       this package as a Runner            peers.py   transformers and llama.cpp as Runners
    llama_cpp_batch.py                                llama.cpp's batches of several sequences
    child.py      a Runner in a process of its own, driven through pipes, so that runs can alternate
    mixed.py      requests of mixed lengths           ceiling.py how fast the machine reads memory
    positions.py  decoding far into the cache
    kernels.py    every lowering of a linear layer and of attention, timed
    startup.py    fresh processes: seconds to the first token, and a full warm-up's cost
    llama_cpp_process.py, warm_up_process.py          what two of these processes run, as text
    report.py     results as md, csv, json, jsonl and as a picture

Numbers of one machine at one moment mean little: what is compared runs alternately, and ratios within one run are what
counts.
"""
