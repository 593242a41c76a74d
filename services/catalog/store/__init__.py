"""Everything the catalog keeps: the only place with its SQL. One method is one transaction."""

from services.catalog.store.adapters import AdapterStore
from services.catalog.store.offerings import CatalogStore

__all__ = ["AdapterStore", "CatalogStore"]
