"""Benchmarks: how fast a model decodes and prefills, beside other programs on the same machine at the same time.

    workload.py   what is measured: a shape or a checkpoint, prompt, tokens, rows, dtype
    ours.py       this package as a Runner            peers.py   transformers and llama.cpp as Runners
    child.py      a Runner in a process of its own, driven through pipes, so that runs can alternate
    ceiling.py    how fast the machine reads memory   kernels.py every lowering of a linear layer and of attention,
    timed report.py     results as md, csv, json, jsonl and as a picture

Numbers of one machine at one moment mean little: what is compared runs alternately, and ratios within one run are what
counts.
"""
