"""`neo-bench`: how fast bundles are, beside what the machine could do and beside peers.

Its parts; each imports only itself and those above it:

spread             medians, percentiles and ratios of rounds
cases              what is asked for: one case a combination of lengths, batch and threads
machine            facts about the machine, and who else used it
bandwidth          what it can do at best: a process that reads memory and multiplies
device_bandwidth   the same of a GPU's memory
device_memory      bytes of a GPU that a process holds
native_time        seconds inside onnxruntime, call by call
worker             a bundle in a process of its own
traffic            bytes and operations of a step, counted
opening            bundles and checkpoint, checked before anything is started
participants       processes that take turns
starting           who takes part in a run, with which options
rounds             one case: everyone once a round
results            what was found, as plain data: JSON is this
rows               from seconds to rates, shares of the limit and ratios
run                the order of things
csv_report         results as CSV
report             as Markdown or JSON
plot               as a roofline
cli_options        the options
cli                the command
operators          apart from all that: candidates for a quantized product, side by side
"""
