"""Encrypted objects (see ``port``); embedded: not configured."""

from __future__ import annotations

from creto_platform.storage.embedded import NoStorage
from creto_platform.storage.port import (
    ObjectDamaged,
    ObjectInfo,
    ObjectNotFound,
    RetentionHeld,
    Storage,
    StorageError,
    StorageUnavailable,
)

__all__ = [
    "NoStorage",
    "ObjectDamaged",
    "ObjectInfo",
    "ObjectNotFound",
    "RetentionHeld",
    "Storage",
    "StorageError",
    "StorageUnavailable",
]
