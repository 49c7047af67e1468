"""`neo-eval`: how well bundles do the field's tasks, measured by lm-evaluation-harness.

The harness has the tasks, the prompts and the metrics; here are a model for it (`lm`) and what
tells two bundles apart that answered the same questions (`paired`).
"""
