"""`neo-diff`: what a bundle computes, against PyTorch or another bundle.

Its parts; each imports only itself and those above it:

results            what was found, as plain data: JSON is this
thresholds         limits, and whether they are kept
settings           what is asked for
texts              the text, and which of its positions are decoded
progress           how far it is
position_metrics   KL divergence, agreement, perplexity: from logits to one figure a position
probed_backend     the CPU's backend with its places shown
cached_path        a text through prefill, decode and one cache, with its places
probed_cuda        the CUDA backend with its places shown
engine             what runs the bundle here
findings           arrays that are left to be summarized
shipped            logits of the bundle as it ships, through each of its graphs
references         what is compared with: PyTorch, or another bundle
summary            from findings to results: what a report says of places, tokens and greedy texts
run                the order of things
report             the summary for a terminal
page_parts         sections, tables and numbers of the page
charts             its plots as SVG
page_plots         what is plotted
html               the page
cli_options        the options
cli                the command
"""
