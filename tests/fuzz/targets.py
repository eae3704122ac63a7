"""Every fuzz target by name. A target takes any bytes; whatever it raises is a defect.

``pieces`` are the words of the target's language: mutations put them into messages, and they are the dictionary of
the coverage-guided run. ``corpus/<name>/`` holds messages to begin with, and every input that once broke something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import connections, documents, messages, network, protocols, records

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    name: str
    check: Callable[[bytes], None]
    pieces: tuple[bytes, ...]

    def seeds(self) -> list[bytes]:
        """The corpus, in the order of its file names."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())]


_FIELDS = (
    b"Host: a\r\n",
    b"Content-Length: 3\r\n",
    b"Content-Length: 0\r\n",
    b"content_length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Connection: close\r\n",
    b"Connection: x-a, host, content-length\r\n",
    b"Upgrade: websocket\r\nConnection: upgrade\r\n",
    b"Expect: 100-continue\r\n",
    b"Max-Forwards: 1\r\n",
    b"X_Agent_Id: 1\r\n",
    b"Via: 1.1 creto\r\n",
    b"Trailer: a\r\n",
    b"TE: trailers\r\n",
    b"Keep-Alive: 5\r\n",
    b"X-A: 1\r\n",
)
_MARKS = (b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\t", b" ", b":", b",", b"\0", b"\x0b", b"\x7f", b"\x80", b"\xff", b" \r\n")
_CHUNKS = (b"5\r\nhello\r\n", b"5;a=b\r\nhello\r\n", b'1;a="\\"";b\r\nx\r\n', b"0\r\n\r\n", b"0\r\nX-T: 1\r\n\r\n", b"00;a\r\n")
_LINES = (b"GET ", b"POST ", b"HEAD ", b"OPTIONS * ", b"CONNECT a:443 ", b"http://b.test:80", b"/", b"//", b"?q", b"#", b"[::1]", b"@")
_VERSIONS = (b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/2.0\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 204 \r\n", b"HTTP/1.0 304 x\r\n")
_JSON = (
    b'"usage":',
    b'"model":"m"',
    b'"Model":"n"',
    b'"choices":[]',
    b'"message":{',
    b'"response":{',
    b'"prompt_tokens":1',
    b'"input_tokens":9',
    b'"output_tokens":-1',
    b'"completion_tokens_details":{"reasoning_tokens":1}',
    b"null",
    b"true",
    b"1e400",
    b"-0",
    b"12345678901234567890",
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\\',
    *(bytes((byte,)) for byte in b'{}[],:" \t\r\n\\'),
)
_USAGE = (
    b'"usageMetadata":{"promptTokenCount":1,"totalTokenCount":3}',
    b'"cachedContentTokenCount":1',
    b'"promptTokensDetails":[{"modality":"AUDIO","tokenCount":1}]',
    b'"usage":{"inputTokens":1,"outputTokens":2,"cacheDetails":[{"ttl":"1h","inputTokens":1}]}',
    b'"amazon-bedrock-invocationMetrics":{"inputTokenCount":1}',
    b'"bytes":"eyJwcm9tcHRfdG9rZW5fY291bnQiOjF9"',
    b'"meta":{"billed_units":{"input_tokens":1}}',
    b'"delta":{',
    b'"prompt_eval_count":1,"eval_count":2',
    b'"done":true',
)
_STREAM = (b"data:", b"data: ", b"event: x\n", b": c\n", b"\n\n", b"\r\n\r\n", b"\r\r", b"data: [DONE]\n\n", b"\xef\xbb\xbf", b"id")
_PATHS = (b"/", b"//", b"/./", b"/../", b"..;/", b"%2e", b"%2F", b"%5c", b"\\", b"%25", b"%252e", b"%00", b";a=b", b"%C0%AE", b"%zz", b"A")
_PACKED = (b"\xc0", b"\xc2", b"\xc3", b"\x80", b"\x81", b"\x90", b"\xdc\x00\x01", b"\xde\x00\x01", b"\xc7\x00\x01", b"\xd6\xff\0\0\0\0", b"\xcb" + bytes(8))
_NUMBERS = (b"\x00", b"\x01", b"\x7f", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\x01", b"\x80")
_NOTES = ("— log.test ".encode(), b"\n\n", b"\n", b"+", b"=", b"AAAA", b"index 0", b"extra ", b"c2sp.org/tlog-proof@v1", b"0", b"9223372036854775807")

_FRAMES = (b"\0\0\0\x04\0\0\0\0\0", b"\0\0\x04\x08\0\0\0\0\1\0\0\0\1", b"\0\0\x04\x03\0\0\0\0\1\0\0\0\0", b"\0\0\3\0\1\0\0\0\1abc", b"\0\0\x08\x06\0\0\0\0\0" + bytes(8))
_PSEUDO = (b":method=GET\n", b":method=CONNECT\n", b":scheme=https\n", b":path=/\n", b":authority=a.test\n", b"host=a.test\n", b":status=200\n", b"content-length=3\n", b"transfer-encoding=chunked\n", b"te=trailers\n", b"cookie=a\n", b"content_length=3\n", b"x_agent_id=1\n", b"expect=100-continue\n", b"=", b"\n", b"\r", b" ", b"*", b"@")

_HEADS = (*_FIELDS, *_MARKS, *_LINES, *_VERSIONS, *_CHUNKS)
TARGETS = {
    target.name: target
    for target in (
        Target("request", messages.check_request, _HEADS),
        Target("response", messages.check_response, _HEADS),
        Target("chunked", messages.check_chunked, (*_CHUNKS, *_MARKS, b";", b"=", b'"', b"\\", b"f" * 15)),
        Target("counted", messages.check_counted, _NUMBERS),
        Target("authority", messages.check_authority, (*_MARKS, b"a", b".", b":80", b"[::1]", b"[::ffff:1.2.3.4]", b"@", b"%", b"[", b"]", b"0x7f", b":")),
        Target("edits", messages.check_edits, (*_MARKS, b"=", b"Authorization", b"Host", b"x-a", b"Content-Length", b"\xc3\xa9", b"\xe2\x82\xac")),
        Target("usage_document", documents.check_usage_document, _JSON),
        Target("usage_stream", documents.check_usage_stream, (*_JSON, *_STREAM)),
        Target("usage_native", documents.check_usage_native, (*_JSON, *_STREAM, *_USAGE, *_NUMBERS)),
        Target("members", documents.check_members, _JSON),
        Target("pointer", documents.check_pointer, (*_JSON, b'"a":', b'"a/b":', b'"\\u006dodel":1', b'""')),
        Target("path", documents.check_path, _PATHS),
        Target("dns_query", network.check_dns_query, (*_NUMBERS, b"\x01a", b"\x04test\0", b"\xc0\x0c", b"\0\0\x29\x04\xd0\0\0\0\0\0\0")),
        Target("dns_answer", network.check_dns_answer, (*_NUMBERS, b"\xc0\x0c", b"\x01b\xc0\x0c", b"\0\x05\0\x01", b"\0\x01\0\x01\0\0\0\x3c\0\x04\1\2\3\4")),
        Target("hello", network.check_hello, (*_NUMBERS, b"\x16\x03\x01", b"\0\0\0\x0b\0\x09\0\0\x06a.test", b"\0\x10", b"\0\x2b", b"\xfe\x0d")),
        Target("tls_records", network.check_tls_records, (*_NUMBERS, b"\x17\x03\x03", b"\x16\x03\x01", b"\x15\x03\x03\0\x02\1\0", b"\x48\0", b"\x48\1")),
        Target("journal", records.check_journal, _NUMBERS),
        Target("outcome", records.check_outcome, (*_PACKED, *_NUMBERS)),
        Target("wal", records.check_wal, (*_PACKED, *_NUMBERS)),
        Target("tiles", records.check_tiles, _NUMBERS),
        Target("note", records.check_note, _NOTES),
        Target("proof", records.check_proof_file, _NOTES),
        Target("merkle", records.check_merkle, _NUMBERS),
        Target("wire", records.check_wire, _PACKED),
        Target("token", records.check_token, _PACKED),
        Target("scope", records.check_scope, (b"\n", b"egress.*", b"host:", b"**", b"*", b"/", b".", b"..", b"spiffe://a/b", b":", b"[::1]")),
        Target("jsonrpc", protocols.check_jsonrpc, (*_JSON, b'"method":"a"', b'"Method":', b'"params":{"name":"x"}', b'"id":1', b'"jsonrpc":"2.0"', b'"_meta":{', b"NaN")),
        Target("websocket", protocols.check_websocket, (*_NUMBERS, b"\x81\x81\0\0\0\0a", b"\x01\x80\0\0\0\0", b"\x88\x82\0\0\0\0\x03\xe8", b"\x89\0", b"\x82\x01\xff", b"\x7e\0\x80")),
        Target("relay", connections.check_relay, (*_HEADS, connections.ANSWER)),
        Target("h2", protocols.check_h2, (*_NUMBERS, *_FRAMES)),
        Target("h2_fields", protocols.check_h2_fields, (*_PSEUDO, *_NUMBERS)),
    )
}  # fmt: skip
