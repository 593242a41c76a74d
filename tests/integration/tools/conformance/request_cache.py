"""The prefix cache of the stand-in, and how it is wrong."""

from __future__ import annotations

from collections import defaultdict

from maas.inference.v1 import generation_pb2

from tests.integration.tools.conformance.request_faults import Wrong

_BLOCK = 16


class Prefixes:
    """Knows the beginnings of prompts, in whole blocks, by tenant and salt."""

    def __init__(self, wrong: Wrong, ignored: str) -> None:
        self._wrong = wrong
        self._is_off = ignored == "prompt_cache"
        self._known: dict[str, set[tuple[int, ...]]] = defaultdict(set)

    def found(self, spec: generation_pb2.GenerationSpec, prompt: list[int], project: str) -> int:
        """Tokens of a prompt that are cached; the last one never is."""
        known = self._known[self._scope_of(spec, project)]
        wrong = self._wrong
        is_read = not spec.cache.bypass or wrong is Wrong.BYPASS_IGNORED
        if spec.output.return_prompt_logprobs and wrong is not Wrong.SCORED_FROM_CACHE:
            is_read = False
        if self._is_off or not is_read:
            return 0
        cached = 0
        while cached + _BLOCK < len(prompt):
            if tuple(prompt[: cached + _BLOCK]) not in known:
                break
            cached += _BLOCK
        return len(prompt) if cached and wrong is Wrong.HIT_WHOLE else cached

    def keep(self, spec: generation_pb2.GenerationSpec, prompt: list[int], project: str) -> None:
        """Keeps the blocks of a prompt for its tenant."""
        known = self._known[self._scope_of(spec, project)]
        for end in range(_BLOCK, len(prompt), _BLOCK):
            known.add(tuple(prompt[:end]))

    def _scope_of(self, spec: generation_pb2.GenerationSpec, project: str) -> str:
        salt = "" if self._wrong is Wrong.SALT_IGNORED else spec.cache.salt
        if self._wrong is Wrong.STRANGERS_HIT:
            project = ""
        if self._wrong is Wrong.SALT_IS_ALL and salt:
            project = ""
        return f"{project}|{salt}|{spec.adapter}"
