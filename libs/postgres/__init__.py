"""PostgreSQL through asyncpg, in one way for the whole suite.

`Database` gives transactions and turns the server's failures into `libs.errors`; `migrate` brings a
schema up to date. SQL itself lives in each service's store. `cluster` runs the embedded server.
"""

from __future__ import annotations

from libs.postgres.database import Connection, Database, connect
from libs.postgres.migrations import migrate

__all__ = ["Connection", "Database", "connect", "migrate"]
