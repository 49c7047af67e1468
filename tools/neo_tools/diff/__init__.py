"""`neo-diff`: compares the values of a bundle with PyTorch's or another bundle's.

Its parts; each imports only itself and those above it:

results            the results as plain data, which JSON output contains
thresholds         limits, and whether they are kept
settings           the settings of a comparison
texts              the text, and which of its positions are decoded
progress           reports progress
position_metrics   KL divergence, agreement, perplexity: from logits to one figure per position
probed_backend     the CPU backend with probed places
cached_path        a text through prefill, decode and one cache, with its places
probed_cuda        the CUDA backend with probed places
engine             the backend that runs the bundle on this machine
findings           arrays that the summary is made from
shipped            logits of the bundle as it ships, through each of its graphs
references         the reference: PyTorch, or another bundle
summary            from findings to results: places, tokens and greedy texts
run                all steps of a comparison
report             the summary for a terminal
page_parts         sections, tables and numbers of the page
charts             plots as SVG
page_plots         the plots of the page
html               the page
cli_options        the options
cli                the command
"""
