"""`neo-eval`: accuracy of bundles on standard tasks, measured with lm-evaluation-harness.

The harness provides the tasks, the prompts and the metrics. Parts of this package; each imports
only itself and those above it:

paired   scores, and paired differences between models that answered the same questions
lm       a bundle as a model of the harness
run      a run of the harness on one model
gate     the check of the scores against `--max-drop`
report   scores as a table, or as JSON
cli      the command
"""
