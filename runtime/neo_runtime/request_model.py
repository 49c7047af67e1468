"""Requests to a bundle: token ids and options, validated before anything is computed."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from neo_runtime.bundle.strict_json import parse_object
from neo_runtime.cached_model import CachedModel
from neo_runtime.errors import RequestError
from neo_runtime.generation.prefix import Prefix
from neo_runtime.options.checks import check_vocabulary
from neo_runtime.options.generation_config import GENERATION_CONFIG, file_error
from neo_runtime.options.generation_options import GenerationOptions
from neo_runtime.options.grammar import GrammarCompiler
from neo_runtime.sampling.seeds import check_seeds
from neo_runtime.text.prompts import as_list, of_each, prompt_ids, with_bad_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from neo_runtime.options.grammar import Grammar
    from neo_runtime.text.prompts import Prompt

__all__ = ["RequestModel"]

_LOG = logging.getLogger("neo_runtime")
_NO_TEXT = "the bundle has no tokenizer, so no text to find stop strings in"
_COMPILER = "_compiler"
"""The attribute in which a model keeps its `GrammarCompiler`, once it has one."""


class RequestModel(CachedModel):
    """Base class of `Model` that validates requests; it computes nothing."""

    @cached_property
    def defaults(self) -> GenerationOptions:
        """The options in the bundle's `generation_config.json`.

        Raises:
            GenerationConfigError: (a RequestError) the file has a value that cannot be honoured.
        """
        return self.options()

    def options(self, **overrides: Any) -> GenerationOptions:
        """The options of the bundle's `generation_config.json`, some of them replaced.

        Args:
            **overrides: as for `generate`. An entry of the file that is not an option here, such
                as `max_time`, is dropped by `max_time=None`.

        Raises:
            GenerationConfigError: (a RequestError) the file has a value that cannot be honoured,
                and the request does not replace it.
            RequestError: an override cannot be honoured.
        """
        spec = self.manifest.model
        options = GenerationOptions.from_generation_config(
            self._generation_config,
            eos_token_id=spec.eos_token_id,
            model_max_length=self.manifest.max_length,
            vocab_size=spec.vocab_size,
            overrides=overrides,
            warn=self._warn_of_file,
        )
        given = {"stop", "stop_strings"} & overrides.keys()
        if options.stop and self.tokenizer is None and not given:
            raise file_error(_NO_TEXT, "stop=()")
        return options

    def _warn_of_file(self, message: str) -> None:
        """Log a warning, each message only once: every request reads the same file."""
        told: set[str] = self.__dict__.setdefault("_told_of_file", set())
        if message not in told:
            told.add(message)
            _LOG.warning("%s: %s", self._bundle.path / GENERATION_CONFIG, message)

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        if GENERATION_CONFIG not in self.manifest.files:
            return {}
        path = self._bundle.file(GENERATION_CONFIG)
        return parse_object(path.read_bytes(), path)

    def grammar(
        self,
        *,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        lark: str | None = None,
    ) -> Grammar:
        """Compile a grammar for constrained decoding: the value of the option `grammar`.

        Exactly one of the arguments is given.

        Args:
            json_schema: a JSON schema, as an object or text. The generated JSON has the whitespace
                of Python's `json` and no other; `{"x-guidance": {"whitespace_flexible": true}}` in
                the schema allows other whitespace.
            regex: a regular expression (Rust's syntax) that the whole continuation matches.
            choices: the continuation is one of these texts.
            lark: a context-free grammar in llguidance's variant of Lark, with the rule `start`.

        Raises:
            RequestError: it cannot be used (the message says why), or the bundle has no tokenizer.
            DependencyError: llguidance is missing.
        """
        self._check_open()
        return self._grammars.compile(
            json_schema=json_schema, regex=regex, choices=choices, lark=lark
        )

    @property
    def _grammars(self) -> GrammarCompiler:
        found: GrammarCompiler | None = self.__dict__.get(_COMPILER)
        if found is not None:
            return found
        if self.tokenizer is None:
            raise RequestError("the bundle has no tokenizer, so no text for a grammar")
        new = GrammarCompiler(self.tokenizer.json, self.manifest.model.vocab_size)
        # `setdefault` is atomic: concurrent threads all get the first compiler. A lock could stay
        # held in a forked child.
        first: GrammarCompiler = self.__dict__.setdefault(_COMPILER, new)
        return first

    def single_prompt(
        self,
        call: str,
        prompt: Prompt,
        options: GenerationOptions | None,
        bad_words: Sequence[str],
        prefix: Prefix | None,
        overrides: Mapping[str, Any],
    ) -> tuple[NDArray[np.int64], GenerationOptions]:
        """The validated prompt and options of a request for one continuation.

        `call` names the calling method in messages; the other arguments are those of `stream`.

        Returns:
            Token ids int64 [n], including those of the prefix, and the options.
        """
        chosen = self.request_options(options, overrides, bad_words)
        if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
            raise RequestError(
                f"{call} makes one continuation; set num_beams=1 and num_return_sequences=1, or "
                "use generate"
            )
        given, is_single = as_list(prompt)
        if not is_single and not given:
            raise RequestError(f"{call} got an empty prompt; give text, or at least one token id")
        if not is_single:
            raise RequestError(f"{call} takes one prompt, not a list of them; use generate")
        [ids] = self.encode_prompts(given, prefix)
        check_seeds(chosen.seed, 1)
        return ids, chosen

    def request_options(
        self,
        options: GenerationOptions | None,
        overrides: Mapping[str, Any],
        bad_words: Sequence[str],
    ) -> GenerationOptions:
        """The validated options of a request; arguments are those of `Model.generate`."""
        self._check_open()
        if options is not None and not isinstance(options, GenerationOptions):
            raise RequestError(
                f"options is {options!r}, expected GenerationOptions; give single options by name: "
                "max_new_tokens=50"
            )
        if options is not None:
            chosen = options.merged(**overrides)
        else:
            chosen = self.options(**overrides) if overrides else self.defaults
        if chosen.eos_token_id is None:
            own = tuple(token for token in self.manifest.model.eos_token_id if token >= 0)
            chosen = replace(chosen, eos_token_id=own)
        chosen = with_bad_words(chosen, bad_words, self.tokenizer)
        check_vocabulary(chosen, self.manifest.model.vocab_size)
        if chosen.stop and self.tokenizer is None:
            raise RequestError(_NO_TEXT)
        if chosen.grammar is not None:
            chosen.grammar.check(self.__dict__.get(_COMPILER))
        return chosen

    def encode_prompts(
        self, prompts: Sequence[Prompt], prefix: Prefix | None = None
    ) -> list[NDArray[np.int64]]:
        """The token ids of each prompt, int64 [n], preceded by those of the prefix."""
        if not len(prompts):
            raise RequestError("the list of prompts is empty; give at least one")
        vocab_size = self.manifest.model.vocab_size
        found = of_each(prompts, lambda prompt: prompt_ids(prompt, vocab_size, self.tokenizer))
        if prefix is None:
            return [ids.copy() for ids in found]  # the caller may change its arrays meanwhile
        if not isinstance(prefix, Prefix):
            raise RequestError(
                f"prefix is of type {type(prefix).__name__}, expected one of Model.prefix"
            )
        prefix.check(self)
        return [np.concatenate([prefix.ids, ids]) for ids in found]
