"""What is told when the library is missing, or is another build than the one described."""

from __future__ import annotations

import ctypes

import pytest

from services.worker.engine import llamacpp_api
from services.worker.engine.base import EngineStartError
from services.worker.engine.llamacpp_api import (
    ContextParameters,
    ModelParameters,
    check_layout,
    explain_load_error,
    open_library,
)


def test_a_missing_libgomp_says_what_to_install() -> None:
    error = "libgomp.so.1: cannot open shared object file: No such file or directory"

    message = explain_load_error(error)

    assert message.startswith(
        "libgomp is missing: install it with your system's package manager, "
        "e.g. apt-get install libgomp1"
    )


def test_another_load_error_is_told_with_the_loader_s_words() -> None:
    error = "version `GLIBC_2.99' not found"

    assert error in explain_load_error(error)


def test_the_library_s_defaults_are_those_of_the_described_build() -> None:
    llama = open_library()

    check_layout(llama.model_default_params(), llama.context_default_params())


@pytest.mark.parametrize("field", ["n_ubatch", "type_v", "swa_full", "n_samplers"])
def test_a_field_with_another_default_is_refused(field: str) -> None:
    llama = open_library()
    context = llama.context_default_params()
    setattr(context, field, not getattr(context, field))

    with pytest.raises(EngineStartError, match=rf"{field} is .* pip install xllamacpp=="):
        check_layout(llama.model_default_params(), context)


def test_a_field_put_in_between_is_refused() -> None:
    """As a later build would do: every field behind it is read from the wrong place."""
    llama = open_library()
    moved = ContextParameters()
    source = bytes(llama.context_default_params())
    ctypes.memmove(ctypes.addressof(moved) + 4, source, len(source) - 4)

    with pytest.raises(EngineStartError, match="not the build"):
        check_layout(llama.model_default_params(), moved)
    with pytest.raises(EngineStartError, match="not the build"):
        check_layout(ModelParameters(), llama.context_default_params())


def test_another_version_is_refused_before_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    # The only way to have another version in this environment.
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2027.1.1")

    with pytest.raises(EngineStartError, match=r"2027\.1\.1 is installed"):
        llamacpp_api._find_library()


def test_a_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(EngineStartError, match=r"not installed: pip install xllamacpp=="):
        llamacpp_api._find_library()
