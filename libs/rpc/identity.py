"""Who may call: API keys against the key table, services against their tokens and allow-lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from libs.auth import KeyTable, Principal, permits, sha256_of
from libs.config import ConfigError, IdentitySection, read_secret
from libs.errors import PermissionDenied, Unauthenticated
from libs.rpc.policy import Audience, MethodPolicy

TOKEN_PREFIX = "ms_"  # noqa: S105 - not a secret


class Identity:
    """Checks credentials for one server.

    Internal methods are refused unless the configuration lists who may call them; an internal
    method that is served without such a list is a start-up error.
    """

    def __init__(
        self,
        keys: KeyTable,
        callers: Mapping[bytes, str],
        allow: Mapping[str, frozenset[str]],
    ) -> None:
        self._keys = keys
        self._callers = dict(callers)
        self._allow = dict(allow)

    @classmethod
    def from_config(cls, config: IdentitySection, keys: KeyTable) -> Identity:
        """Reads the hashes of callers' tokens.

        Raises:
            ConfigError: a file is missing or is no SHA-256, or a list names an unknown caller.
        """
        callers: dict[bytes, str] = {}
        for name, path in config.callers.items():
            try:
                digest = bytes.fromhex(read_secret(path))
            except ValueError as error:
                raise ConfigError(f"{path}: is not a SHA-256 in hexadecimal") from error
            callers[digest] = name
        for method, names in config.allow.items():
            unknown = set(names) - set(config.callers)
            if unknown:
                raise ConfigError(
                    f"identity.allow.{method}: {sorted(unknown)} are not in identity.callers"
                )
        allow = {method: frozenset(names) for method, names in config.allow.items()}
        return cls(keys, callers, allow)

    def require_allow_lists(self, policies: Iterable[MethodPolicy]) -> None:
        """Refuses to serve an internal method that nobody may call.

        Raises:
            ConfigError: names the methods.
        """
        missing = [
            policy.method
            for policy in policies
            if policy.audience == Audience.INTERNAL and not self._allow.get(policy.method)
        ]
        if missing:
            raise ConfigError(f"identity.allow has no callers for {', '.join(missing)}")

    def service(self, method: str, credential: str) -> str:
        """Returns which service calls an internal method.

        Raises:
            Unauthenticated: the token is not known.
            PermissionDenied: the service may not call this method.
        """
        name = self._callers.get(sha256_of(credential))
        if name is None:
            raise Unauthenticated("the service token is not known")
        if name not in self._allow.get(method, frozenset()):
            raise PermissionDenied(f"{name} may not call {method}", metadata={"permission": method})
        return name

    def principal(self, credential: str, now_s: float) -> Principal:
        """Returns whose API key it is. Raises as KeyTable.authenticate does."""
        return self._keys.authenticate(credential, now_s)

    def permits(self, principal: Principal, permission: str) -> bool:
        """Tells whether the caller's role has a permission."""
        return permits(principal.role, permission)
