"""A bundle as a model of lm-evaluation-harness, without PyTorch.

    import lm_eval
    from neo_tools.evaluate.lm import NeoLM

    lm_eval.simple_evaluate(model=NeoLM("gpt-neo-1.3b"), tasks=["lambada_openai"])

As in the harness's own `HFLM`, contexts are truncated on the left, and texts longer than the
context length are scored in windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import neo_runtime
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from neo_runtime.errors import RequestError
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval.api.instance import Instance
    from numpy.typing import NDArray

__all__ = ["NeoLM"]

_Scored = tuple[float, bool]
"""Log-likelihood of a continuation (natural logarithm), and whether greedy decoding gives it."""
_MAX_GEN_TOKS = 256
"""Default of the harness."""


@register_model("neo-onnx")
class NeoLM(TemplateLM):
    """A loaded bundle that the harness can evaluate, also several times."""

    def __init__(
        self,
        pretrained: str | Path,
        *,
        backend: str = "auto",
        device: int = 0,
        threads: int | None = None,
        max_gen_toks: int = _MAX_GEN_TOKS,
        show_progress: bool = True,
    ) -> None:
        """Load a bundle.

        Args:
            pretrained: folder of the bundle; the harness prescribes the name.
            backend: as for `neo_runtime.load`.
            device: index of the GPU.
            threads: threads per operator; None: one per physical core.
            max_gen_toks: new tokens if a task sets no limit.
            show_progress: whether to show progress bars on stderr.

        Raises:
            NeoError: see `neo_runtime.load`.
            RequestError: the bundle has no tokenizer or no end-of-sequence token.
        """
        super().__init__()
        self.bundle = Path(pretrained)
        self.model = neo_runtime.load(self.bundle, backend=backend, device=device, threads=threads)
        separator = self.model.manifest.model.separator
        if self.model.tokenizer is None or not separator:
            self.model.close()
            lacking = "tokenizer" if self.model.tokenizer is None else "end-of-sequence token"
            raise RequestError(
                f"{pretrained} has no {lacking}, which tasks need; export it with one"
            )
        self._tokenizer = self.model.tokenizer
        self._separator = separator[0]
        self._max_gen_toks = max_gen_toks
        self._is_quiet = not show_progress
        self._last: tuple[tuple[int, ...], NDArray[np.float32]] | None = None

    @property
    def eot_token_id(self) -> int:
        """Id of the token that separates texts."""
        return self._separator

    @property
    def max_length(self) -> int:
        """Context length of the model, in tokens."""
        return self.model.manifest.max_length

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches requests."""
        return str(self.bundle.resolve()).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text, by default without special tokens."""
        return self._tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def close(self) -> None:
        """Close the model."""
        self.model.close()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[_Scored]:
        """Log-likelihoods of continuations after their contexts."""
        scored: list[_Scored] = super().loglikelihood(
            requests, disable_tqdm=disable_tqdm or self._is_quiet
        )
        return scored

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[_Scored]:
        found: list[_Scored | None] = [None] * len(requests)
        # Answers of one token to the same question have the same input; sorting makes them
        # adjacent, so that the last logits can be reused.
        order = sorted(range(len(requests)), key=lambda i: self._input(*requests[i][1:]))
        for index in tqdm(order, desc="log-likelihoods", disable=disable_tqdm):
            key, context, continuation = requests[index]
            found[index] = self._score(context, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[index])
        return [one for one in found if one is not None]

    def _input(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """Input of the model: all tokens but the last, truncated on the left to fit."""
        return tuple([*context, *continuation][-self.max_length - 1 : -1])

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> _Scored:
        ids = self._input(context, continuation)
        if len(continuation) > len(ids):
            raise RequestError(
                f"a continuation of {len(continuation)} tokens after a context of {len(context)} "
                f"does not fit in the model's {self.max_length} positions; choose a task with "
                "shorter answers"
            )
        if self._last is None or self._last[0] != ids:
            self._last = ids, self.model.logits(ids)
        logits = self._last[1][len(ids) - len(continuation) :].astype(np.float64)
        targets = np.array(continuation)
        shifted = logits - logits.max(axis=1, keepdims=True)
        chosen = shifted[np.arange(len(targets)), targets]
        logprobs = chosen - np.log(np.exp(shifted).sum(axis=1))
        return float(logprobs.sum()), bool((logits.argmax(axis=1) == targets).all())

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows; each token is scored in exactly one."""
        found = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm or self._is_quiet):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            scored = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            found.append(sum(logprob for logprob, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the stop strings of a task, generated in shared batches."""
        found = []
        with neo_runtime.Scheduler(self.model) as scheduler:
            pending = []
            for context, asked in (request.args for request in requests):
                options = self._options(asked)
                ids = self.tok_encode(context) or [self.prefix_token_id]
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise RequestError(
                        f"the task asks for {options['max_new_tokens']} new tokens, but the model "
                        f"has {self.max_length} positions; lower max_gen_toks"
                    )
                pending.append(scheduler.submit(ids[-room:], **options))
            bar = tqdm(pending, desc="generation", disable=disable_tqdm or self._is_quiet)
            for request, one in zip(requests, bar, strict=True):
                found.append(one.result().text or "")
                self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A task's `generation_kwargs` as options of `Scheduler.submit`.

        Greedy unless the task sets `do_sample`, as in the harness's own `HFLM`: what the bundle's
        generation_config.json says about it is not the task's.
        """
        options = dict(asked)
        until = options.pop("until", ())
        options["stop"] = [until] if isinstance(until, str) else [text for text in until if text]
        limit = options.pop("max_gen_toks", self._max_gen_toks)
        options.setdefault("max_new_tokens", limit)
        if not options.setdefault("do_sample", False) or not options.get("temperature", 1.0):
            options["do_sample"] = False
            for name in ("temperature", "top_p", "top_k", "min_p"):
                options.pop(name, None)  # no effect in greedy decoding
        return options
