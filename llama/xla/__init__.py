"""The rooms that know torch_xla; nothing else imports it.

imports.py     torch_xla without the compilers that generation never calls
backend.py     starting the device, XLA's and the allocator's settings, memory, profiling
programs.py    compiling a function into a program
transfers.py   tensors to and from the device
counters.py    compiles, runs and transfers so far
ops.py         XLA operations that torch lacks
linear.py      how a linear layer and attention's scores are lowered
modules.py     fusions handed to XLA ready-made, as serialised HLO modules
reports.py     what the compiled programs hold, from a dump
"""
