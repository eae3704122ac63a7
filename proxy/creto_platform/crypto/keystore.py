"""Private keys as files: one seed each, readable by their owner only, created once however many processes try."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from pathlib import Path

from creto_platform.crypto.port import SEED_BYTES, Crypto, Key, KeyInvalid

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}", re.ASCII)
_FIELDS = {"v", "alg", "kid", "seed"}
# Far above any key file; a larger one is not read.
_FILE_LIMIT = 4096


class KeyStore:
    """Key files ``<name>.key`` in a private directory (0700). Files are JSON: version, algorithm, kid, base64 seed.

    The kid must match what the seed derives, so a damaged file is an error and not another identity.
    """

    def __init__(self, directory: Path, crypto: Crypto) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._crypto = crypto
        self._loaded: dict[str, Key] = {}

    def load(self, name: str) -> Key | None:
        """The key, or None when there is no such file.

        Raises KeyInvalid naming the file when others may read it, it is not ours, or its content does not hold
        together.
        """
        if name in self._loaded:
            return self._loaded[name]
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KeyInvalid(f"{path}: {error.strerror}") from error
        with os.fdopen(fd, "rb") as file:
            _check_private(path, os.fstat(file.fileno()))
            key = self._parse(path, file.read(_FILE_LIMIT + 1))
        self._loaded[name] = key
        return key

    def load_or_create(self, name: str, algorithm: str) -> Key:
        """The key of that name, made now when there is none. Raises KeyInvalid, also when it is of another algorithm.

        Two processes that create it at once end up with the same key: the file appears whole or not at all, and
        the first one wins.
        """
        key = self.load(name)
        if key is None:
            self._create(name, algorithm)
            key = self.load(name)
        if key is None or key.algorithm != algorithm:
            raise KeyInvalid(f"{self._path(name)}: not a {algorithm} key")
        return key

    def names(self) -> list[str]:
        """Names of the stored keys, sorted."""
        return sorted(path.stem for path in self._directory.glob("*.key"))

    def _create(self, name: str, algorithm: str) -> None:
        path = self._path(name)
        key = self._crypto.keygen(algorithm)
        document = {
            "v": 1,
            "alg": algorithm,
            "kid": key.kid.hex(),
            "seed": base64.b64encode(key.seed()).decode("ascii"),
        }
        temporary = path.with_name(f".{name}.{os.getpid()}.{os.urandom(4).hex()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(json.dumps(document).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            # link, unlike rename, refuses to replace what another process created meanwhile.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
        _sync_directory(self._directory)

    def _parse(self, path: Path, data: bytes) -> Key:
        try:
            document = json.loads(data)
            if not isinstance(document, dict) or set(document) != _FIELDS or document["v"] != 1:
                raise ValueError
            algorithm, kid = str(document["alg"]), str(document["kid"])
            seed = base64.b64decode(document["seed"], validate=True)
            if len(seed) != SEED_BYTES[algorithm]:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            # Never the text of the error: it may quote the seed.
            raise KeyInvalid(f"{path}: not a version 1 key file") from None
        key = self._crypto.keygen(algorithm, seed)
        if key.kid.hex() != kid:
            raise KeyInvalid(f"{path}: the seed does not belong to the recorded key id")
        return key

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise KeyInvalid(f"{name!r} cannot be the name of a key")
        return self._directory / f"{name}.key"


def _check_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyInvalid(f"{path}: not a regular file")
    if status.st_uid != os.geteuid():
        raise KeyInvalid(f"{path}: belongs to user {status.st_uid}, not to us")
    if status.st_mode & 0o077:
        raise KeyInvalid(f"{path}: others may read it (mode {status.st_mode & 0o777:o}); replace the key, chmod 600")


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
