"""Compares a bundle's hidden states with a reference: how far they are off, and from where on.

Its parts; each imports only itself and those above it:

metrics        KL divergence, agreement, relative L2, bootstrap intervals: numpy alone
places         the places of a model in the order of computation, and regions around the window
cache_steps    the steps of an int8 cache, read from its graph
held_weights   a checkpoint's matrices as a bundle holds them, if they are plainly rounded
reference      PyTorch's GPT-Neo, a layer at a time
trace          the values that one graph computed, place by place
probed         a graph that also outputs its places
local          the expected result of each step of a layer on the bundle's own inputs
errors         the local and the accumulated error of each place
faults         the first place whose local error exceeds its limit
explanations   computes the usual mistakes, to find the one that explains a fault
jumps          bundle against bundle: where the accumulated error jumps
verify         `neo-export --verify`
"""
