"""What guessed tokens save: `python -m neo_tools.drafts BUNDLE`.

First what the model takes to check several tokens at once, compared with one step of decode. Then,
with prompts of your own, how fast texts are without guesses, with prompt lookup, and with a draft
model, and how many guesses are right. Everything takes turns, in rounds.
"""
