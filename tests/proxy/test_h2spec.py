"""The HTTP/2 conformance suite (h2spec) against creto: by prior knowledge and by ALPN, with both framings.

On a listener that speaks HTTP/1.1 as well, what is no HTTP/2 preface is answered as HTTP/1.1 (400) instead of with a
bare close: the one case that differs there, and passes where ALPN has chosen HTTP/2.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from .h2_lab import HOSTS, framed_by, h2_lab, http1_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

from standins import certificates

H2SPEC = shutil.which("h2spec", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
ANSWERED_AS_HTTP1 = {"Sends invalid connection preface"}

pytestmark = pytest.mark.skipif(H2SPEC is None, reason="h2spec is not installed (make deps builds it where Go is)")


def failures(directory: Path, *arguments: str) -> set[str]:
    """Names of the cases that failed."""
    report = directory / "h2spec.xml"
    done = subprocess.run(
        [str(H2SPEC), "-o", "5", "-j", str(report), *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    assert len(cases) >= 145, done.stdout
    assert not [case for case in cases if case.find("skipped") is not None]
    return {str(case.get("classname")) for case in cases if case.find("failure") is not None}


@pytest.mark.parametrize("framing", ["nghttp2", "h2"])
def test_h2spec_by_prior_knowledge(tmp_path: Path, framing: str) -> None:
    with framed_by(framing), http1_origin(b"x" * 4000) as (port, _), h2_lab(tmp_path, port) as lab:
        failed = failures(tmp_path, "-h", "127.0.0.1", "-p", str(lab.reverse), "-P", "/good/")
    assert failed <= ANSWERED_AS_HTTP1


@pytest.mark.parametrize("framing", ["nghttp2", "h2"])
def test_h2spec_by_alpn(tmp_path: Path, framing: str) -> None:
    ca, context = certificates(tmp_path, list(HOSTS))
    with (
        framed_by(framing),
        http1_origin(b"x" * 4000, context) as (port, _),
        h2_lab(tmp_path, port, origin_ca=ca) as lab,
    ):
        assert failures(tmp_path, "-h", "localhost", "-p", str(lab.tls), "-t", "-k") == set()
