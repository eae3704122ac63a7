"""Makes unmodified programs trust the run's CA: one bundle file, and every variable that points a client at it.

Which client honours which variable was tried out with a CA of our own: ``SSL_CERT_FILE`` is read by OpenSSL, Go, Ruby
and Python's ssl (urllib, httpx, aiohttp) and by curl; ``CURL_CA_BUNDLE`` by curl, requests and pip;
``REQUESTS_CA_BUNDLE`` by requests, pip and botocore; git needs ``GIT_SSL_CAINFO`` where it is built with GnuTLS. wget
with GnuTLS reads no variable: mount the bundle over the system's file for it.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path

BUNDLE_NAME = "ca-bundle.pem"

# Where systems keep all their roots in one PEM file, as Go looks for them (crypto/x509/root_linux.go, root_bsd.go).
SYSTEM_BUNDLES: tuple[Path, ...] = (
    Path("/etc/ssl/certs/ca-certificates.crt"),  # Debian, Ubuntu, Arch, Alpine
    Path("/etc/pki/tls/certs/ca-bundle.crt"),  # Fedora, RHEL
    Path("/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"),  # RHEL 7 and newer
    Path("/etc/ssl/ca-bundle.pem"),  # openSUSE
    Path("/etc/ssl/cert.pem"),  # Alpine without the package, macOS, BSD
)

# These replace a client's own store, so they get the system's roots and the CA.
_REPLACING = (
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "AWS_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "NPM_CONFIG_CAFILE",
    "CARGO_HTTP_CAINFO",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "HTTPLIB2_CA_CERTS",
    "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
    "NIX_SSL_CERT_FILE",
)
# These add to a client's own store.
_ADDING = ("NODE_EXTRA_CA_CERTS", "DENO_CERT")

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def system_bundle() -> Path | None:
    """The PEM file with the roots this machine trusts; None when there is none.

    ``SSL_CERT_FILE`` of our own environment comes first (an operator's choice), then OpenSSL's default, then the usual
    places, then the ``certifi`` package if it is installed.
    """
    default = ssl.get_default_verify_paths().cafile
    candidates = [Path(default)] if default else []
    for path in (*candidates, *SYSTEM_BUNDLES):
        if path.is_file() and os.access(path, os.R_OK):
            return path
    try:
        import certifi
    except ImportError:
        return None
    return Path(certifi.where())


def write_bundle(ca_pem: bytes, directory: Path) -> Path:
    """Writes the system's roots followed by ``ca_pem`` as ``ca-bundle.pem`` into ``directory``; its path.

    Without system roots the bundle holds the CA alone. The file appears whole or not at all. Raises OSError.
    """
    roots = system_bundle()
    certificates = [] if roots is None else _CERTIFICATE.findall(roots.read_bytes())
    path = directory / BUNDLE_NAME
    scratch = path.with_suffix(".new")
    scratch.write_bytes(b"".join(certificate + b"\n" for certificate in certificates) + ca_pem)
    scratch.chmod(0o644)
    scratch.replace(path)
    return path


def trust_environment(bundle: Path, ca_only: Path) -> dict[str, str]:
    """The variables to set for an agent. bundle: system roots and CA; ca_only: the CA; both as the agent sees them."""
    variables = {name: str(bundle) for name in _REPLACING}
    variables |= {name: str(ca_only) for name in _ADDING}
    # uv brings its own roots unless told to use the platform's, which SSL_CERT_FILE then overrides.
    variables["UV_NATIVE_TLS"] = "1"
    return variables
