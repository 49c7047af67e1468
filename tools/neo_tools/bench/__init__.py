"""`neo-bench`: measures the speed of bundles, against the machine's limits and against peers.

Its parts; each imports only itself and those above it:

spread             medians, percentiles and ratios of rounds
cases              the cases to measure: combinations of lengths, batch and threads
machine            facts about the machine, and its load by other programs
bandwidth          the machine's limits: a process that reads memory and multiplies
device_bandwidth   the same for a GPU's memory
device_memory      bytes of a GPU's memory that a process holds
native_time        seconds inside onnxruntime, call by call
worker             a bundle in a process of its own
traffic            bytes and operations of a step, counted
opening            bundles and checkpoint, checked before anything is started
participants       processes that take turns
starting           the participants of a run, with their options
rounds             one case: each participant has one turn per round
results            the results as plain data, which JSON output contains
rows               from seconds to rates, shares of the limit and ratios
run                all steps of a run
csv_report         results as CSV
report             results as Markdown or JSON
plot               results as a roofline plot
cli_options        the options
cli                the command
operators          a separate tool: compares candidates for a quantized product
"""
