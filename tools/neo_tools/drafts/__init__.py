"""The gain from speculative decoding: `python -m neo_tools.drafts BUNDLE`.

First, the time to verify several tokens at once is compared with that of one decode step. Then,
given a file of prompts, texts are generated without drafts, with prompt lookup, and with a draft
model, to compare their speed and to count accepted draft tokens. These take turns, in rounds.
"""
