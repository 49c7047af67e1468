"""A bundle's hidden states against a reference: how far off, and from which place on.

Its parts; each imports only itself and those above it:

metrics        KL divergence, agreement, relative L2, bootstrap intervals: numpy alone
places         the places of a model in the order of computation, and regions around the window
cache_steps    the steps of an int8 cache, read from its graph
held_weights   a checkpoint's matrices as a bundle holds them, where that is plain rounding
reference      PyTorch's GPT-Neo, a layer at a time
trace          what one graph computed, place by place
probed         a graph whose places are outputs as well
local          what a layer should have made of the bundle's own inputs
errors         each place's own error, and the accumulated one
faults         the first place whose own error is past its limit
explanations   the usual mistakes, each computed: which of them gives what was found
jumps          bundle against bundle: where the accumulated error jumps
verify         `neo-export --verify`
"""
